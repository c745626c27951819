"""What must stay true of runs of train.py, and how they fail."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import (BATCH, COMPILED, REPO, Run, assert_same, driver, flat, torchrun,
                      validation_loss, wait_for)
from data import TokenBatches
from model import GPT, GPTConfig


# ---------------------------------------------------------------- runs

def test_contract(reference, data):
    """config.json, log.jsonl and ckpt.pt hold what is promised, and the model in the checkpoint is
    the averaged one."""
    cfg = json.loads((reference.folder / "config.json").read_text())
    assert (cfg.keys() == vars(train.Config()).keys() and cfg["lr"] == 0.02
            and cfg["betas"] == [0.9, 0.95])
    entries = reference.log()
    steps, evals = [e for e in entries if "loss" in e], [e for e in entries if "val_loss" in e]
    assert ([e["step"] for e in steps] == list(range(1, 13))
            and [e["step"] for e in evals] == [4, 8, 12])
    for e in entries:
        assert e["tokens"] == e["step"] * BATCH
    for e in steps:
        assert e.keys() >= {"step", "tokens", "loss", "lr", "tokens_per_second"} and "mfu" not in e
        assert e["lr"] == pytest.approx(0.02 * min(1, e["step"] / 4))
    assert (evals[0]["train_time_s"] < evals[1]["train_time_s"] < evals[2]["train_time_s"]
            and evals[2]["rho"] > 0)
    ckpt = reference.checkpoint()
    assert ckpt.keys() >= {"model", "model_config", "optimizer", "config", "step", "tokens"}
    assert (ckpt["step"] == 12 and ckpt["tokens"] == 12 * BATCH
            and ckpt["config"].keys() == cfg.keys())
    gpt = GPT(GPTConfig(**ckpt["model_config"]))
    assert gpt.config.vocab_size == 320
    assert all(type(v) in (torch.Tensor, int, float, str, bool, type(None))
               for v in flat(ckpt).values())
    assert ({k: v.shape for k, v in ckpt["model"].items()}
            == {k: v.shape for k, v in gpt.state_dict().items()})
    loss = lambda weights: validation_loss(data, gpt, weights)
    assert loss(ckpt["model"]) == pytest.approx(evals[2]["val_loss"], abs=1e-5)
    names, state = [n for n, p in gpt.named_parameters()], ckpt["optimizer"]["state"]
    order = [n for n in names if gpt.get_parameter(n).ndim == 2 and n != "wte.weight"]
    order += [n for n in names if n not in order]
    z = {n: state[i]["z"] for i, n in enumerate(order)}
    y = {n: ckpt["model"][n].lerp(
             z[n], 0.1 if gpt.get_parameter(n).ndim == 2 and n != "wte.weight" else 0.05)
         for n in names}
    # x is neither z nor y
    assert (abs(loss(z) - evals[2]["val_loss"]) > 1e-3
            and abs(loss(y) - evals[2]["val_loss"]) > 1e-5)
    assert all(x in reference.out
               for x in ("parameters", "tokens per step", "run/ckpt.pt", "finished"))
    assert not list(reference.folder.glob("*.tmp"))


@pytest.mark.parametrize("n, by", [(2, "torchrun"), (3, "fork")])
def test_processes(cwd, reference, n, by):
    """The number of processes changes nothing but rounding, in losses, weights and optimizer state,
    and evaluations change nothing at all, even where no checkpoint follows them."""
    run = Run(cwd, processes=n, command=torchrun(n) if by == "torchrun" else None,
              checkpoint_interval=10**6, env={"PYTHONIOENCODING": "ascii"}).wait()
    for key in ("loss", "val_loss", "lr", "grad_norm", "rho", "alpha"):
        assert run.values(key) == pytest.approx(reference.values(key), abs=2e-5), key
    assert_same(run.checkpoint(), reference.checkpoint(), 1e-5)
    assert run.out.count("finished: the model is in") == 1 and f"{n} processes" in run.out


GRAPHS = """
import torch
compile_ = torch.compile
torch.compile = lambda function: compile_(function, backend="eager")
import train
factor, counters = train.lr_factor, torch._dynamo.utils.counters
def lr_factor(*arguments):  # called once a step, after the backward pass
    print("graphs", counters["stats"]["unique_graphs"], flush=True)
    return factor(*arguments)
