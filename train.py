"""Trains a language model: data, model, optimizer, evaluation, checkpoints and log in one loop.

    python train.py configs/quickstart.py                                        one process, CPU or GPU
    python train.py configs/125m_sf.py --max_tokens=10e9 --lr=0.01               --knob=value wins over the config
    torchrun --standalone --nproc_per_node=8 train.py configs/772m_sf.py         many processes, same mathematics
    python train.py --help                                                       all knobs

The same command given again goes on from the last checkpoint. Ctrl-C, SIGTERM and SIGUSR1 write one and stop.
"""
import ast
import contextlib
import difflib
import functools
import gc
import inspect
import json
import logging
import math
import os
import runpy
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

PARENT = os.getppid()  # before the imports that take seconds, in which a torchrun can be killed
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait by spinning slow a busy CPU down by a factor of 20
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop takes over, Ctrl-C just ends the process

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from baselines import AMUSE, MuonAdamW, NorMuon, ScheduleFreePlus
from checkpoint import load, lock, restore, save
from data import TokenBatches, read_meta, write_atomically
from model import GPT, GPTConfig
from prepare_fineweb import get_tokenizer, prepare_stdlib
from sf_normuon import SFNorMuon, local

SCHEDULE_FREE = ("sf_normuon", "sf_adamw", "amuse", "schedulefree_plus")
OPTIMIZERS = (*SCHEDULE_FREE, "adamw", "normuon", "muon")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
DEVICES = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
QUICKSTART_DATA = "data/stdlib"  # the only folder that is made when it is missing
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "B200": 2250e12,
              "L40S": 362e12, "RTX 4090": 165e12}  # of bfloat16 products, dense, by a part of the card's name


@dataclass
class Config:
    # the run
    out_dir: str = ""  # config.json, log.jsonl and ckpt.pt go here; "": runs/<name of the config>
    data_dir: str = "data/fineweb"  # token shards, made by prepare_fineweb.py
    seed: int = 0  # of the initial weights and of the order of the batches
    device: str = DEVICES[0]  # cuda, mps or cpu: the first that is there
    dtype: str = ""  # of the products: float32 or bfloat16 (weights stay float32); "": bfloat16 on cuda, else float32
    compile: bool = torch.cuda.is_available()  # torch.compile each block
    activation_checkpointing: bool = False  # compute each block again in the backward pass: slower, far less memory
    shard_size: int = 0  # processes that share one copy of the model, such as those of one node; 0: all of them
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False: start anew
    change_data: bool = False  # go on with another data_dir than the checkpoint's, from its beginning
    init_from: str = ""  # a checkpoint whose weights a new run starts from
    # the model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # tokens in a sequence
    vocab_size: int = 0  # 0: the data's, padded to a multiple of 64
    # the budget
    batch_size: int = 16  # sequences that a process takes at once; changes memory and speed only
    total_batch_tokens: int = 524288  # tokens in a step, over all processes and accumulation steps
    max_tokens: int = 0  # tokens to train on; 0: until it is stopped
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    # the optimizer
    optimizer: str = "sf_normuon"  # one of OPTIMIZERS
    lr: float = 0.008
    weight_decay: float = 0.05
    betas: tuple = (0.9, 0.95)
    momentum: float = 0.8  # sf_normuon, normuon, muon, amuse
    warmup_steps: int = 2000
    schedule: str = "constant"  # one of SCHEDULES; the schedule-free optimizers want constant
    min_lr_ratio: float = 0.1  # where cosine ends, as a part of lr; linear and wsd end at 0
    decay_at: str = "z"  # sf_normuon, sf_adamw: z, y or none
    normalize_rows: bool = True  # sf_normuon, normuon
    ns_steps: int = 5  # Newton-Schulz iterations
    rho: float = 0.8  # amuse: how fast the gradient moves from near z to x
    averaging_power: float = 0.0  # schedule-free ones: r of the average's weights, tʳ
    beta_power: float = 0.0  # sf_normuon, sf_adamw: p of 1-β1, which falls as (warmup_steps / t)ᵖ
    averaging_start: int = 0  # schedulefree_plus: steps until the average starts
    polyak_beta: float = 0.0  # schedulefree_plus: of the average of gradient norms
    beta_anneal_steps: int = 0  # schedulefree_plus: steps over which β grows from 0.9 to 0.965
    adam_lr: float = 0.0  # of what is not a hidden matrix: embeddings and gains; 0: as lr
    adam_betas: tuple = (0.95, 0.99)  # of the same, where the matrices are not AdamW's too
    adam_weight_decay: float = 0.05
    # intervals, in steps
    eval_interval: int = 250
    log_interval: int = 10
    checkpoint_interval: int = 1000
    eval_tokens: int = 10485760  # of the validation data, from its start


