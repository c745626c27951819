"""Where the time goes, beside what one would use instead. Contenders take turns in one run; medians and ratios count.

    python experiments/bench.py step [--size=772m] [--dtype=bfloat16] [--layers=2]     one step of the optimizer
    python experiments/bench.py train [--layers=2] [--tokens=2048]                     one step of training, and its memory
    python experiments/bench.py start                                                  from the command to the first step
    python experiments/bench.py loop                                                   data, evaluation, checkpoints
    python experiments/bench.py scaling                                                by count: 125M, 772M, 7B on 1, 8, 64 GPUs

On a GPU where there is one, with all layers unless told otherwise.
"""
import argparse
import inspect
import os
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import train
from data import write_shard
from model import GPT, GPTConfig
from sf_normuon import SFNorMuon

CUDA = torch.cuda.is_available()
SIZES = {"125m": (12, 12, 768), "772m": (36, 20, 1280), "7b": (32, 32, 4096)}  # layers, heads, width


def seconds(work, waits: bool = False) -> float:
    """Of one thread on a CPU that does not wait for a disk, the time that it had: others then disturb less."""
    clock = time.process_time if not (waits or CUDA) and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def take_turns(contenders: dict, rounds: int, waits: bool = False) -> dict[str, float]:
    """Median seconds of each, after two rounds that do not count. Every other round goes backwards: what writes second finds
    the pages of memory that the first one paid for."""
    times = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, work in list(contenders.items())[:: -1 if i % 2 else 1]:
            times[name].append(seconds(work, waits))
    return {name: median(values[2:]) for name, values in times.items()}


def table(title: str, header: list[str], rows: list[list]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(v if isinstance(v, str) else f'{v:.3g}' if v < 1000 else f'{v:,.0f}' for v in row)} |")


# ---- one step of the optimizer

def bare_work(shapes: list[tuple[int, int]], dtype: torch.dtype, device: str):
    """The matrix products of Newton-Schulz as SFNorMuon does them, and one pass over the 7 words of each parameter that
    must move: gradient, momentum in and out, y in and out, z in and out."""
    work = []
    for m, n in set(shapes):
        batch, m, n = shapes.count((m, n)), min(m, n), max(m, n)
        X, A = (torch.randn(batch, m, k, device=device, dtype=dtype) / k for k in (n, m))
        if 2 * m > n:
            work += 5 * [lambda X=X: X @ X.mT, lambda A=A: A @ A, lambda A=A, X=X: A @ X]
            continue
        for steps in (3, 2):  # Newton-Schulz steps between two products with X
            work += [lambda X=X: X @ X.mT, lambda A=A, X=X: A @ X] + (4 * steps - 3) * [lambda A=A: A @ A]
    words = [[torch.zeros(shape, device=device) for shape in shapes] for _ in range(4)]

    def run():
        for product in work:
            product()
        g, M, y, z = words
        torch._foreach_add_(M, g)
        torch._foreach_add_(y, z)
        torch._foreach_zero_(z)
    return run


def step(args) -> None:
    _, _, width = SIZES[args.size]
    device, dtype = "cuda" if CUDA else "cpu", getattr(torch, args.dtype)
    shapes = args.layers * [(width, width)] * 4 + args.layers * [(4 * width, width), (width, 4 * width)]

    def parameters():
        torch.manual_seed(0)
        params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    if dtype == torch.float32:  # torch's own, but for its cast to bfloat16
        module = sys.modules["torch.optim._muon"]
        source = inspect.getsource(module._zeropower_via_newtonschulz)
        assert "grad.bfloat16()" in source
        exec(source.replace("grad.bfloat16()", "grad.clone()"), vars(module))
    contenders = {"SFNorMuon": SFNorMuon(parameters(), ns_dtype=dtype).step,
                  "torch.optim.Muon": torch.optim.Muon(parameters()).step,
                  "torch.optim.AdamW, fused": torch.optim.AdamW(parameters(), fused=True).step}
    try:
        from schedulefree import AdamWScheduleFree
        contenders["schedulefree.AdamWScheduleFree"] = (opt := AdamWScheduleFree(parameters())).step
        opt.train()
    except ImportError:
        print("(schedulefree is not installed)", file=sys.stderr)
    contenders["floor: bare products and 7 words"] = bare_work(shapes, dtype, device)
    times = take_turns(contenders, args.rounds)
    table(f"One step at {args.size}, {args.layers} layers, {args.dtype} products, {where()}",
          ["", "ms", "of torch.optim.Muon", "of the floor"],
          [[name, 1e3 * t, t / times["torch.optim.Muon"], t / times["floor: bare products and 7 words"]]
           for name, t in times.items()])


# ---- one step of training