train.lr_factor = lr_factor
train.run(train.main, sys.argv[2:])
"""


def test_nothing_is_compiled_after_the_first_steps(cwd):
    """By torch's own count of compiled graphs; without the compiler's code generation, which has no
    part in that."""
    run = Run(cwd, command=[sys.executable, driver(cwd, GRAPHS)], compile=True, dtype="bfloat16",
              max_tokens=8 * BATCH, eval_interval=3, checkpoint_interval=5).wait()
    graphs = [int(n) for n in re.findall(r"graphs (\d+)", run.out)]
    assert (len(graphs) == 8 and 0 < graphs[0] == graphs[2]
            and graphs[3:] == [graphs[3]] * 5)  # evaluated after step 3


KEPT = """
import weakref
import train
from sf_normuon import local
old, build, get_batch = [], train.build_optimizer, train.get_batch

def build_optimizer(cfg, model):
    optimizer = build(cfg, model)
    step = optimizer.step
    def watched(closure):
        old[:] = [weakref.ref(local(p.grad).untyped_storage()) for p in model.parameters()]
        return step(closure)
    optimizer.step = watched
    return optimizer

def counted(*arguments):
    print("kept", sum(gradient() is not None for gradient in old), flush=True)
    return get_batch(*arguments)

train.build_optimizer, train.get_batch = build_optimizer, counted
train.run(train.main, sys.argv[2:])
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_keeps_no_gradients_of_the_last_one(cwd, processes):
    command = torchrun(2) if processes == 2 else [sys.executable]
    run = Run(cwd, command=[*command, driver(cwd, KEPT)], max_tokens=3 * BATCH).wait()
    batches = re.findall(r"kept (\d+)", run.out)
    assert len(batches) >= 6 and set(batches) == {"0"}, batches


CARDS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
         "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA GH200 480GB": 989e12,
         "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12, "NVIDIA A100-SXM4-80GB": 312e12,
         "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L40": None,
         "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 4090 D": 147e12,
         "NVIDIA GB300": None, "NVIDIA A10": None,
         "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}


@pytest.mark.parametrize("name", CARDS)
def test_peak_flops(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert train.peak_flops(train.Config(device="cuda", dtype="bfloat16")) == CARDS[name]


def test_eval_offset(cwd, place, reference):
    """The evaluated tokens follow the skipped ones: the loss over 11 sequences is the mean of those
    over 5 and over 6."""
    knobs = dict(eval_only=True, init_from=reference.folder / "ckpt.pt", processes=2)
    losses = [float(re.search(r"validation loss +([\d.]+)",
                              Run(cwd, **knobs, **part).wait().out)[1])
              for part in (dict(eval_tokens=5 * 64),
                           dict(eval_tokens=6 * 64, eval_offset=5 * 64),
                           dict(eval_tokens=11 * 64))]
    assert ((5 * losses[0] + 6 * losses[1]) / 11 == pytest.approx(losses[2], abs=2e-6)
            and abs(losses[0] - losses[1]) > 1e-3)


@pytest.mark.parametrize("knobs", [
    dict(batch_size=12, activation_checkpointing=True), dict(batch_size=3), "compile"], ids=str)
def test_what_changes_nothing_but_rounding(cwd, reference, background, knobs):
    """batch_size, activation checkpointing, compilation."""
    if knobs == "compile":
        run, like = background["compiled"], Run(cwd, **COMPILED).wait()
        if not run:
            pytest.skip("no g++")
        run.wait()
    else:
        run, like = Run(cwd, **knobs).wait(), reference
    for key in ("loss", "val_loss"):
        assert run.values(key) == pytest.approx(like.values(key), abs=2e-5)
    assert_same(run.checkpoint(), like.checkpoint(), 2e-5)


N, W = 120, 10
SCHEDULED = {  # the part of lr at step t > W
    "constant": lambda t: 1, "linear": lambda t: (N - t) / (N - W),
    "wsd": lambda t: min(1, (N - t) / 24),
    "cosine": lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * (t - W) / (N - W)))}