# What may differ when a run is resumed; everything else belongs to its mathematics.
FREE = {"out_dir", "max_tokens", "eval_interval", "log_interval", "checkpoint_interval", "batch_size", "device",
        "compile", "activation_checkpointing", "shard_size", "resume", "change_data"}

RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ.get(k, d)) for k, d in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


class Failure(Exception):
    """Ends the run with one line. status 2: asked wrongly; 1: failed while running. `local`: only this process knows."""

    def __init__(self, message: str, status: int = 1, local: bool = False):
        super().__init__(" ".join(str(message).split()))
        self.status, self.local = status, local


# ---- configuration

def parse(argv: list[str]) -> Config:
    knobs = {f.name: f for f in fields(Config)}
    paths = [a for a in argv if not a.startswith("-")]
    if len(paths) > 1:
        raise Failure(f"one config at a time, got {' '.join(paths)}; knobs are written --knob=value", 2)
    given = []  # (where it stands, knob, value)
    for path in paths:
        try:
            values = runpy.run_path(path)
        except FileNotFoundError:
            raise Failure(f"{path}: no such config", 2)
        except (Exception, SystemExit) as e:
            raise Failure(f"{path} is not a config of plain Python assignments: {type(e).__name__}: {e}", 2)
        given += [(path, key, value) for key, value in values.items() if not key.startswith("__")]
    for argument in argv:
        if argument.startswith("-"):
            key, equals, value = argument.lstrip("-").partition("=")
            if not equals:
                raise Failure(f"{argument}: write it --{key}=value", 2)
            with contextlib.suppress(ValueError, SyntaxError, MemoryError):
                if key in knobs and knobs[key].type is not str:
                    value = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
            given.append(("command line", key, value))
    cfg = Config()
    for where, key, value in given:
        if key not in knobs:
            nearest = difflib.get_close_matches(key, knobs, n=1, cutoff=0)[0]
            raise Failure(f"{where}: unknown knob {key!r}; did you mean {nearest!r}?", 2)
        setattr(cfg, key, convert(where, key, value, knobs[key].type))
    cfg.out_dir = cfg.out_dir or f"runs/{Path(paths[0]).stem if paths else 'default'}"
    check(cfg)
    return cfg


def convert(where: str, key: str, value, kind: type):
    def number(v):  # that fits into float32
        return type(v) in (int, float) and abs(v) < 3.4e38

    if kind in (bool, str) and type(value) is kind:
        return value
    if kind is int and number(value) and value == int(value) or kind is float and number(value):
        return kind(value)
    if kind is tuple and type(value) in (tuple, list) and len(value) == 2 and all(map(number, value)):
        return tuple(map(float, value))
    wanted = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string",
              tuple: "two numbers, like 0.9,0.95"}[kind]
    raise Failure(f"{where}: {key} must be {wanted}, got {value!r}", 2)


