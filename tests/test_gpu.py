"""The acceptance run on a card: what a CPU cannot prove, and a table of how fast it is.

    python -m pytest -m gpu -s        with one H100 in some 15 minutes; with two, NCCL too

Needs torch, numpy, tqdm and pytest, no network. The table is printed and written to $CARD_JSON, by
default experiments/results/card.json. REHEARSAL=1 shrinks everything to what a CPU can do:

    REHEARSAL=1 TORCH_COMPILE_DISABLE=1 CARD_JSON=card.json \
        python tests/pretend_card.py -m pytest -m gpu tests/test_gpu.py
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from baselines import build_optimizer
from config import parse
from conftest import ENV, REPO, TRAIN, Run, assert_same, torchrun, wait_for
from data import write_shard
from model import GPT, GPTConfig
from sf_normuon import SFNorMuon

pytestmark = [pytest.mark.gpu,
              # with a card and a driver too old for this torch, they fail
              pytest.mark.skipif(not (torch.cuda.is_available() or Path("/dev/nvidia0").exists()),
                                 reason="needs an NVIDIA card")]
REHEARSAL = bool(os.environ.get("REHEARSAL"))
QUICKSTART = str(REPO / "configs/quickstart.py")
BATCH = 32 * 128  # tokens of a step of the quickstart
LIMIT = 500  # seconds for a run
TABLE = []  # one dict for each size
TARGETS = {"125m": 0.50, "772m": 0.55}  # MFU
SMALLER = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--batch_size=2",
           "--total_batch_tokens=256", "--vocab_size=320", "--eval_tokens=64", "--dtype=float32"]

# Programs that run train.py as __main__, after a change of torch or with a stopwatch.
EXACT = """
import runpy, sys, torch
import sf_normuon
torch.set_float32_matmul_precision = lambda precision: None  # no TF32
newton_schulz = sf_normuon.newton_schulz
sf_normuon.newton_schulz = lambda G, steps, dtype: newton_schulz(G, steps, torch.float32)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DETERMINISTIC = """
import runpy, sys, torch
torch.use_deterministic_algorithms(True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STOPWATCH = """
import json, runpy, sys, time, torch
import baselines, checkpoint
build, save = baselines.build_optimizer, checkpoint.save_checkpoint
steps, saves = [], []

def build_optimizer(cfg, model):
    optimizer = build(cfg, model)
    step = optimizer.step

    def timed(*args):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = step(*args)
        end.record()
        steps.append((begin, end))
        return result
    optimizer.step = timed
    return optimizer

def save_checkpoint(*args):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    save(*args)
    saves.append(time.perf_counter() - begin)

baselines.build_optimizer, checkpoint.save_checkpoint = build_optimizer, save_checkpoint
out, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    torch.cuda.synchronize()
    with open(out, "w") as file:
        json.dump(dict(optimizer_ms=[begin.elapsed_time(end) for begin, end in steps],
                       checkpoint_s=saves[-1], peak=torch.cuda.max_memory_allocated()), file)
