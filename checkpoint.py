"""A run's folder: lock, log, start, save, resume."""
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from config import Config
from data import write_atomically
from distributed import Failure, same_everywhere, say, together
from state import load, restore, save

try:
    import fcntl
except ImportError:  # neither Linux nor macOS: no lock and so no training, but reading needs none
    fcntl = None

# What may differ when a run is resumed. The end matters to schedules only, which may be extended.
MAY_CHANGE = {"out_dir", "data_dir", "max_tokens", "eval_interval", "log_interval",
              "checkpoint_interval", "batch_size", "device", "compile", "activation_checkpointing",
              "shard_size", "resume", "change_data"}  # data_dir: the data is known by its shards


@dataclass
class Progress:
    """Where a run is, as its checkpoint keeps it."""
    step: int = 0
    train_time_s: float = 0.0  # without evaluation, checkpoints and compilation
    data_step: int = 0  # the last step on earlier shards; 0: there were none
    tokenizer: str = ""
    shards: dict = field(default_factory=dict)  # name: tokens


# ---- lock and log

def lock(folder: Path, patience: float = 15) -> None:
    """Keeps other runs out of the folder for as long as this process lives, however it ends.

    Waits `patience` seconds for one that is about to end, like the orphaned workers of a killed
    torchrun. Raises OSError if it does not, or if the folder cannot be made.
    """
    if fcntl is None:
        raise OSError("training needs Linux or macOS: this system cannot lock the folder of a run")
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # open for as long as we live
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(f"another run uses {folder}: wait for it, or give another folder")
            time.sleep(0.2)
        except OSError as e:  # as on some cluster file systems
            return say(f"(no lock: {e.strerror}; nothing keeps a second run out of {folder})")


def append(log, **values) -> None:
    """Writes a line of log.jsonl, on the process that has it open."""
    try:
        if log:
            log.write(json.dumps(values).encode() + b"\n")
    except OSError as e:
        raise OSError(f"{log.name} could not be written: {e}")


def start(cfg: Config, now: Progress) -> None:
    """Cuts the log after now.step and writes config.json; at step 0, removes an old checkpoint."""
    out_dir, step = Path(cfg.out_dir), now.step
    log, ckpt = out_dir / "log.jsonl", out_dir / "ckpt.pt"
    if step == 0 and ckpt.exists():
        size = ckpt.stat().st_size / 1e6
        print(f"replacing the run in {out_dir} ({size:.1f} MB of checkpoint, and its log)")
        ckpt.unlink()
    lines = []
    if step and log.exists():
        for line in log.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a kill may have cut the last line
                if json.loads(line)["step"] <= step:
                    lines.append(line.rstrip() + b"\n")
    # A line says where other data begins. It has the number of the next step: if this checkpoint is
    # resumed again, the line is cut and written anew.
    if 0 < step == now.data_step:
        change = dict(step=step + 1, tokens=step * cfg.total_batch_tokens, data_dir=cfg.data_dir)
        lines.append(json.dumps(change).encode() + b"\n")
    write_atomically(log, lambda file: file.writelines(lines))
    text = json.dumps(asdict(cfg), indent=1) + "\n"
    write_atomically(out_dir / "config.json", lambda file: file.write(text.encode()))


# ---- a run's checkpoint

def save_checkpoint(cfg: Config, model, optimizer, now: Progress) -> None:
    """The optimizer is in eval mode, so the model in the checkpoint is x."""
    save(Path(cfg.out_dir) / "ckpt.pt", {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(),
        "model_config": asdict(model.config), "config": asdict(cfg), **asdict(now),
        "tokens": now.step * cfg.total_batch_tokens})


def load_weights(cfg: Config, model, tokenizer: str) -> dict:
    """Copies the weights of cfg.init_from. Failure for another architecture or tokenizer."""
    saved = load(Path(cfg.init_from))
    check_tokenizer(cfg, cfg.init_from, saved, tokenizer)
    for key, value in asdict(model.config).items():
        if key != "block_size" and (other := saved["model_config"].get(key)) != value:
            raise Failure(f"{key} is {value!r}, but {cfg.init_from} was made with {other!r}: "
                          "give its config", 2)
    restore(cfg.init_from, saved, model)
    return saved


def check_tokenizer(cfg: Config, ckpt: Path | str, saved: dict, tokenizer: str, advice="") -> None:
    """Failure if the checkpoint saw other tokens than the data's. Very old ones do not say."""
    if (other := saved.get("tokenizer", tokenizer)) != tokenizer:
        raise Failure(f"{ckpt} was trained on {other} tokens, {cfg.data_dir} holds {tokenizer} "
                      f"tokens{advice}", 2)


def resume(cfg: Config, model, optimizer, now: Progress) -> None:
    """Goes back to the checkpoint, or to the weights of init_from. `now` comes with the data."""
    ckpt = Path(cfg.out_dir) / "ckpt.pt"

    def put():
        if not (cfg.resume and ckpt.exists()):
            return load_weights(cfg, model, now.tokenizer) if cfg.init_from else None
        try:
            saved = load(ckpt)
            data_step = check_resume(cfg, model, now, ckpt, saved)
            restore(ckpt, saved, model, optimizer)
        except (OSError, ValueError) as e:
            raise Failure(f"{e}: put a copy in its place, or start over with --resume=False")
        now.step, now.data_step = saved["step"], data_step
        now.train_time_s = saved.get("train_time_s", 0.0)

    together(put)
    same_everywhere(f"the step of {ckpt}, which all nodes must share,", now.step)


def check_resume(cfg: Config, model, now: Progress, ckpt: Path, saved: dict) -> int:
    """Refuses a checkpoint of another run. Returns the step before the first on these shards."""
    way_out = "or start over with --resume=False or in another --out_dir"
    before = {**asdict(Config()), **saved["config"], **saved["model_config"]}
    for key, value in {**asdict(cfg), **asdict(model.config)}.items():
        if key not in MAY_CHANGE and before[key] != value:
            raise Failure(f"{key} is {value!r}, but {ckpt} was made with {before[key]!r}: "
                          f"go on with that, {way_out}", 2)
    check_tokenizer(cfg, ckpt, saved, now.tokenizer, f": go on with those, {way_out}")
    if "shards" in saved:
        same = saved["shards"] == now.shards
    else:  # an old checkpoint
        same = before["data_dir"] == cfg.data_dir
    if same:
        return saved.get("data_step", 0)
    if not cfg.change_data:
        raise Failure(f"data_dir {cfg.data_dir} does not hold the shards of {ckpt}: go on with "
                      f"those, with these by --change_data=True, {way_out}", 2)
    return saved["step"]