def check(cfg: Config) -> None:
    """Refuses impossible values, and fills in dtype."""
    for key, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("decay_at", ("z", "y", "none")),
                       ("dtype", ("", "float32", "bfloat16"))):
        if getattr(cfg, key) not in known:
            raise Failure(f"{key} must be one of {', '.join(filter(None, known))}, got {getattr(cfg, key)!r}", 2)
    for key in ("betas", "adam_betas"):  # beta1 1 is only possible where it is not a decay but a place between z and x
        beta1, beta2 = getattr(cfg, key)
        if not (0 <= beta1 <= 1 and 0 <= beta2 < 1) or beta1 == 1 and cfg.optimizer not in SCHEDULE_FREE:
            raise Failure(f"{key} must be in [0, 1), got {beta1}, {beta2}", 2)
    if cfg.ns_steps > 99:
        raise Failure(f"ns_steps must be below 100, got {cfg.ns_steps}", 2)
    for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "total_batch_tokens", "ns_steps",
                "eval_interval", "log_interval", "checkpoint_interval", "eval_tokens"):
        if getattr(cfg, key) < 1:
            raise Failure(f"{key} must be at least 1, got {getattr(cfg, key)}", 2)
    for key in ("lr", "weight_decay", "adam_lr", "adam_weight_decay", "min_lr_ratio", "grad_clip", "warmup_steps",
                "max_tokens", "vocab_size", "seed", "shard_size", "rho", "averaging_power", "beta_power",
                "averaging_start", "beta_anneal_steps"):
        if getattr(cfg, key) < 0:
            raise Failure(f"{key} must not be negative, got {getattr(cfg, key)}", 2)
    if cfg.optimizer in SCHEDULE_FREE and cfg.schedule != "constant":
        raise Failure(f"schedule must be constant for {cfg.optimizer}, got {cfg.schedule!r}: its average replaces one", 2)
    if cfg.schedule != "constant" and not cfg.max_tokens:
        raise Failure(f"max_tokens must be given: the {cfg.schedule} schedule needs to know the end", 2)
    if cfg.seed >= 2**32:
        raise Failure(f"seed must be below 2**32, got {cfg.seed}", 2)
    device = cfg.device.partition(":")[0]
    if device not in DEVICES:
        raise Failure(f"device must be one of {', '.join(DEVICES)} here, got {cfg.device!r}", 2)
    if device == "cuda":  # each process takes its own card, and leaves nothing on the others
        try:
            torch.cuda.set_device(LOCAL_RANK if WORLD_SIZE > 1 else torch.device(cfg.device))
        except RuntimeError as e:
            raise Failure(f"device {cfg.device!r}, process {LOCAL_RANK}: {e}", 2)
    if cfg.shard_size and WORLD_SIZE % cfg.shard_size:
        raise Failure(f"shard_size {cfg.shard_size} does not divide the {WORLD_SIZE} processes", 2)
    cfg.dtype = cfg.dtype or ("bfloat16" if device == "cuda" else "float32")
    sequences, rest = divmod(cfg.total_batch_tokens, cfg.block_size)
    share, uneven = divmod(sequences, WORLD_SIZE)
    if rest or uneven or share % cfg.batch_size:
        what, divided = ("the number of processes", sequences) if uneven else ("batch_size", share)
        fits = [n for n in range(1, min(divided, 1024) + 1) if divided % n == 0]
        hint = "it must be a multiple of block_size" if rest else f"{what} can be {', '.join(map(str, fits))}"
        raise Failure(f"total_batch_tokens {cfg.total_batch_tokens} is not a multiple of batch_size {cfg.batch_size} * "
                      f"block_size {cfg.block_size} * {WORLD_SIZE} processes: {hint}", 2)


# ---- the parts

