"""Trains a language model: data, model, optimizer, evaluation, checkpoints and log in one loop.

    python train.py configs/quickstart.py                                        one process, CPU or GPU
    python train.py configs/125m_sf.py --max_tokens=10e9 --lr=0.01               --knob=value wins over the config
    torchrun --standalone --nproc_per_node=8 train.py configs/772m_sf.py         many processes, same mathematics
    python train.py configs/125m_sf.py --eval_only --data_dir=data/mine          validation loss of the checkpoint
    python train.py --help                                                       all knobs

The same command given again goes on from the last checkpoint. Ctrl-C, SIGTERM and SIGUSR1 write one and stop.
"""
import functools
import gc
import inspect
import json
import logging
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

PARENT = os.getppid()  # before the imports that take seconds, in which a torchrun can be killed
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait by spinning slow a busy CPU down by a factor of 20
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop takes over, Ctrl-C just ends the process

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from baselines import build_optimizer
from checkpoint import load, lock, restore, save
from config import MAY_CHANGE, SCHEDULE_FREE, Config, parse
from data import TokenBatches, read_meta, write_atomically
from model import GPT, GPTConfig
from prepare_fineweb import get_tokenizer, prepare_stdlib
from distributed import (RANK, WORLD_SIZE, Failure, gather, on_first_process, run, same_everywhere, say, stop_with_parent,
                       together)
from sf_normuon import local

QUICKSTART_DATA = "data/stdlib"  # the only folder that is made when it is missing
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "B200": 2250e12,
              "L40S": 362e12, "RTX 4090": 165e12}  # of bfloat16 products, dense, by a part of the card's name


# ---- the parts

@dataclass
class Progress:
    step: int = 0
    train_time_s: float = 0.0  # without evaluation, checkpoints and compilation
    data_step: int = 0  # the step before the first on this data_dir


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
        train, val = (TokenBatches(cfg.data_dir, split, cfg.block_size, vocab_size, cfg.seed)
                      for split in ("val" if cfg.eval_only else "train", "val"))
    except (OSError, ValueError) as e:
        raise Failure(e, 2 if isinstance(e, FileNotFoundError) else 1)
    return train, val, meta, vocab_size