OWN = {  # what their state must carry over a resume
    "sf_adamw": dict(averaging_power=2.0, beta_power=0.5),
    "amuse": dict(betas=(0.6, 0.99), adam_betas=(0.6, 0.99), averaging_power=1.0),
    "schedulefree_plus": dict(sf_beta=0.6, betas=(0.3, 0.99), adam_lr=0.15, grad_clip=0,
                              averaging_start=20, averaging_power=1.0, polyak_beta=0.9,
                              beta_anneal_steps=50)}


@pytest.mark.parametrize("optimizer, schedule, lr", [
    ("sf_normuon", "constant", 0.03), ("sf_adamw", "constant", 0.006), ("adamw", "cosine", 0.003),
    ("normuon", "linear", 0.03), ("muon", "wsd", 0.03), ("amuse", "constant", 0.03),
    ("schedulefree_plus", "constant", 0.15)])
def test_optimizers(cwd, place, data, tokens, optimizer, schedule, lr):
    """Each learns more than the frequencies of the bytes, on a schedule that ends where it should,
    killed and resumed without a trace, the same on two processes, and leaves the model that it
    evaluated."""
    knobs = dict(optimizer=optimizer, schedule=schedule, max_tokens=N * BATCH, warmup_steps=W,
                 lr=lr, adam_lr=0.01, n_embd=48, eval_interval=60, checkpoint_interval=20,
                 batch_size=6) | OWN.get(optimizer, {})
    whole, part, two = (Run(cwd, **knobs), Run(place("part"), **knobs),
                        Run(place("two"), processes=2, **knobs))
    for run, step in ((part, 22), (two, 22)):
        wait_for(lambda: run.step() > step, f"step {step}", kill=run)
        run.kill()
        run.wait(None)
        assert (run.folder / "ckpt.pt").exists() and run.step() < N
    early = two.values("loss")
    part, two = Run(part.cwd, **knobs), Run(two.cwd, **knobs)
    whole.wait()
    for t, value in whole.values("lr").items():
        assert value == pytest.approx(lr * (t / W if t <= W else SCHEDULED[schedule](t))), t
    frequencies = np.bincount(tokens[5000:]) / len(tokens[5000:])
    entropy = -sum(f * math.log(f) for f in frequencies if f)
    assert whole.values("val_loss")[N] < entropy - 0.1
    ckpt = whole.checkpoint()
    gpt = GPT(GPTConfig(**ckpt["model_config"]))
    assert validation_loss(data, gpt, ckpt["model"]) == pytest.approx(
        whole.values("val_loss")[N], abs=1e-5)
    if "beta" in ckpt["optimizer"].get("param_groups", [{}])[0]:
        assert all(not g["train_mode"] and g["step"] == N and g["beta"] > 0.6
                   for g in ckpt["optimizer"]["param_groups"])
    assert_same(part.wait().checkpoint(), ckpt)
    rounding = 0.03 if optimizer == "muon" else 2e-4  # torch's computes in bfloat16
    # from step 21 on by one process; rounding grows from step to step
    late = two.wait().values("loss")
    for t in (*range(1, 11), 21, 22):
        assert (early if t < 20 else late)[t] == pytest.approx(
            whole.values("loss")[t], abs=rounding * (1 if t < 20 else 10)), t


def test_grad_clip(cwd, place):
    """The gradient is scaled to the norm grad_clip, the logged norm is that before; 0 does not
    clip."""
    runs = [Run(place("clip"), optimizer="adamw", weight_decay=0, adam_weight_decay=0, lr=0.01,
                grad_clip=clip) for clip in (1e-13, 0)]
    small, none = [run.wait().values("val_loss") for run in runs]
    # below eps, AdamW stands still
    assert abs(small[12] - small[4]) < 1e-3 and none[12] < none[4] - 0.1
    assert (runs[0].values("grad_norm")[1] == pytest.approx(runs[1].values("grad_norm")[1])
            and runs[0].values("grad_norm")[1] > 0.1)


def test_out_of_memory(cwd):
    Run(cwd, batch_size=10**9, total_batch_tokens=64 * 10**9, max_tokens=0).wait(1).complaint(
        "out of memory", "batch_size")


def test_last_step_not_finite(cwd):
    """A model that was broken by the very last step is not announced as finished."""
    Run(cwd, optimizer="adamw", lr=1e38, warmup_steps=0, max_tokens=BATCH).wait(1).complaint(
        "step 1")


