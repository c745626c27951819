"""Trains a language model: batches, forward, backward, clip, rate, step, log, evaluate, save.

    python train.py configs/quickstart.py                                   one process, CPU or GPU
    python train.py configs/125m_sf.py --max_tokens=10e9 --lr=0.01          --knob=value wins
    torchrun --standalone --nproc_per_node=8 train.py configs/772m_sf.py    the same mathematics
    python train.py configs/125m_sf.py --eval_only --data_dir=data/mine     the checkpoint's loss
    python train.py --help                                                  all knobs

The same command given again goes on from the last checkpoint. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP
write one and stop; a second Ctrl-C stops at once.
"""
import copy
import functools
import gc
import inspect
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

PARENT = os.getppid()  # before the slow imports, during which torchrun may be killed
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # spinning threads slow a busy CPU down 20 times
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop: Ctrl-C just ends the process

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from baselines import OPTIMIZERS, build_optimizer
from checkpoint import Progress, append, lock, resume, save_checkpoint, start
from config import Config, parse
from data import TokenBatches, read_meta
from distributed import (RANK, WORLD_SIZE, Failure, on_first_process, outlive, run, same_everywhere,
                         say, stop_with_parent, together)
from evaluate import autocast, eval_range, evaluate, get_batch, print_evaluation, sample
from model import GPT, GPTConfig
from prepare_fineweb import prepare_stdlib
from sf_normuon import local, param_groups
from state import rows

QUICKSTART_DATA = "data/stdlib"  # the only folder that is made when it is missing
PEAK_FLOPS = {  # dense bfloat16 FLOP/s: of the first entry whose words are all in the card's name
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090 D": 147e12, "RTX 4090": 165e12}


# ---- data

def open_data(cfg: Config) -> tuple[TokenBatches, TokenBatches, dict, int]:
    """Training and validation sequences, what meta.json says, and the model's vocab_size."""
    if cfg.data_dir == QUICKSTART_DATA and not Path(cfg.data_dir).exists():
        prepare_stdlib(cfg.data_dir)
    meta = read_meta(cfg.data_dir)
    words = meta["vocab_size"]
    vocab_size = cfg.vocab_size or -(-words // 64) * 64
    if vocab_size < words:
        raise Failure(f"vocab_size {vocab_size} is smaller than the {words} of {cfg.data_dir}", 2)
    train_data, val_data = (
        TokenBatches(cfg.data_dir, split, cfg.block_size, vocab_size, cfg.seed)
        for split in ("val" if cfg.eval_only else "train", "val"))
    eval_range(cfg, val_data)  # raises here what it would raise after eval_interval steps
    return train_data, val_data, meta, vocab_size


def shard_names(*splits: TokenBatches) -> dict[str, int]:
    """The tokens of each shard by the name of its file, by which a resumed run knows its data."""
    return {Path(path).name: n for data in splits for path, n in data.lengths.items()}


# ---- model

def build_model(cfg: Config, vocab_size: int) -> GPT:
    """A GPT on the device, sharded over the processes, with the same weights on any number of them.

    Each weight is drawn whole on the CPU, one after another, and every process keeps its rows.
    """
    torch.manual_seed(cfg.seed)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    compile_and_checkpoint(cfg, model)
    # A GPT made on the CPU draws torch's default weights first. Repeated here: a seed then gives
    # the same weights both ways.
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            copy.deepcopy(layer).to_empty(device="cpu").reset_parameters()
    if WORLD_SIZE > 1:
        shape = replicas(cfg), WORLD_SIZE // replicas(cfg)
        mesh = init_device_mesh(torch.device(cfg.device).type, shape,
                                mesh_dim_names=("replicate", "shard"))
        mesh = mesh if replicas(cfg) > 1 else mesh["shard"]
        # Autocast would gather float32 and keep bfloat16 copies until the backward pass.
        policy = MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32,
                                      cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=cfg.device)
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        model.initialize(name, whole)
        local(p.detach()).copy_(rows(whole, p))
    return model


def replicas(cfg: Config) -> int:
    """The number of copies of the model, each sharded over shard_size processes."""
    return WORLD_SIZE // (cfg.shard_size or WORLD_SIZE)


def compile_and_checkpoint(cfg: Config, model: GPT) -> None:
    if cfg.compile:
        model.softmax_ = torch.compile(model.softmax_)
    for block in model.blocks:  # only the forward function: names of parameters stay as they are
        if cfg.compile:
            block.forward = torch.compile(block.forward)
        if cfg.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ---- learning rate and reports

def lr_factor(cfg: Config, step: int, steps: int) -> float:
    """What multiplies lr at step 1, 2, ..., steps. Schedule-free optimizers warm up by themselves:
    theirs is for the log."""
    if step <= cfg.warmup_steps:
        return step / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    match cfg.schedule:
        case "constant":
            return 1.0
        case "cosine":
            cosine = (1 + math.cos(math.pi * progress)) / 2
            return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine
        case "linear":
            return 1 - progress
        case "wsd":  # constant, then linear to zero over the last fifth
            return min(1.0, (steps - step) / (0.2 * steps))


def peak_flops(cfg: Config) -> float | None:
    """Peak bfloat16 FLOP per second of this card by its name; None if unknown, or a MIG slice."""
    if not cfg.device.startswith("cuda") or cfg.dtype != "bfloat16":
        return None
    words = {*re.split(r"[^A-Za-z0-9]+", torch.cuda.get_device_name())}
    known = (flops for name, flops in PEAK_FLOPS.items() if {*name.split()} <= words)
    return None if "MIG" in words else next(known, None)


def steady_state(cfg: Config, optimizer) -> dict[str, float]:
    """Means over the matrices of the paper's diagnostics, for optimizers that have them."""
    if not hasattr(optimizer, "diagnostics") or not (values := optimizer.diagnostics().values()):
        return {}
    rho, alpha, predicted = (sum(v[key] for v in values) / len(values)
                             for key in ("rho", "alpha", "predicted"))
    return {"rho": rho, "alpha": alpha, "lambda_rho": cfg.weight_decay * rho,
            "lambda_rho_predicted": predicted}


def report(cfg: Config, model: GPT, steps: int) -> str:
    total = sum(p.numel() for p in model.parameters())
    hidden = sum(p.numel() for p in param_groups(model)[0]["params"])
    device = torch.cuda.get_device_name() if cfg.device.startswith("cuda") else cfg.device
    accumulation = cfg.total_batch_tokens // (cfg.batch_size * cfg.block_size * WORLD_SIZE)
    times = steps * cfg.total_batch_tokens / (20 * total)
    length = f"{steps} steps, {times:.2f} times 20 tokens per parameter"
    processes = f"{WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)}"
    return (f"device           {device}, {cfg.dtype}, {processes}\n"
            f"parameters       {total:,}, of which {hidden:,} in hidden matrices\n"
            f"tokens per step  {cfg.total_batch_tokens:,} in {accumulation} accumulation "
            f"step{'s' * (accumulation > 1)}\n"
            f"length           {length if steps else 'until it is stopped'}")


# ---- the loop

def stop_signals() -> list[int]:
    """Returns a list that grows by each signal that asks to stop. A second Ctrl-C ends the process.

    A thread reads them, because Python's handlers wait until a long operation of torch returns.
    """
    # Slurm warns by SIGUSR1; SIGHUP means that the terminal is lost, and nohup ignores it.
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda number, frame: None)
    received, (reader, writer) = [], os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def watch():
        while True:
            received.extend(os.read(reader, 1))
            if received.count(signal.SIGINT) > 1:
                os._exit(128 + signal.SIGINT)
    threading.Thread(target=watch, daemon=True).start()
    # The compilers that this thread starts inherit its mask: torchrun and Ctrl-C signal them too.
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    return received