def build_model(cfg: Config, vocab_size: int) -> GPT:
    """The weights are drawn on the CPU, so that they are the same on every device and number of processes."""
    torch.manual_seed(cfg.seed)
    try:
        model = GPT(GPTConfig(vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)).to(cfg.device)
    except ValueError as e:
        raise Failure(e, 2)
    compile_and_checkpoint(cfg, model)
    if WORLD_SIZE > 1:
        mesh = init_device_mesh(torch.device(cfg.device).type, (replicas(cfg), WORLD_SIZE // replicas(cfg)),
                                mesh_dim_names=("replicate", "shard"))
        mesh = mesh if replicas(cfg) > 1 else mesh["shard"]
        # Autocast would gather float32 and keep a bfloat16 copy of all blocks on every process until the backward pass.
        policy = MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    return model


def replicas(cfg: Config) -> int:
    """How many times the processes together hold the model, and so each row of a gradient."""
    return WORLD_SIZE // (cfg.shard_size or WORLD_SIZE)


def compile_and_checkpoint(cfg: Config, model: GPT) -> None:
    if cfg.compile:
        model.cross_entropy = torch.compile(model.cross_entropy)
    for block in model.blocks:  # only the forward function is compiled: names of parameters stay as they are
        if cfg.compile:
            block.forward = torch.compile(block.forward)
        if cfg.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def autocast(cfg: Config):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def get_batch(cfg: Config, data: TokenBatches, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        batch = data.get(positions)
    except (OSError, ValueError) as e:
        raise Failure(e, local=True)
    if torch.device(cfg.device).type == "cuda":  # pinned memory, so that this process need not wait for the copy
        return tuple(t.pin_memory().to(cfg.device, non_blocking=True) for t in batch)
    return tuple(t.to(cfg.device) for t in batch)


def gradient(cfg: Config, model: GPT, data: TokenBatches, batch: int, stop: bool = False) -> tuple[float, float, bool]:
    """Fills p.grad with the clipped gradient of the mean loss over the global batch number `batch`, from 0. Returns that
    loss, the norm before clipping, and whether any process has `stop`, which travels in the same all-reduce."""
    sequences = cfg.total_batch_tokens // cfg.block_size  # over all processes
    accumulation = sequences // (cfg.batch_size * WORLD_SIZE)
    loss = torch.zeros((), device=cfg.device)
    for micro in range(accumulation):
        first = batch * sequences + (micro * WORLD_SIZE + RANK) * cfg.batch_size
        x, y = get_batch(cfg, data, range(first, first + cfg.batch_size))
        with autocast(cfg):
            micro_loss = model(x, y) / accumulation
        micro_loss.backward()  # processes are averaged by fully_shard
        loss += micro_loss.detach()
    grads = [local(p.grad) for p in model.parameters()]
    squares = torch.stack(torch._foreach_norm(grads)).square().sum() / replicas(cfg)
    stats = torch.stack([loss / WORLD_SIZE, squares, torch.tensor(float(stop), device=cfg.device)])
    if WORLD_SIZE > 1:
        dist.all_reduce(stats)
    loss, squares, stopping = stats.tolist()
    norm = math.sqrt(squares)
    if 0 < cfg.grad_clip < norm < math.inf:
        torch._foreach_mul_(grads, cfg.grad_clip / norm)
    return loss, norm, bool(stopping)


def take_step(cfg: Config, model: GPT, optimizer, lrs: list[float], data: TokenBatches, now: Progress,
              stop: bool) -> tuple[float, float, bool]:
    """Step now.step. Returns what `gradient` does. lrs: of the groups, for what does not warm up by itself."""
    loss, norm, stopping = gradient(cfg, model, data, now.step - 1 - now.data_step, stop)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Failure(f"step {now.step}: loss {loss}, norm of the gradient {norm}: stopped before the step was taken; "
                      f"the last checkpoint, if there is one, is {Path(cfg.out_dir) / 'ckpt.pt'}")
    if cfg.optimizer not in SCHEDULE_FREE:
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr
    optimizer.step(lambda: loss)  # only schedulefree_plus asks
    model.zero_grad()
    return loss, norm, stopping


@torch.no_grad()
def evaluate(cfg: Config, model: GPT, data: TokenBatches) -> float:
    """Mean loss over the first eval_tokens of the validation data, the same ones on any number of processes."""
    sequences = eval_sequences(cfg, data)
    total = 0.0
    for first in range(RANK * cfg.batch_size, sequences + RANK * cfg.batch_size, WORLD_SIZE * cfg.batch_size):
        positions = [min(p, sequences - 1) for p in range(first, first + cfg.batch_size)]
        count = max(0, min(cfg.batch_size, sequences - first))
        x, y = get_batch(cfg, data, positions)
        y[count:] = -1  # past the end: computed all the same, since all processes and shapes must agree, not counted
        with autocast(cfg):
            total += model(x, y).item() * count
    if WORLD_SIZE > 1:
        model.reshard()  # the embedding would stay gathered, and with it x, in the forward pass of the next step
        total = torch.tensor(total, dtype=torch.float64, device=cfg.device)
        dist.all_reduce(total)
    return float(total) / sequences


def eval_sequences(cfg: Config, data: TokenBatches) -> int:
    return min(len(data), max(1, cfg.eval_tokens // cfg.block_size))


def bits_per_byte(cfg: Config, data: TokenBatches, tokenizer, loss: float) -> float:
    """Of the evaluated tokens, from their mean loss in nats: comparable between tokenizers. The end-of-text token has
    no bytes, but its loss counts."""
    lengths = np.zeros(data.vocab_size, np.int64)
    lengths[:tokenizer.vocab_size] = [len(symbol) for symbol in tokenizer.symbols]
    lengths[tokenizer.eot] = 0
    sequences = eval_sequences(cfg, data)
    size = sum(lengths[data.get(range(i, min(i + 64, sequences)))[1]].sum() for i in range(0, sequences, 64))
    return loss * sequences * cfg.block_size / math.log(2) / size


# ---- the run's folder

def load_checkpoint(cfg: Config, path: Path, model: GPT, optimizer) -> dict | None:
    if not cfg.resume or not path.exists():
        return None
    way_out = "put a copy in its place, or start anew with --resume=False"
    try:
        saved = load(path)
    except (OSError, ValueError) as e:
        raise Failure(f"{e}: {way_out}")
    before = {**saved["config"], **saved["model_config"]}
    for key, value in {**asdict(cfg), **asdict(model.config)}.items():
        if key in MAY_CHANGE or before.get(key, value) == value or key == "data_dir" and cfg.change_data:
            continue
        other = "go on with it with --change_data=True, " if key == "data_dir" else ""
        raise Failure(f"{key} is {value!r}, but {path} was made with {before[key]!r}: go on with that, {other}or start anew "
                      "with --resume=False or in another --out_dir", 2)
    try:
        restore(saved, model, optimizer)
    except ValueError as e:
        raise Failure(f"{path}: {e}: {way_out}")
    return saved


def load_weights(cfg: Config, model: GPT, tokenizer: str) -> dict:
    try:
        saved = load(Path(cfg.init_from))
    except (OSError, ValueError) as e:
        raise Failure(e, 2 if isinstance(e, FileNotFoundError) else 1)
    if saved.get("tokenizer", tokenizer) != tokenizer:
        raise Failure(f"{cfg.init_from} is made of {saved['tokenizer']} tokens, {cfg.data_dir} of {tokenizer} tokens", 2)
    for key, value in asdict(model.config).items():
        if key != "block_size" and (other := saved["model_config"].get(key)) != value:
            raise Failure(f"{key} is {value!r}, but {cfg.init_from} was made with {other!r}: give its config", 2)
    try:
        restore(saved, model)
    except ValueError as e:
        raise Failure(f"{cfg.init_from}: {e}")
    return saved


def resume(cfg: Config, model: GPT, optimizer, tokenizer: str) -> Progress:
    """Puts the model and the optimizer where the checkpoint left them, or the model where init_from did."""
    ckpt = Path(cfg.out_dir) / "ckpt.pt"
    saved = together(lambda: load_checkpoint(cfg, ckpt, model, optimizer))
    same_everywhere(f"the step of {ckpt}, which all nodes must share,", saved and saved["step"])
    if saved:
        changed = saved["config"]["data_dir"] != cfg.data_dir
        return Progress(saved["step"], saved["train_time_s"], saved["step"] if changed else saved.get("data_step", 0))
    if cfg.init_from:
        together(lambda: load_weights(cfg, model, tokenizer))
    return Progress()


def save_checkpoint(cfg: Config, model: GPT, optimizer, tokenizer: str, now: Progress) -> None:
    """The optimizer is in eval mode, so the model in the checkpoint is x."""
    content = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "model_config": asdict(model.config),
               "config": asdict(cfg), "tokenizer": tokenizer, **asdict(now), "tokens": now.step * cfg.total_batch_tokens}
    together(lambda: save(Path(cfg.out_dir) / "ckpt.pt", content, first=RANK == 0))


def start_folder(cfg: Config, step: int) -> None:
    """Leaves in the folder what belongs to the first `step` steps of this run."""
    out_dir = Path(cfg.out_dir)
    log, ckpt = out_dir / "log.jsonl", out_dir / "ckpt.pt"
    if step == 0 and ckpt.exists():
        print(f"replacing the run in {out_dir} ({ckpt.stat().st_size / 1e6:.1f} MB of checkpoint, and its log)")
        ckpt.unlink()
    lines = []
    if step and log.exists():
        for line in log.read_bytes().splitlines():
            with suppress(ValueError):  # the last line may have been cut by a kill
                if json.loads(line)["step"] <= step:
                    lines.append(line.rstrip() + b"\n")
    write_atomically(log, lambda file: file.writelines(lines))
    text = json.dumps(asdict(cfg), indent=1) + "\n"
    write_atomically(out_dir / "config.json", lambda file: file.write(text.encode()))


# ---- the run

def report(cfg: Config, model: GPT, steps: int) -> str:
    total, hidden = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.hidden_matrices())
    words = 5 if cfg.optimizer == "schedulefree_plus" else 4  # weight, gradient, state
    memory = 4 * (words * total - hidden * (cfg.optimizer in ("normuon", "muon"))) * replicas(cfg) / WORLD_SIZE
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


def load_tokenizer(meta: dict):
    """None, and a line that says so, if it cannot be had."""
    try:
        return get_tokenizer(meta["tokenizer"])
    except Exception as e:
        say(f"(the tokenizer {meta['tokenizer']} could not be loaded: {type(e).__name__})")


def sample(cfg: Config, model: GPT, meta: dict, tokens: int = 300) -> str:
    """A text from the start of a document, of so many tokens on all processes, which must all call it."""
    tokenizer = load_tokenizer(meta)
    if None in gather(tokenizer and tokenizer.name):
        return ""
    start = torch.full((1, 1), tokenizer.eot, device=cfg.device)
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    with autocast(cfg), torch.compiler.set_stance("force_eager"):  # every length would be compiled
        idx = model.generate(start, tokens, temperature=0.8, top_k=50, vocab_size=tokenizer.vocab_size, generator=generator)
    return tokenizer.decode(idx[0, 1:].tolist())


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__ + "\n" + inspect.getsource(Config))
        return
    cfg = parse(argv)
    if WORLD_SIZE > 1:
        stop_with_parent(PARENT)
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # gloo exchanges in a roundabout way
        dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo", timeout=timedelta(minutes=10))
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left

    train_data, val_data, meta, vocab_size = together(lambda: open_data(cfg))
    same_everywhere(f"{cfg.data_dir} (tokenizer, vocab_size, sequences for training and validation)",
                    (meta["tokenizer"], meta["vocab_size"], len(train_data), len(val_data)))
    model = build_model(cfg, vocab_size)
    if cfg.eval_only:
        return print_evaluation(cfg, model, val_data, meta)
    try:
        optimizer = build_optimizer(cfg, model)
    except ValueError as e:
        raise Failure(e, 2)
    lrs = [group["lr"] for group in optimizer.param_groups]
    steps = max(1, cfg.max_tokens // cfg.total_batch_tokens) if cfg.max_tokens else 0

    out_dir = Path(cfg.out_dir)
    on_first_process(lambda: lock(out_dir))
    now = resume(cfg, model, optimizer, meta["tokenizer"])
    if steps and now.step >= steps:
        return say(f"{out_dir} is finished: {now.step} steps are in {out_dir / 'ckpt.pt'}. More: --max_tokens=... "
                   "Anew: --resume=False")
    on_first_process(lambda: start_folder(cfg, now.step))
    say(report(cfg, model, steps))
    if now.step:
        say(f"going on from {out_dir / 'ckpt.pt'} at step {now.step}")
    train(cfg, model, optimizer, lrs, train_data, val_data, meta["tokenizer"], now, steps)
    if now.step == steps:
        text = sample(cfg, model, meta)
        say(f"\n{text}\n\nfinished: the model is in {out_dir / 'ckpt.pt'}, its figures are in {out_dir / 'log.jsonl'}")
    else:
        say(f"stopped after step {now.step}: the model is in {out_dir / 'ckpt.pt'}, and the same command goes on from there")


def train(cfg: Config, model: GPT, optimizer, lrs: list[float], train_data: TokenBatches, val_data: TokenBatches,
          tokenizer: str, now: Progress, steps: int) -> None:
    """From `now` to step `steps`, or until a signal. lrs: of the optimizer's groups, before the schedule."""
    stop = []  # signals that asked for it
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # the last one is how Slurm warns
        signal.signal(number, lambda received, frame: stop.append(received))
    if averages := hasattr(optimizer, "eval"):
        optimizer.train()
    flops, peak = model.flops_per_token(), peak_flops(cfg)
    log = open(Path(cfg.out_dir) / "log.jsonl", "ab", buffering=0) if RANK == 0 else None
    bar = tqdm(total=steps * cfg.total_batch_tokens or None, initial=now.step * cfg.total_batch_tokens, unit="tok",
               unit_scale=True, disable=RANK > 0, mininterval=0.5 if sys.stderr.isatty() else 15)
    if 0 < now.step == now.data_step:  # other data from here on; a line of the next step, so that a new start cuts it
        write(log, step=now.step + 1, tokens=now.step * cfg.total_batch_tokens, data_dir=cfg.data_dir)
    first_step, logged_step, logged_time = now.step + 1, now.step, 0.0
    clock = time.perf_counter()
    while True:
        now.step += 1
        factor = lr_factor(cfg, now.step, steps)
        loss, norm, stopping = take_step(cfg, model, optimizer, [lr * factor for lr in lrs], train_data, now, bool(stop))
        seconds = time.perf_counter() - clock
        # The first step compiles, so it is counted as long as the second.
        now.train_time_s += 0 if now.step == first_step else 2 * seconds if now.step == first_step + 1 else seconds
        logged_time += seconds
        tokens, last = now.step * cfg.total_batch_tokens, now.step == steps
        bar.set_description(f"step {now.step} loss {loss:.4f}", refresh=False)
        bar.update(cfg.total_batch_tokens)
        if now.step % cfg.log_interval == 0 or last:
            speed = (now.step - logged_step) * cfg.total_batch_tokens / logged_time
            mfu = {"mfu": speed * flops / (peak * WORLD_SIZE)} if peak else {}
            write(log, step=now.step, tokens=tokens, loss=loss, lr=cfg.lr * factor, grad_norm=norm, tokens_per_second=speed,
                  **mfu)
            logged_step, logged_time = now.step, 0.0
        evaluating = now.step % cfg.eval_interval == 0 or last
        saving = now.step % cfg.checkpoint_interval == 0 or last or stopping
        if averages and (evaluating or saving):
            optimizer.eval()
        if evaluating:
            val_loss = evaluate(cfg, model, val_data)
            if not math.isfinite(val_loss):
                raise Failure(f"step {now.step}: validation loss {val_loss}: stopped before a checkpoint was written")
            write(log, step=now.step, tokens=tokens, val_loss=val_loss, train_time_s=now.train_time_s,
                  **steady_state(cfg, optimizer))
            if RANK == 0:
                tqdm.write(f"step {now.step}: validation loss {val_loss:.4f}, {now.train_time_s:.0f} s of training")
        if saving:
            save_checkpoint(cfg, model, optimizer, tokenizer, now)
        if last or stopping:
            return bar.close()
        if averages:
            optimizer.train()
        if now.step == first_step or evaluating:  # here, so that garbage is never collected in the middle of a step
            gc.collect()
            gc.freeze()
            gc.disable()
        clock = time.perf_counter()


def print_evaluation(cfg: Config, model: GPT, data: TokenBatches, meta: dict) -> None:
    """Of a checkpoint. Writes nothing."""
    cfg.init_from = cfg.init_from or str(Path(cfg.out_dir) / "ckpt.pt")
    saved = together(lambda: load_weights(cfg, model, meta["tokenizer"]))
    loss = evaluate(cfg, model, data)
    if not math.isfinite(loss):
        raise Failure(f"{cfg.init_from} is damaged, take an earlier copy: its validation loss is {loss}")
    say(f"{cfg.init_from}, step {saved['step']}, on {eval_sequences(cfg, data) * cfg.block_size:,} tokens of {cfg.data_dir}\n"
        f"validation loss  {loss:.6f} nats per token\nperplexity       {math.exp(min(loss, 700)):.6f}")
    if RANK == 0 and (tokenizer := load_tokenizer(meta)):
        say(f"bits per byte    {bits_per_byte(cfg, data, tokenizer, loss):.6f}")


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


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the sample may have characters that the terminal has not
    run(main, sys.argv[1:])