def build_optimizer(cfg: Config, model: GPT):
    """To add an optimizer: its class, its name in OPTIMIZERS, a case here, a config."""
    matrices = model.hidden_matrices()
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        dict(params=matrices, use_muon=True, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay),
        dict(params=others, use_muon=False, lr=cfg.adam_lr or cfg.lr, betas=cfg.adam_betas,
             weight_decay=cfg.adam_weight_decay)]
    all_adamw = [{**group, "use_muon": False, "betas": cfg.betas} for group in groups]
    schedule_free = dict(warmup_steps=cfg.warmup_steps, decay_at=cfg.decay_at, averaging_power=cfg.averaging_power,
                         beta_power=cfg.beta_power)
    spectral = dict(momentum=cfg.momentum, ns_steps=cfg.ns_steps)
    try:
        match cfg.optimizer:
            case "sf_normuon":
                return SFNorMuon(groups, **spectral, **schedule_free, normalize_rows=cfg.normalize_rows)
            case "sf_adamw":
                return SFNorMuon(all_adamw, **schedule_free)
            case "amuse":
                return AMUSE(groups, **spectral, warmup_steps=cfg.warmup_steps, rho=cfg.rho,
                             averaging_power=cfg.averaging_power)
            case "schedulefree_plus":
                return ScheduleFreePlus(all_adamw, warmup_steps=cfg.warmup_steps, averaging_power=cfg.averaging_power,
                                        averaging_start=cfg.averaging_start, polyak_beta=cfg.polyak_beta,
                                        beta_anneal_steps=cfg.beta_anneal_steps)
            case "adamw":
                return torch.optim.AdamW(all_adamw, fused=True)
            case "normuon":
                return NorMuon(groups, **spectral, normalize_rows=cfg.normalize_rows)
            case "muon":
                return MuonAdamW(groups, **spectral)
    except ValueError as e:
        raise Failure(e, 2)


def lr_factor(cfg: Config, step: int, steps: int) -> float:
    """What multiplies lr at step 1, 2, ..., steps."""
    if step <= cfg.warmup_steps:
        return step / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    match cfg.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return 1 - progress
        case "wsd":  # constant, then linear to zero over the last fifth
            return min(1.0, (steps - step) / (0.2 * steps))