"""


def quickstart(cwd, program=None, steps=20, **knobs):
    """The quickstart on the shards of the tests, by a program that runs train.py, or by
    train.py."""
    knobs = {**dict(max_tokens=steps * BATCH, log_interval=1, data_dir="data", out_dir="run"),
             **knobs}
    command = [sys.executable, "-c", program] if program else [sys.executable]
    environment = {"OMP_NUM_THREADS": str(min(8, max(1, (os.cpu_count() or 1) // 2))),
                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return Run(cwd, QUICKSTART, command=command, plain=True, env=environment, **knobs)


def largest_difference(a, b, key="loss"):
    a, b = a.values(key), b.values(key)
    assert a and a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


# ---------------------------------------------------------------- the same as on a CPU

@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_the_first_20_losses_are_the_cpus(place, dtype, tolerance):
    knobs = dict(dtype=dtype, steps=3 if REHEARSAL else 20)
    card = quickstart(place("card"), EXACT if dtype == "float32" else None, device="cuda", **knobs)
    cpu = quickstart(place("cpu"), device="cpu", **knobs)
    assert largest_difference(card.wait(), cpu.wait()) < tolerance


def test_the_quickstart_ends_where_the_cpus_ends(place):
    knobs = dict(steps=3 if REHEARSAL else 700, eval_interval=100)
    cpu = quickstart(place("cpu"), device="cpu", **knobs)
    card = quickstart(place("card"), device="cuda", **knobs)
    losses = [run.wait(seconds=LIMIT).values("val_loss") for run in (card, cpu)]
    last = max(losses[0])
    assert abs(losses[0][last] - losses[1][last]) < 0.03


def test_a_run_that_is_killed_and_resumed_is_bitwise_the_uninterrupted_one(place):
    knobs = dict(device="cuda", checkpoint_interval=2, steps=4 if REHEARSAL else 60,
                 eval_interval=50, dtype="float32" if REHEARSAL else "")
    whole = quickstart(place("whole"), DETERMINISTIC, **knobs).wait()
    folder = place("cut")
    cut = quickstart(folder, DETERMINISTIC, **knobs)
    wait_for(lambda: (cut.folder / "ckpt.pt").exists(), "a checkpoint", LIMIT, kill=cut)
    os.kill(cut.pid, signal.SIGKILL)
    cut.popen.wait()
    assert cut.step() < knobs["steps"] or REHEARSAL
    resumed = quickstart(folder, DETERMINISTIC, **knobs).wait()
    assert_same(resumed.checkpoint(), whole.checkpoint())
    assert resumed.values("loss") == whole.values("loss")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_the_optimizer_equals_its_float64_self(dtype, tolerance, compiled):
    """Which test_optim.py compares with Algorithm 1. Differences are relative to the way that z
    went."""
    def trained(device, float_dtype, ns_dtype):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(
                      torch.randn(shape, generator=generator).to(device, float_dtype))
                  for shape in ((48, 32), (48, 32), (32, 96), (64,))]
        start = [p.detach().double().cpu().clone() for p in params]
        opt = SFNorMuon([{"params": params[:3]}, {"params": params[3:], "use_muon": False}],
                        lr=0.05, warmup_steps=2, ns_dtype=ns_dtype)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device, float_dtype)
            opt.step()
        opt.eval()
        return [p.detach().double().cpu() - s for p, s in zip(params, start)]

    stance = "default" if compiled and not REHEARSAL else "force_eager"
    with torch.compiler.set_stance(stance):
        card = trained("cuda", torch.float32, dtype)
    for moved, exact in zip(card, trained("cpu", torch.float64, torch.float64)):
        assert (moved - exact).norm() < tolerance * exact.norm()


# ---------------------------------------------------------------- at size

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Random GPT-2 tokens, without the tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = np.random.default_rng(0).integers(257 if REHEARSAL else 50257,
                                               size=2**15 if REHEARSAL else 2**24)
    write_shard(folder / "x_train_000000.bin", tokens)
    write_shard(folder / "x_val_000000.bin", tokens[:2**21])
    if REHEARSAL:
        (folder / "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return folder


def test_nothing_is_compiled_after_the_third_step(shards):
    argv = [str(REPO / "configs/125m_sf.py"), f"--data_dir={shards}", "--n_layer=2",
            "--device=cuda"]
    cfg = parse(argv + SMALLER * REHEARSAL)
    import train
    model = GPT(GPTConfig(cfg.vocab_size or 50304, cfg.block_size, cfg.n_layer, cfg.n_head,
                          cfg.n_embd)).to("cuda")
    train.compile_and_checkpoint(cfg, model)
    optimizer = build_optimizer(cfg, model)
    idx = torch.randint(256, (cfg.batch_size, cfg.block_size), device="cuda")
    graphs = []
    for step in range(8):
        with train.autocast(cfg):
            loss = model(idx, idx)
        loss.backward()
        if step > 3:  # another number of matrices of this shape
            model.blocks[0].attn.q.weight.grad = None
        optimizer.step(lambda: loss)
        model.zero_grad()
        if step in (2, 5):
            optimizer.eval()
            with torch.no_grad(), train.autocast(cfg):
                model(idx, idx)
            optimizer.train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1] and (graphs[-1] > 0 or REHEARSAL), graphs


def counted(config, *knobs):
    """Bytes, by experiments/memory.py."""
    out = subprocess.run([sys.executable, str(REPO / "experiments/memory.py"), config, *knobs],
                         env=ENV, text=True, capture_output=True, timeout=LIMIT, check=True).stdout
    return 1e9 * next(float(line.split()[1]) for line in out.splitlines()
                      if line.startswith("all "))


@pytest.mark.parametrize("size,steps", [("125m", 16), ("772m", 6)])
def test_it_starts_from_its_config(tmp_path, shards, size, steps):
    config = str(REPO / f"configs/{size}_sf.py")
    smaller = SMALLER * REHEARSAL
    tokens = parse([config, *smaller]).total_batch_tokens
    argv = [config, f"--data_dir={shards}", "--out_dir=run", f"--max_tokens={steps * tokens}",
            "--log_interval=1", "--eval_interval=1000000", "--device=cuda",
            "--eval_tokens=1048576", *smaller]
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", STOPWATCH, "times.json", TRAIN, *argv],
                            cwd=tmp_path, env=ENV, text=True, capture_output=True, timeout=LIMIT)
    assert result.returncode == 0, result.stderr[-3000:]
    whole = time.perf_counter() - begin
    times = json.loads((tmp_path / "times.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    seconds = [tokens / line["tokens_per_second"] for line in log if "loss" in line]
    assert len(seconds) == steps == len(times["optimizer_ms"])
    step, count = median(seconds[2:]), counted(config, *smaller)
    optimizer = median(times["optimizer_ms"][2:])
    TABLE.append(dict(
        size=size, card=torch.cuda.get_device_name(), torch=torch.__version__,
        tokens_per_step=tokens, tokens_per_second=tokens / step,
        mfu=median(line.get("mfu", 0) for line in log if "loss" in line),
        peak_gb=times["peak"] / 1e9, counted_gb=count / 1e9, compile_s=seconds[0] - step,
        optimizer_ms=optimizer, optimizer_percent=0.1 * optimizer / step,
        checkpoint_s=times["checkpoint_s"], command_s=whole))
    print(f"\n{'':20}{'measured':>12}{'target':>12}")
    for name, value in TABLE[-1].items():
        target = {"mfu": TARGETS[size], "optimizer_percent": 3, "peak_gb": count / 1e9}.get(
            name, "")
        print(f"{name:20}{value if isinstance(value, str) else f'{value:.4g}':>12}{target:>12}")
    path = Path(os.environ.get("CARD_JSON", REPO / "experiments/results/card.json"))
    path.write_text(json.dumps(TABLE, indent=1) + "\n")
    assert all(np.isfinite(line["loss"]) for line in log if "loss" in line)


# ---------------------------------------------------------------- two cards

PROFILED = """
import os, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sf_normuon import SFNorMuon, param_groups
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), \
torch.nn.Linear(64, 64, bias=False)).to("cuda")
fully_shard(model)
opt = SFNorMuon(param_groups(model))
for p in model.parameters():
    p.grad = torch.ones_like(p)
opt.step()
with torch.profiler.profile() as profile:
    opt.step()
print(sorted({event.key for event in profile.key_averages()}), flush=True)
os._exit(0)
"""
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")


@two_cards
def test_two_cards_equal_one(place):
    knobs = dict(device="cuda", eval_interval=5, steps=2 if REHEARSAL else 20, dtype="float32")
    one = quickstart(place("one"), EXACT, **knobs).wait()
    knobs = {**dict(max_tokens=knobs.pop("steps") * BATCH, log_interval=1, data_dir="data",
                    out_dir="run"),
             **knobs}
    two = Run(place("two"), QUICKSTART, command=torchrun(2), plain=True, **knobs).wait()
    assert largest_difference(two, one) < 1e-2


@two_cards
def test_the_exchange_is_an_all_to_all(tmp_path):
    (tmp_path / "profiled.py").write_text(PROFILED)
    out = subprocess.run([*torchrun(2), "profiled.py"], cwd=tmp_path, env=ENV, text=True,
                         capture_output=True, timeout=LIMIT, check=True).stdout
    assert "all_to_all" in out.lower() or "alltoall" in out.lower(), out
