"""Where the time goes, beside what one would use instead. Contenders take turns; medians count.

    python experiments/bench.py step [--size=772m] [--dtype=bfloat16]   one step of the optimizer
    python experiments/bench.py train [--layers=2] [--tokens=2048]      one of training, its memory
    python experiments/bench.py start                                   until the first step
    python experiments/bench.py loop                                    data, evaluation, saving

On a GPU if there is one. All layers there and for `loop`, else 2. torch.optim.Muon always computes
its products in bfloat16, so `step` compares equal precision with --dtype=bfloat16 only.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import nn

import train
from baselines import build_optimizer
from checkpoint import Progress, save_checkpoint
from config import Config
from data import TokenBatches, write_shard
from evaluate import autocast, evaluate, get_batch
from model import GPTConfig
from peers import GPT2, hugging_face
from runs import markdown
from sf_normuon import SFNorMuon

CUDA = torch.cuda.is_available()
# layers, heads, width
SIZES = {"quickstart": (4, 4, 64), "125m": (12, 12, 768), "772m": (36, 20, 1280)}


def seconds(work, waits: bool = False) -> float:
    """Process time where one thread computes and nothing waits, since other programs disturb it
    less; else wall time."""
    alone = not (waits or CUDA) and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def take_turns(contenders: dict, rounds: int, waits: bool = False) -> dict[str, float]:
    """Median seconds of each, after two rounds that do not count. Every other round runs in
    reverse order, because whoever writes first pays for the new pages of memory."""
    times = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, work in list(contenders.items())[:: -1 if i % 2 else 1]:
            times[name].append(seconds(work, waits))
    return {name: median(values[2:]) for name, values in times.items()}


def table(title: str, header: list[str], rows: list[list]) -> None:
    show = lambda v: v if isinstance(v, str) else f"{v:.3g}" if v < 1000 else f"{v:,.0f}"
    print(f"\n{title}\n\n{markdown(header, [[*map(show, row)] for row in rows])}", end="")


# ---- one step of the optimizer

def step(args) -> None:
    _, _, width = SIZES[args.size]
    device, dtype = "cuda" if CUDA else "cpu", getattr(torch, args.dtype)
    shapes = args.layers * (4 * [(width, width)] + [(4 * width, width), (width, 4 * width)])

    def parameters():
        torch.manual_seed(0)
        params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    muon = "torch.optim.Muon, bfloat16"
    contenders = {"SFNorMuon": SFNorMuon(parameters(), ns_dtype=dtype).step,
                  muon: torch.optim.Muon(parameters()).step,
                  "torch.optim.AdamW, fused": torch.optim.AdamW(parameters(), fused=True).step}
    try:
        from schedulefree import AdamWScheduleFree
        contenders["schedulefree.AdamWScheduleFree"] = (opt := AdamWScheduleFree(parameters())).step
        opt.train()
    except ImportError:
        print("(schedulefree is not installed)", file=sys.stderr)
    times = take_turns(contenders, args.rounds)
    table(f"One step at {args.size}, {args.layers} layers, SFNorMuon in {args.dtype}, {where()}",
          ["", "ms", "of torch.optim.Muon"],
          [[name, 1e3 * s, s / times[muon]] for name, s in times.items()])


# ---- one step of training

def contender(name: str, cfg: Config, pipe) -> None:
    """In a process of its own: answers "step" with its seconds, the end with its memory."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = TokenBatches(cfg.data_dir, "train", cfg.block_size, 50304, 0)
    if name.startswith("model.py"):
        cfg.optimizer = "sf_normuon" if "SFNorMuon" in name else "adamw"
        model = train.build_model(cfg, 50304)
        optimizer = build_optimizer(cfg, model)
    else:
        make = hugging_face if "transformers" in name else GPT2
        model = make(GPTConfig(50304, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
        model.to(cfg.device)
        if cfg.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = iter(range(10**6))

    def work():
        first = next(batch) * cfg.batch_size
        x, y = get_batch(cfg, data, range(first, first + cfg.batch_size))
        with autocast(cfg):
            if "transformers" in name:  # it shifts the labels itself
                loss = model(input_ids=x, labels=x, use_cache=False).loss
            else:
                loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    while pipe.recv() == "step":
        pipe.send(seconds(work))
    peak = torch.cuda.max_memory_allocated() if CUDA else \
        1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    pipe.send(peak)


def train_step(args) -> None:
    layers, heads, width = SIZES[args.size]
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0).integers(50257, size=10**6)
        write_shard(f"{folder}/x_train_000000.bin", random)
        cfg = Config(data_dir=folder, n_layer=args.layers, n_head=heads, n_embd=width,
                     block_size=args.block, batch_size=args.tokens // args.block, dtype=args.dtype,
                     total_batch_tokens=args.tokens, compile=CUDA, warmup_steps=10)
        names = ["model.py, AdamW", "transformers, AdamW", "nanoGPT's manner, AdamW",
                 "model.py, SFNorMuon"]
        if not find_spec("transformers"):
            print(f"without {names.pop(1)}: transformers is not installed")
        rows = []
        for together in [[name] for name in names] if CUDA else [names]:  # a card may hold only one
            workers, spawn = {}, get_context("spawn")
            for name in together:
                workers[name], theirs = spawn.Pipe()
                spawn.Process(target=contender, args=(name, cfg, theirs), daemon=True).start()
                theirs.close()  # so that recv() notices when the contender dies

            def ask(name, what):
                try:
                    workers[name].send(what)
                    return workers[name].recv()
                except (EOFError, OSError):
                    sys.exit(f"bench.py: {name} failed, see above")
            times = {name: [] for name in together}
            for _ in range(args.rounds + 2):
                for name in together:
                    times[name].append(ask(name, "step"))
            rows += [[name, args.tokens / median(times[name][2:]), ask(name, "end") / 1e9]
                     for name in together]
        best = max(speed for name, speed, _ in rows if not name.startswith("model.py"))
        table(f"A step of {args.tokens} tokens at {args.size}, {args.layers} layers, {args.dtype}, "
              f"{where()}",
              ["", "tokens/s", "of the better peer's", "peak memory, GB"],
              [[name, speed, speed / best, memory] for name, speed, memory in rows])


# ---- from the command to the first step

def start(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shard(f"{folder}/x_train_000000.bin", np.zeros(10**6, int))
        write_shard(f"{folder}/x_val_000000.bin", np.zeros(2000, int))
        command = [sys.executable, train.__file__, f"--data_dir={folder}",
                   f"--out_dir={folder}/run", f"--n_layer={args.layers}",
                   "--batch_size=1", "--block_size=256", "--total_batch_tokens=256",
                   "--resume=False", "--log_interval=1", "--max_tokens=512000",
                   "--eval_tokens=256"]
        log = Path(folder) / "run/log.jsonl"

        def first_step(cache, compiled):
            log.unlink(missing_ok=True)
            begin = time.perf_counter()
            process = subprocess.Popen(
                [*command, f"--compile={compiled}"], stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{cache}"})
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    sys.exit("bench.py: the run ended before its first step")
                time.sleep(0.02)
            taken = time.perf_counter() - begin
            process.kill()
            process.wait()
            return taken

        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        rows = [["import torch, alone", time.perf_counter() - begin]]
        rows.append(["train.py", first_step("none", False)])
        rows.append(["train.py --compile=True, nothing compiled before", first_step("cache", True)])
        rows.append(["train.py --compile=True, the second time", first_step("cache", True)])
        table(f"From the command to the first step, {args.layers} layers of 125m, {where()}",
              ["", "seconds"], rows)


# ---- data, evaluation, checkpoints

def loop(args) -> None:
    _, heads, width = SIZES[args.size]
    sequences = args.tokens // args.block
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        for split in ("train", "val"):
            random = np.random.default_rng(0).integers(50257, size=10**7)
            write_shard(f"{folder}/x_{split}_000000.bin", random)
        cfg = Config(data_dir=folder, out_dir=folder, n_layer=args.layers, n_head=heads,
                     n_embd=width, block_size=args.block, batch_size=sequences,
                     eval_tokens=args.tokens, total_batch_tokens=args.tokens, dtype=args.dtype,
                     compile=CUDA)
        train_data, val_data, _, vocab_size = train.open_data(cfg)
        model = train.build_model(cfg, vocab_size)
        optimizer = build_optimizer(cfg, model)
        batches = iter(range(i, i + sequences) for i in range(0, 10**6, sequences))

        def gradient():
            model.zero_grad()
            with autocast(cfg):
                loss = model(*get_batch(cfg, train_data, next(batches)))
            loss.backward()

        def saving():
            optimizer.eval()
            save_checkpoint(cfg, model, optimizer, Progress(tokenizer="gpt2"))
            optimizer.train()

        def writing():
            with open(f"{folder}/raw.tmp", "wb") as file:  # as a checkpoint is
                for p, state in optimizer.state.items():
                    for t in (p.detach(), *state.values()):
                        file.write(t.cpu().numpy().data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{folder}/raw.tmp", f"{folder}/raw")

        gradient()
        times = take_turns({
            "gradient": gradient, "optimizer": optimizer.step,
            "data": lambda: get_batch(cfg, train_data, next(batches)),
            "evaluation": lambda: evaluate(cfg, model, val_data),
            "a checkpoint": saving, "a plain write of as many bytes": writing},
            args.rounds, waits=True)
        table(f"The loop at {args.size}, {args.layers} layers, {args.tokens} tokens, {args.dtype}, "
              f"{where()}",
              ["", "seconds"], [[*row] for row in times.items()])
        whole = Config()
        parts, evaluated = whole.total_batch_tokens / args.tokens, whole.eval_tokens / args.tokens
        step_time = times["gradient"] * parts + times["optimizer"]
        shares = {"evaluation": times["evaluation"] * evaluated / whole.eval_interval,
                  "checkpoints": times["a checkpoint"] / whole.checkpoint_interval,
                  "data": times["data"] * parts}
        table("As a share of a run with the default intervals and batch", ["", "percent"],
              [[name, 100 * t / step_time] for name, t in shares.items()])


def where() -> str:
    return torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # a usage error gets one line
    add, parts = parser.add_argument, dict(step=step, train=train_step, start=start, loop=loop)
    add("what", choices=parts)
    add("--size", choices=SIZES, default="125m")
    add("--layers", type=int, default=0, help="default: all on a GPU or for loop, else 2")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if CUDA else "float32")
    add("--tokens", type=int, default=16384 if CUDA else 2048, help="of a step of training")
    add("--rounds", type=int, default=12)
    add("--disk", help="folder in which checkpoints are written (loop)")
    args = parser.parse_args()
    args.layers = args.layers or (SIZES[args.size][0] if CUDA or args.what == "loop" else 2)
    for name in ("layers", "tokens", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.block = min(1024, args.tokens)
    args.tokens -= args.tokens % args.block  # whole sequences
    parts[args.what](args)


if __name__ == "__main__":
    main()