def open_data(cfg: Config) -> tuple[TokenBatches, TokenBatches, dict, int]:
    try:
        if cfg.data_dir == QUICKSTART_DATA and not Path(cfg.data_dir).exists():
            prepare_stdlib(cfg.data_dir)
        meta = read_meta(cfg.data_dir)
        vocab_size = cfg.vocab_size or -(-meta["vocab_size"] // 64) * 64
        if vocab_size < meta["vocab_size"]:
            raise Failure(f"vocab_size {vocab_size} is smaller than the {meta['vocab_size']} of {cfg.data_dir}", 2)
        train, val = (TokenBatches(cfg.data_dir, split, cfg.block_size, vocab_size, cfg.seed) for split in ("train", "val"))
    except FileNotFoundError as e:
        raise Failure(e, 2)
    except (OSError, ValueError) as e:
        raise Failure(e)
    return train, val, meta, vocab_size


def build_model(cfg: Config, vocab_size: int) -> GPT:
    """The weights are drawn on the CPU, so that they are the same on every device and number of processes."""
    torch.manual_seed(cfg.seed)
    try:
        model = GPT(GPTConfig(vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)).to(cfg.device)
    except ValueError as e:
        raise Failure(e, 2)
    wrap_blocks(cfg, model)
    if WORLD_SIZE > 1:
        mesh = init_device_mesh(torch.device(cfg.device).type, (copies(cfg), WORLD_SIZE // copies(cfg)),
                                mesh_dim_names=("replicate", "shard"))
        mesh = mesh if copies(cfg) > 1 else mesh["shard"]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def copies(cfg: Config) -> int:
    """Of the model, and so of each gradient: processes that hold the same part of it."""
    return WORLD_SIZE // (cfg.shard_size or WORLD_SIZE)


def wrap_blocks(cfg: Config, model: GPT) -> None:
    for block in model.blocks:  # only the forward function is compiled: names of parameters stay as they are
        if cfg.compile:
            block.forward = torch.compile(block.forward)
        if cfg.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def get_batch(cfg: Config, data: TokenBatches, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        batch = data.get(positions)
    except (OSError, ValueError) as e:
        raise Failure(e, local=True)
    if torch.device(cfg.device).type == "cuda":  # pinned memory, so that the copy runs beside the computation
        return tuple(t.pin_memory().to(cfg.device, non_blocking=True) for t in batch)
    return tuple(t.to(cfg.device) for t in batch)


@torch.no_grad()
def evaluate(cfg: Config, model: GPT, data: TokenBatches, autocast) -> float:
    """Mean loss over the first eval_tokens of the validation data, the same ones on any number of processes."""
    sequences = min(len(data), max(1, cfg.eval_tokens // cfg.block_size))
    total = 0.0
    for first in range(RANK * cfg.batch_size, sequences + RANK * cfg.batch_size, WORLD_SIZE * cfg.batch_size):
        positions = [min(p, sequences - 1) for p in range(first, first + cfg.batch_size)]
        count = max(0, min(cfg.batch_size, sequences - first))
        x, y = get_batch(cfg, data, positions)
        y[count:] = -1  # past the end: computed all the same, since all processes and shapes must agree, not counted
        with autocast:
            total += model(x, y).item() * count
    if WORLD_SIZE > 1:
        total = torch.tensor(total, dtype=torch.float64, device=cfg.device)
        dist.all_reduce(total)
    return float(total) / sequences


# ---- the run's folder

def gather(value) -> list:
    """The values of all processes."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def together(function):
    """Calls it on every process and returns its result; if it fails on one, all fail with what that one says."""
    result = failure = None
    try:
        result = function()
    except Failure as e:
        failure = e
    except OSError as e:
        failure = Failure(e)
    for rank, failure in enumerate(gather(failure)):
        if failure:
            raise Failure(f"process {rank}: {failure}" if rank else failure, failure.status)
    return result


def on_first_process(function) -> None:
    """Calls it on the first process alone; if it fails there, all fail."""
    together(function if RANK == 0 else lambda: None)


def same_everywhere(what: str, value) -> None:
    values = gather(value)
    if len(set(values)) > 1:
        raise Failure(f"{what} differs between processes: {', '.join(f'{v} on {r}' for r, v in enumerate(values))}")


def stop_with_parent() -> None:
    """Ends this process when the torchrun that started it has gone, however that was killed."""
    def watch():
        while os.getppid() == PARENT:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def load_checkpoint(cfg: Config, path: Path, model: GPT) -> dict | None:
    if not cfg.resume or not path.exists():
        return None
    try:
        saved = load(path)
    except ValueError as e:
        raise Failure(f"{e}: put a copy in its place, or start anew with --resume=False")
    before = {**saved["config"], **saved["model_config"]}
    for key, value in {**asdict(cfg), **asdict(model.config)}.items():
        if key in FREE or before.get(key, value) == value or key == "data_dir" and cfg.change_data:
            continue
        other = "go on with it with --change_data=True, " if key == "data_dir" else ""
        raise Failure(f"{key} is {value!r}, but {path} was made with {before[key]!r}: go on with that, {other}or start anew "
                      "with --resume=False or in another --out_dir", 2)
    return saved


def load_weights(cfg: Config, model: GPT) -> None:
    try:
        saved = load(Path(cfg.init_from))
    except ValueError as e:
        raise Failure(f"init_from: {e}", 2)
    for key, value in asdict(model.config).items():
        if saved["model_config"][key] != value and key != "block_size":
            raise Failure(f"{key} is {value!r}, but {cfg.init_from} was made with {saved['model_config'][key]!r}", 2)
    restore(saved, model)


def save_checkpoint(cfg: Config, path: Path, model: GPT, optimizer, step: int, train_time: float, data_step: int) -> None:
    """The optimizer is in eval mode, so the model in the checkpoint is x."""
    content = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "model_config": asdict(model.config),
               "config": asdict(cfg), "step": step, "tokens": step * cfg.total_batch_tokens, "train_time_s": train_time,
               "data_step": data_step}
    together(lambda: save(path, content, first=RANK == 0))


def start_folder(cfg: Config, out_dir: Path, step: int) -> None:
    """Leaves in the folder what belongs to the first `step` steps of this run."""
    log, ckpt = out_dir / "log.jsonl", out_dir / "ckpt.pt"
    if step == 0 and ckpt.exists():
        print(f"replacing the run in {out_dir} ({ckpt.stat().st_size / 1e6:.1f} MB of checkpoint, and its log)")
        ckpt.unlink()
    lines = []
    if step and log.exists():
        for line in log.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # the last line may have been cut by a kill
                if json.loads(line)["step"] <= step:
                    lines.append(line.rstrip() + b"\n")
    write_atomically(log, lambda file: file.writelines(lines))
    text = json.dumps(asdict(cfg), indent=1) + "\n"
    write_atomically(out_dir / "config.json", lambda file: file.write(text.encode()))


# ---- the run

def report(cfg: Config, model: GPT, steps: int) -> str:
    total, hidden = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.hidden_matrices())
    words = 5 if cfg.optimizer == "schedulefree_plus" else 4  # weight, gradient, state
    memory = 4 * (words * total - hidden * (cfg.optimizer in ("normuon", "muon"))) * copies(cfg) / WORLD_SIZE
    device = torch.cuda.get_device_name() if cfg.device.startswith("cuda") else cfg.device
    accumulation = cfg.total_batch_tokens // (cfg.batch_size * cfg.block_size * WORLD_SIZE)
    length = (f"{steps} steps, {steps * cfg.total_batch_tokens / (20 * total):.2f} times 20 tokens per parameter"
              if steps else "until it is stopped")
    return (f"device           {device}, {cfg.dtype}, {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)}\n"
            f"parameters       {total:,}, of which {hidden:,} in hidden matrices\n"
            f"tokens per step  {cfg.total_batch_tokens:,} in {accumulation} accumulation step{'s' * (accumulation > 1)}\n"
            f"length           {length}\n"
            f"memory           {memory / 1e9:.3g} GB per process for weights, gradients and state, before activations")


def peak_flops(cfg: Config) -> float | None:
    if cfg.device.startswith("cuda") and cfg.dtype == "bfloat16":
        name = torch.cuda.get_device_name()
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def sample(cfg: Config, model: GPT, meta: dict, tokens: int = 300) -> str:
    """A text from the start of a document. All processes must call it."""
    try:
        tokenizer = get_tokenizer(meta["tokenizer"])
    except Exception as e:
        return f"(no sample, since the tokenizer {meta['tokenizer']} could not be loaded: {type(e).__name__})"
    start = torch.full((1, 1), tokenizer.eot, device=cfg.device)
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    with torch.compiler.set_stance("force_eager"):  # every length would be compiled
        idx = model.generate(start, tokens, temperature=0.8, top_k=50, vocab_size=tokenizer.vocab_size, generator=generator)
    return tokenizer.decode(idx[0, 1:].tolist())


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__ + "\n" + inspect.getsource(Config))
        return
    cfg = parse(argv)
    device_type = torch.device(cfg.device).type
    if WORLD_SIZE > 1:
        stop_with_parent()
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # gloo exchanges in a roundabout way
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    autocast = torch.autocast(device_type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")

    train_data, val_data, meta, vocab_size = together(lambda: open_data(cfg))
    same_everywhere(f"{cfg.data_dir} (tokenizer, vocab_size, sequences for training and validation)",
                    (meta["tokenizer"], meta["vocab_size"], len(train_data), len(val_data)))
    model = build_model(cfg, vocab_size)
    optimizer = build_optimizer(cfg, model)
    schedule_free = hasattr(optimizer, "eval")
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    params = list(model.parameters())
    steps = max(1, cfg.max_tokens // cfg.total_batch_tokens) if cfg.max_tokens else 0

    out_dir = Path(cfg.out_dir)
    ckpt = out_dir / "ckpt.pt"
    on_first_process(lambda: lock(out_dir))
    saved, step, train_time = together(lambda: load_checkpoint(cfg, ckpt, model)), 0, 0.0
    same_everywhere(f"the step of {ckpt}, which all nodes must share,", saved and saved["step"])
    data_step, old_data = 0, None  # the step before the first on this data_dir
    if saved:
        restore(saved, model, optimizer)
        step, train_time, data_step = saved["step"], saved["train_time_s"], saved.get("data_step", 0)
        if saved["config"]["data_dir"] != cfg.data_dir:
            data_step, old_data = step, saved["config"]["data_dir"]
        del saved
    elif cfg.init_from:
        together(lambda: load_weights(cfg, model))
    if steps and step >= steps:
        return say(f"{out_dir} is finished: {step} steps are in {ckpt}. More: --max_tokens=... Anew: --resume=False")
    on_first_process(lambda: start_folder(cfg, out_dir, step))
    say(report(cfg, model, steps))
    if step:
        say(f"going on from {ckpt} at step {step}")

    stop = []  # signals that asked for it
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # the last one is how Slurm warns
        signal.signal(number, lambda received, frame: stop.append(received))
    if schedule_free:
        optimizer.train()
    sequences = cfg.total_batch_tokens // cfg.block_size  # in a step, over all processes
    accumulation = sequences // (cfg.batch_size * WORLD_SIZE)
    flops, peak = model.flops_per_token(), peak_flops(cfg)
    log = open(out_dir / "log.jsonl", "ab", buffering=0) if RANK == 0 else None
    bar = tqdm(total=steps * cfg.total_batch_tokens or None, initial=step * cfg.total_batch_tokens, unit="tok",
               unit_scale=True, disable=RANK > 0, mininterval=0.5 if sys.stderr.isatty() else 15)
    if old_data:
        write(log, step=step + 1, tokens=step * cfg.total_batch_tokens, data_dir=cfg.data_dir, old_data_dir=old_data)
    first_step, logged_step, logged_time = step + 1, step, 0.0
    clock = time.perf_counter()
    while True:
        step += 1
        # One step: the gradient at y, over micro-batches and processes
        loss = torch.zeros((), device=cfg.device)
        for micro in range(accumulation):
            first = (step - 1 - data_step) * sequences + (micro * WORLD_SIZE + RANK) * cfg.batch_size
            x, y = get_batch(cfg, train_data, range(first, first + cfg.batch_size))
            with autocast:
                micro_loss = model(x, y) / accumulation
            micro_loss.backward()  # processes are averaged by fully_shard
            loss += micro_loss.detach()
        grads = local([p.grad for p in params])
        squares = torch.stack(torch._foreach_norm(grads)).square().sum() / copies(cfg)
        stats = torch.stack([loss / WORLD_SIZE, squares, torch.tensor(float(bool(stop)), device=cfg.device)])
        if WORLD_SIZE > 1:
            dist.all_reduce(stats)
        loss, squares, stopping = stats.tolist()
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Failure(f"step {step}: loss {loss}, norm of the gradient {norm}: stopped before the step was taken; "
                          f"the last checkpoint, if there is one, is {ckpt}")
        if cfg.grad_clip and norm > cfg.grad_clip:
            torch._foreach_mul_(grads, cfg.grad_clip / norm)
        factor = lr_factor(cfg, step, steps)
        if not schedule_free:  # those warm up by themselves
            for group, lr in zip(optimizer.param_groups, base_lrs):
                group["lr"] = lr * factor
        optimizer.step(lambda: loss)  # only schedulefree_plus asks
        model.zero_grad()

        seconds = time.perf_counter() - clock
        # The first step compiles, so it is counted as long as the second.
        train_time += 0 if step == first_step else 2 * seconds if step == first_step + 1 else seconds
        logged_time += seconds
        tokens, last = step * cfg.total_batch_tokens, step == steps
        bar.set_description(f"step {step} loss {loss:.4f}", refresh=False)
        bar.update(cfg.total_batch_tokens)
        if step % cfg.log_interval == 0 or last:
            speed = (step - logged_step) * cfg.total_batch_tokens / logged_time
            mfu = {"mfu": speed * flops / (peak * WORLD_SIZE)} if peak else {}
            write(log, step=step, tokens=tokens, loss=loss, lr=cfg.lr * factor, grad_norm=norm, tokens_per_second=speed, **mfu)
            logged_step, logged_time = step, 0.0
        evaluating = step % cfg.eval_interval == 0 or last
        saving = step % cfg.checkpoint_interval == 0 or last or stopping
        if evaluating or saving:
            if schedule_free:
                optimizer.eval()
            if evaluating:
                val_loss = evaluate(cfg, model, val_data, autocast)
                if not math.isfinite(val_loss):
                    raise Failure(f"step {step}: validation loss {val_loss}: stopped before a checkpoint was written")
                write(log, step=step, tokens=tokens, val_loss=val_loss, train_time_s=train_time, **steady_state(cfg, optimizer))
                if RANK == 0:
                    tqdm.write(f"step {step}: validation loss {val_loss:.4f}, {train_time:.0f} s of training")
            if saving:
                save_checkpoint(cfg, ckpt, model, optimizer, step, train_time, data_step)
            if last or stopping:
                break
            if schedule_free:
                optimizer.train()
        if step == first_step or evaluating:  # never in the middle of a step
            gc.collect()
            gc.freeze()
            gc.disable()
        clock = time.perf_counter()
    bar.close()
    if last:
        with autocast:
            text = sample(cfg, model, meta)
        say(f"\n{text}\n\nfinished: the model is in {ckpt}, its figures are in {out_dir / 'log.jsonl'}")
    else:
        say(f"stopped after step {step}: the model is in {ckpt}, and the same command goes on from there")


def steady_state(cfg: Config, optimizer) -> dict:
    """Means over the matrices of the paper's diagnostics."""
    if cfg.optimizer != "sf_normuon":
        return {}
    values = optimizer.diagnostics().values()
    rho, alpha, predicted = (sum(v[key] for v in values) / len(values) for key in ("rho", "alpha", "predicted"))
    return {"rho": rho, "alpha": alpha, "lambda_rho": cfg.weight_decay * rho, "lambda_rho_predicted": predicted}


def write(log, **values) -> None:
    if log:
        try:
            log.write(json.dumps(values).encode() + b"\n")
        except OSError as e:
            raise Failure(f"{log.name} could not be written: {e}", local=True)


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the sample may have characters that the terminal has not
    status, message = 0, None
    try:
        main(sys.argv[1:])
    except Failure as e:
        status, message = e.status, str(e)
        if RANK and not e.local:  # the first process says it; do not let torchrun end that one before it does
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 if dist.is_torchelastic_launched() else 0)
            message = None
    except OSError as e:
        status, message = 1, str(e)
    except (RuntimeError, MemoryError) as e:
        status = 1
        if isinstance(e, MemoryError) or "memory" in str(e):
            message = f"out of memory: lower batch_size, or give --activation_checkpointing=True ({str(e).splitlines()[0]})"
        elif isinstance(e, dist.DistError) or "gloo" in str(e):
            message = f"process {RANK} stopped, because another one has gone"
        else:
            raise
    if message:
        lead = "\n" * (RANK > 0)  # the first process's progress bar may be on the line
        tqdm.write(f"{lead}train.py: {message}", file=sys.stderr)
        sys.stderr.flush()
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        if not status:
            dist.destroy_process_group()
        if status or gloo:  # without waiting for the others; gloo's threads sometimes abort an ordinary exit
            sys.stdout.flush()
            os._exit(status)
    sys.exit(status)