def test_same_batches_and_weights(cwd, reference, place):
    """Another optimizer meets the same first batch at the same weights; another seed does not."""
    runs = [Run(place("k"), max_tokens=BATCH, **knobs)
            for knobs in (dict(optimizer="adamw"), dict(seed=1), dict(lr=0))]
    first, seed, still = [run.wait().values("loss")[1] for run in runs]
    assert first == reference.values("loss")[1] == still and seed != first


def test_bfloat16(cwd, place):
    """Weights, state and losses stay float32 while the products are bfloat16, on two processes as
    on one, and no operation warns that the types of its arguments make it slow."""
    run = Run(cwd, dtype="bfloat16").wait()
    two = Run(place("two"), processes=2, dtype="bfloat16").wait()
    assert "Warning" not in run.err + two.err
    assert two.values("loss") == pytest.approx(run.values("loss"), abs=5e-3)
    assert two.values("loss")[1] == pytest.approx(run.values("loss")[1], abs=1e-5)
    assert all(v.dtype == torch.float32 for k, v in flat(run.checkpoint()).items()
               if isinstance(v, torch.Tensor))
    assert run.values("loss")[12] < run.values("loss")[1] - 0.5


def test_a_tokenizer_with_more_words_than_the_data(cwd, data):
    """The run ends as others do, without the sample."""
    (cwd / "data").unlink()
    shutil.copytree(data, cwd / "data")
    (cwd / "data/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 256}')
    run = Run(cwd, max_tokens=2 * BATCH).wait()
    assert "byte has 257 words, the data's vocab_size is 256" in run.out and "finished" in run.out
    assert "nats" in Run(cwd, eval_only=True).wait().out


# ---------------------------------------------------------------- failures on the way

@pytest.mark.parametrize("lr", [1e12, 1e30])
def test_not_finite(cwd, lr):
    """The run stops at the step whose loss is not finite, and no checkpoint with such weights is
    left."""
    run = Run(cwd, lr=lr, grad_clip=0, warmup_steps=0, optimizer="sf_adamw",
              checkpoint_interval=1).wait((1, 2))
    run.complaint("step 2" if lr == 1e12 else "")
    if (run.folder / "ckpt.pt").exists():
        assert all(torch.isfinite(v).all() for v in flat(run.checkpoint()).values()
                   if isinstance(v, torch.Tensor))
    assert all(math.isfinite(v) for e in run.log() for v in e.values())
    assert "NaN" not in (run.folder / "log.jsonl").read_text()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_token_beyond_the_vocabulary(cwd, reference, data, tokens, processes, split):
    """Shard and vocab_size are named when it is met, by whichever process that is; the checkpoint
    before it stays."""
    batches = TokenBatches(str(data), split, 64, 320, 0)
    position = 6 * 12 + (2 if split == "train" else 0)  # step 7, a sequence of rank 1 of 2
    shard, sequence = batches.locate(position if split == "train" else 2)
    path = Path(batches.paths[shard])
    (cwd / "data").unlink()
    shutil.copytree(data, cwd / "data")
    changed = np.fromfile(path, "<u2")
    changed[512 + sequence * 64 + 5] = 999
    changed.tofile(cwd / "data" / path.name)
    run = Run(cwd, processes=processes).wait(1)
    if processes == 1:
        run.complaint(path.name, "999", "vocab_size 320")
    assert (re.search(rf"^train.py: .*{path.name}.*999.*vocab_size 320", run.err, re.M)
            and "Traceback" not in run.err), run.err
    if split == "train":
        assert run.checkpoint()["step"] == 4 and run.step() == 6


COUNTED = """
import resource
from torch.distributed.tensor import DTensor
if os.environ["RANK"] == "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
else:
    full_tensor = DTensor.full_tensor
    def counted(t):
        if t.numel() >= 1024:  # no sums
            print("gathered", flush=True)
        return full_tensor(t)
    DTensor.full_tensor = counted
"""
BROKEN = """
import torch
from torch.distributed.tensor import DTensor
if os.environ["RANK"] == "0":
    full_tensor, calls = DTensor.full_tensor, []
    def broken(t):
        calls.append(t)
        if len(calls) == 3:
            raise ERROR
        return full_tensor(t)
    DTensor.full_tensor = broken
"""


def test_the_others_stay_in_step_with_the_writer(cwd):
    """When the first process cannot write a tensor, the others do not gather all that follow."""
    run = Run(cwd, command=[*torchrun(2), driver(cwd, COUNTED)], max_tokens=BATCH).wait(1)
    assert re.search("^train.py: run/ckpt.pt could not be written", run.err, re.M), run.err
    assert run.out.count("gathered") <= 2  # of 38


@pytest.mark.parametrize("error,line", [
    ('torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")',
     "out of memory.*1 GiB"),
    ('torch.distributed.DistBackendError("NCCL error in: a.cpp:9\\nNo space left on device")',
     "process 0: NCCL error in: a.cpp:9 No space left on device")])
def test_nobody_waits_for_a_process_that_cannot_gather(cwd, error, line):
    program = driver(cwd, BROKEN.replace("ERROR", error))
    run = Run(cwd, command=[*torchrun(2), program], max_tokens=BATCH)
    wait_for(lambda: not run.running(), "the end", 60)
    run.wait(1)
    assert (re.search(f"^train.py: {line}", run.err, re.M)
            and 'train.py", line' not in run.err), run.err


@pytest.mark.parametrize("processes", [1, 2])
def test_disk_full(cwd, reference, processes):
    """No room for a checkpoint: one line, and the older one still loads."""
    shutil.copytree(reference.folder, cwd / "run")
    before = (cwd / "run/ckpt.pt").read_bytes()
    run = Run(cwd, max_tokens=30 * BATCH, processes=processes, file_limit=len(before) // 2).wait(1)
    run.complaint("run/ckpt.pt")
    assert (cwd / "run/ckpt.pt").read_bytes() == before and not list((cwd / "run").glob("*.tmp"))
    assert Run(cwd, max_tokens=17 * BATCH).wait().checkpoint()["step"] == 17


def test_log_full(cwd, reference):
    """No room for a line of the log: one line, too."""
    (cwd / "run").mkdir()
    run = Run(cwd, file_limit=1500, checkpoint_interval=10**6).wait(1)
    run.complaint("log.jsonl")


@pytest.fixture
def small_disk(cwd):
    """A file system of its own, of 1 MB."""
    disk = cwd / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk],
                                     capture_output=True).returncode:
        pytest.skip("needs root and mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_small_disk(cwd, small_disk, reference):
    """A disk that fills up, and one that is read-only."""
    knobs = dict(out_dir="disk/run", max_tokens=8 * BATCH)
    Run(cwd, **knobs).wait()
    before = (small_disk / "run/ckpt.pt").read_bytes()
    (small_disk / "filler").write_bytes(b"0" * 4096)
    with open(small_disk / "filler", "ab", buffering=0) as f:
        try:
            while f.write(b"0" * 4096):
                pass
        except OSError:
            pass
    Run(cwd, **{**knobs, "max_tokens": 16 * BATCH}).wait(1).complaint("disk/run")
    assert (small_disk / "run/ckpt.pt").read_bytes() == before
    assert subprocess.run(["mount", "-o", "remount,ro", small_disk]).returncode == 0
    Run(cwd, **{**knobs, "max_tokens": 16 * BATCH}).wait((1, 2)).complaint("disk/run")
    Run(cwd, **{**knobs, "out_dir": "disk/new"}).wait((1, 2)).complaint("disk/new")


# ---------------------------------------------------------------- the first command

def test_quickstart(tmp_path):
    """From nothing to a sample; two at once make the data together; any other folder must be
    there."""
    argv = [str(REPO / "configs/quickstart.py"), "--n_layer=1", "--block_size=128",
            "--batch_size=6", "--total_batch_tokens=1536", "--max_tokens=6144",
            "--eval_tokens=2048"]
    runs = [Run(tmp_path, *argv, plain=True, out_dir="a", device="cpu"),
            Run(tmp_path, *argv, plain=True, processes=2, out_dir="b", device="cpu")]
    for run in runs:
        run.wait()
        assert run.step() == 4
    assert runs[0].values("loss") == pytest.approx(runs[1].values("loss"), abs=2e-5)
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"stdlib"}
    assert ({p.name for p in (tmp_path / "data/stdlib").iterdir()}
            == {"meta.json", "stdlib_train_000000.bin", "stdlib_val_000000.bin"})