class GPT2(nn.Module):
    """In the manner of nanoGPT: GPT-2 with learned positions, LayerNorm, GELU, q, k, v in one matrix, and all logits."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.c, self.wte, self.wpe = c, nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(c.n_embd), qkv=nn.Linear(c.n_embd, 3 * c.n_embd), o=nn.Linear(c.n_embd, c.n_embd),
            norm2=nn.LayerNorm(c.n_embd), up=nn.Linear(c.n_embd, 4 * c.n_embd), down=nn.Linear(4 * c.n_embd, c.n_embd),
        )) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for b in self.blocks:
            q, k, v = (t.unflatten(-1, (self.c.n_head, -1)).transpose(1, 2)
                       for t in b.qkv(b.norm1(x)).chunk(3, dim=-1))
            x = x + b.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + b.down(F.gelu(b.up(b.norm2(x))))
        return F.cross_entropy(F.linear(self.norm(x), self.wte.weight).flatten(0, 1), targets.flatten())


def hugging_face(c: GPTConfig) -> nn.Module:
    from transformers import ArceeConfig, ArceeForCausalLM
    return ArceeForCausalLM(ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, max_position_embeddings=c.block_size,
        hidden_act="relu2", tie_word_embeddings=True))


def contender(name: str, cfg: train.Config, pipe) -> None:
    """In a process of its own: answers every "step" with its seconds, and at the end says how much memory it took."""
    torch.manual_seed(0)
    device, model_config = cfg.device, GPTConfig(50304, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
    torch.set_float32_matmul_precision("high")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name.startswith("train.py"):
        cfg.optimizer = "sf_normuon" if "SFNorMuon" in name else "adamw"
        data = train.TokenBatches(cfg.data_dir, "train", cfg.block_size, 50304, 0)
        model = train.build_model(cfg, 50304)
        optimizer, batch = train.build_optimizer(cfg, model), iter(range(10**6))

        def work():
            train.gradient(cfg, model, data, next(batch))
            optimizer.step()
            model.zero_grad()
    else:
        model = (hugging_face if "transformers" in name else GPT2)(model_config).to(device)
        if cfg.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        idx = torch.randint(50257, (cfg.batch_size, cfg.block_size + 1), device=device)

        def work():
            with train.autocast(cfg):
                if "transformers" in name:  # it shifts the labels itself
                    loss = model(input_ids=idx[:, :-1], labels=idx[:, :-1], use_cache=False).loss
                else:
                    loss = model(idx[:, :-1], idx[:, 1:])
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
        write_shard(f"{folder}/x_train_000000.bin", np.random.default_rng(0).integers(50257, size=10**6))
        write_shard(f"{folder}/x_val_000000.bin", np.zeros(2000, int))
        block = min(1024, args.tokens)
        cfg = train.Config(data_dir=folder, n_layer=args.layers, n_head=heads, n_embd=width, block_size=block,
                           batch_size=args.tokens // block, total_batch_tokens=args.tokens, dtype=args.dtype,
                           compile=CUDA, warmup_steps=10)
        names = ["train.py, AdamW", "transformers, AdamW", "nanoGPT's manner, AdamW", "train.py, SFNorMuon"]
        rows = []
        for together in [[name] for name in names] if CUDA else [names]:  # a card may not hold more than one of them
            workers = {}
            for name in together:
                workers[name], theirs = get_context("spawn").Pipe()
                get_context("spawn").Process(target=contender, args=(name, cfg, theirs), daemon=True).start()

            def ask(name, what):
                workers[name].send(what)
                return workers[name].recv()
            times = {name: [] for name in together}
            for _ in range(args.rounds + 2):
                for name in together:
                    times[name].append(ask(name, "step"))
            rows += [[name, args.tokens / median(times[name][2:]), ask(name, "end") / 1e9] for name in together]
        best = max(row[1] for row in rows[1:3])
        table(f"One step of {args.tokens} tokens at {args.size}, {args.layers} layers, {args.dtype}, {where()}",
              ["", "tokens/s", "of the better peer's", "peak memory, GB"],
              [[name, speed, speed / best, memory] for name, speed, memory in rows])


# ---- from the command to the first step

def start(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shard(f"{folder}/x_train_000000.bin", np.zeros(10**6, int))
        write_shard(f"{folder}/x_val_000000.bin", np.zeros(2000, int))
        command = [sys.executable, str(Path(train.__file__)), f"--data_dir={folder}", f"--out_dir={folder}/run",
                   f"--n_layer={args.layers}", "--batch_size=1", "--block_size=256", "--total_batch_tokens=256", "--resume=False",
                   "--log_interval=1", "--max_tokens=512000", "--eval_tokens=256"]

        def first_step(cache, compiled):
            (Path(folder) / "run/log.jsonl").unlink(missing_ok=True)
            begin = time.perf_counter()
            process = subprocess.Popen([*command, f"--compile={compiled}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{cache}"})
            log = Path(folder) / "run/log.jsonl"
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
        table(f"From the command to the first step, {args.layers} layers of 125m, {where()}", ["", "seconds"], rows)


# ---- data, evaluation, checkpoints

def loop(args) -> None:
    layers, heads, width = SIZES[args.size]
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        for split in ("train", "val"):
            write_shard(f"{folder}/x_{split}_000000.bin", np.random.default_rng(0).integers(50257, size=10**7))
        cfg = train.Config(data_dir=folder, out_dir=folder, n_layer=layers, n_head=heads, n_embd=width, batch_size=1, eval_tokens=1024,
                           total_batch_tokens=1024, dtype=args.dtype, compile=False)
        train_data, val_data, _, vocab_size = train.open_data(cfg)
        model = train.build_model(cfg, vocab_size)
        optimizer = train.build_optimizer(cfg, model)
        batch = iter(range(10**6))

        def gradient():
            model.zero_grad()
            train.gradient(cfg, model, train_data, next(batch))

        def saving():
            optimizer.eval()
            train.save_checkpoint(cfg, model, optimizer, "gpt2", train.Progress())
            optimizer.train()

        def writing():
            with open(f"{folder}/raw.tmp", "wb") as file:  # beside the last one, as a checkpoint is written
                for p, state in optimizer.state.items():
                    for t in (p.detach(), *state.values()):
                        file.write(t.cpu().numpy().data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{folder}/raw.tmp", f"{folder}/raw")

        gradient()
        times = take_turns({"gradient, 1024 tokens": gradient, "optimizer": optimizer.step,
                            "data, 1024 tokens": lambda: train.get_batch(cfg, train_data, [next(batch)]),
                            "evaluation, 1024 tokens": lambda: train.evaluate(cfg, model, val_data),
                            "a checkpoint": saving, "a plain write of as many bytes": writing}, args.rounds, waits=True)
        table(f"The loop at {args.size}, {args.dtype}, {where()}", ["", "seconds"], [[*row] for row in times.items()])
        whole = train.Config()
        step_time = times["gradient, 1024 tokens"] * whole.total_batch_tokens / 1024 + times["optimizer"]
        shares = {"evaluation": times["evaluation, 1024 tokens"] * whole.eval_tokens / 1024 / whole.eval_interval,
                  "checkpoints": times["a checkpoint"] / whole.checkpoint_interval,
                  "data": times["data, 1024 tokens"] * whole.total_batch_tokens / 1024}
        table("As a share of a run with the default intervals and batch", ["", "percent"],
              [[name, 100 * t / step_time] for name, t in shares.items()])


# ---- by count

def scaling(args) -> None:
    """An H100: 989 TFLOP/s of bfloat16 products, of which half is reached; 3.35 TB/s of memory, of which 0.8; between
    GPUs 450 GB/s each way inside a node of 8, of which 0.7, and 50 GB/s each beyond it, of which 0.7."""
    flops, memory, inside, between = 0.5 * 989e12, 0.8 * 3.35e12, 0.7 * 450e9, 0.7 * 50e9
    rows = []
    for size, (layers, heads, width) in SIZES.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(50304, 1024, layers, heads, width))
        n, hidden = (sum(p.numel() for p in params) for params in (model.parameters(), model.hidden_matrices()))
        tokens = 524288 if size == "125m" else 1048576
        # In units of width³: a square matrix takes 5 x 3 products; one of 4:1, begun anew once, 4 with its long side and 14
        newton_schulz = layers * (4 * 5 * 3 + 2 * (4 * 4 + 14)) * 2 * width**3
        for gpus in (1, 8, 64):
            wire = inside if gpus <= 8 else between
            passes = tokens * model.flops_per_token() / flops / gpus
            accumulation = max(1, tokens // (gpus * 16 * 1024))
            moved = accumulation * (2 + 2 + 4) * n * (gpus - 1) / gpus / wire  # gathered twice in bfloat16, reduced in float32
            exchange = 2 * 2 * hidden / gpus * (gpus - 1) / gpus / wire  # to whole matrices and back, in bfloat16
            optimizer = newton_schulz / flops / gpus + 4 * 20 * n / gpus / memory + exchange
            total = max(passes, moved) + optimizer
            rows.append([size, str(gpus), 1e3 * passes, 1e3 * moved, 1e3 * optimizer, 100 * optimizer / total,
                         f"{tokens / total:,.0f}"])
    table("Expected of a step, by count. " + " ".join(scaling.__doc__.split()),
          ["", "GPUs", "passes, ms", "exchange of weights and gradients, hidden behind them, ms", "optimizer, ms",
           "optimizer, %", "tokens/s"], rows)


def where() -> str:
    return torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # what is asked wrongly gets one line
    parser.add_argument("what", choices=("step", "train", "start", "loop", "scaling"))
    parser.add_argument("--size", choices=("125m", "772m"), default="125m")
    parser.add_argument("--layers", type=int, default=0, help="default: all on a GPU, 2 on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if CUDA else "float32")
    parser.add_argument("--tokens", type=int, default=16384 if CUDA else 2048, help="of a step of training")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--disk", help="folder in which checkpoints are written (loop)")
    args = parser.parse_args()
    args.layers = args.layers or (SIZES[args.size][0] if CUDA else 2)
    {"step": step, "train": train_step, "start": start, "loop": loop, "scaling": scaling}[args.what](args)


if __name__ == "__main__":
    main()