def train(cfg: Config, model: GPT, optimizer, lrs: list[float], train_data: TokenBatches,
          val_data: TokenBatches, now: Progress, steps: int) -> None:
    """From now.step to step `steps`, or until a signal. lrs: rates of the groups, unscheduled."""
    stop = stop_signals()
    scheduled, averages = OPTIMIZERS[cfg.optimizer].scheduled, hasattr(optimizer, "eval")
    sequences = cfg.total_batch_tokens // cfg.block_size  # of a step, over all processes
    accumulation = sequences // (cfg.batch_size * WORLD_SIZE)
    flops, peak = model.flops_per_token(), peak_flops(cfg)
    log = open(Path(cfg.out_dir) / "log.jsonl", "ab", buffering=0) if RANK == 0 else None
    bar = tqdm(total=steps * cfg.total_batch_tokens or None, unit="tok", unit_scale=True,
               initial=now.step * cfg.total_batch_tokens, disable=RANK > 0,
               mininterval=0.5 if sys.stderr.isatty() else 15)
    if averages:
        optimizer.train()
    first_step, logged_step, logged_time = now.step + 1, now.step, 0.0
    clock = time.perf_counter()
    while True:
        # gradient of the mean loss over the batch of this step
        now.step += 1
        loss = torch.zeros((), device=cfg.device)
        for micro in range(accumulation):
            first = ((now.step - 1 - now.data_step) * sequences
                     + (micro * WORLD_SIZE + RANK) * cfg.batch_size)
            inputs, targets = get_batch(cfg, train_data, range(first, first + cfg.batch_size))
            with autocast(cfg):
                micro_loss = model(inputs, targets) / accumulation
            if replicas(cfg) > 1:  # between copies once a step
                model.set_requires_all_reduce(micro == accumulation - 1)
            micro_loss.backward()  # fully_shard averages over the processes
            loss += micro_loss.detach()
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(grads)).square().sum() / replicas(cfg)
        stats = torch.stack([loss / WORLD_SIZE, squares, squares.new_tensor(len(stop))])
        if WORLD_SIZE > 1:
            dist.all_reduce(stats)
        loss, squares, stopping = stats.tolist()
        norm = math.sqrt(squares)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Failure(f"step {now.step}: loss {loss}, norm of the gradient {norm}: stopped "
                          "before the step was taken; an earlier checkpoint stays as it is")
        if 0 < cfg.grad_clip < norm:
            torch._foreach_mul_(grads, cfg.grad_clip / norm)

        # step
        factor = lr_factor(cfg, now.step, steps)
        if scheduled:
            for group, lr in zip(optimizer.param_groups, lrs):
                group["lr"] = lr * factor
        optimizer.step(lambda: loss)  # only schedulefree_plus asks for the loss
        model.zero_grad()
        del grads  # or they would stay until the next step's are whole

        # log; the first step compiles, so the second counts twice and the first not at all
        seconds = time.perf_counter() - clock
        now.train_time_s += seconds * {first_step: 0, first_step + 1: 2}.get(now.step, 1)
        logged_time += seconds
        tokens, last = now.step * cfg.total_batch_tokens, now.step == steps
        bar.set_description(f"step {now.step} loss {loss:.4f}", refresh=False)
        bar.update(cfg.total_batch_tokens)
        if now.step % cfg.log_interval == 0 or last:
            speed = (now.step - logged_step) * cfg.total_batch_tokens / logged_time
            mfu = {"mfu": speed * flops / (peak * WORLD_SIZE)} if peak else {}
            append(log, step=now.step, tokens=tokens, loss=loss, lr=cfg.lr * factor, grad_norm=norm,
                  tokens_per_second=speed, **mfu)
            logged_step, logged_time = now.step, 0.0

        # evaluate and save the averaged weights
        evaluating = now.step % cfg.eval_interval == 0 or last
        saving = now.step % cfg.checkpoint_interval == 0 or last or stopping
        if averages and (evaluating or saving):
            optimizer.eval()
        if evaluating:
            val_loss = evaluate(cfg, model, val_data)
            if not math.isfinite(val_loss):
                raise Failure(f"step {now.step}: validation loss {val_loss}: stopped unsaved")
            append(log, step=now.step, tokens=tokens, val_loss=val_loss,
                  train_time_s=now.train_time_s, **steady_state(cfg, optimizer))
            if RANK == 0:
                tqdm.write(f"step {now.step}: validation loss {val_loss:.4f}, "
                           f"{now.train_time_s:.0f} s of training")
        if saving:
            save_checkpoint(cfg, model, optimizer, now)
        if last or stopping:
            return bar.close()
        if averages:
            optimizer.train()
        if now.step == first_step or evaluating or saving:  # garbage is never collected in a step
            gc.collect()
            gc.freeze()
            gc.disable()
        clock = time.perf_counter()


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
        return print(__doc__ + "\n" + inspect.getsource(Config))
    cfg = parse(argv)
    if WORLD_SIZE > 1 or dist.is_torchelastic_launched():
        stop_with_parent(PARENT)
    if WORLD_SIZE > 1:
        # gloo's exchanges take a detour that DTensor warns of
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        backend = "nccl" if cfg.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left

    train_data, val_data, meta, vocab_size = together(lambda: open_data(cfg))
    same_everywhere(f"{cfg.data_dir} (tokenizer, vocab_size, training and validation sequences)",
                    (meta["tokenizer"], meta["vocab_size"], len(train_data), len(val_data)))
    try:
        model = build_model(cfg, vocab_size)
        optimizer = build_optimizer(cfg, model)
    except ValueError as e:  # knobs that do not fit together
        raise Failure(e, 2)
    if cfg.eval_only:
        return print_evaluation(cfg, model, val_data, meta)
    lrs = [group["lr"] for group in optimizer.param_groups]
    steps = max(1, cfg.max_tokens // cfg.total_batch_tokens) if cfg.max_tokens else 0

    out_dir = Path(cfg.out_dir)
    ckpt = out_dir / "ckpt.pt"
    on_first_process(lambda: lock(out_dir))
    now = Progress(tokenizer=meta["tokenizer"], shards=shard_names(train_data, val_data))
    resume(cfg, model, optimizer, now)
    if steps and now.step >= steps:
        return say(f"{out_dir} is finished: {now.step} steps are in {ckpt}. "
                   "Train on with a larger --max_tokens, or start over with --resume=False")
    on_first_process(lambda: start(cfg, now))
    say(report(cfg, model, steps))
    if now.step:
        say(f"going on from {ckpt} at step {now.step}")
    train(cfg, model, optimizer, lrs, train_data, val_data, now, steps)
    if now.step == steps:
        say(f"\n{sample(cfg, model, meta)}\n\nfinished: the model is in {ckpt}, its figures are in "
            f"{out_dir / 'log.jsonl'}")
    else:
        say(f"stopped after step {now.step}: the model is in {ckpt}, and the same command goes on "
            "from there")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters of the sample
    outlive(sys.stdout)
    outlive(sys.stderr)
    run(main, sys.argv[1:])
