"""Runs that lose processes and nodes, change their size and their data, and whose checkpoints and
data are large."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import state
import train
from data import HEADER_BYTES, MAGIC, VERSION, TokenBatches, write_shard
from model import GPT, GPTConfig
from conftest import (BATCH, ENV, LONG, REPO, TINY, TRAIN, Run, alive, assert_same,
                      assert_uninterrupted, children, driver, torchrun, wait_for)


def test_hybrid_sharding(cwd, place, reference):
    """Two copies, each on two processes: the plain run, and its checkpoint goes on anywhere."""
    run = Run(cwd, processes=4, shard_size=2, batch_size=1).wait()
    for key in ("loss", "val_loss", "grad_norm"):
        assert run.values(key) == pytest.approx(reference.values(key), abs=1e-5)
    assert_same(run.checkpoint(), reference.checkpoint(), 1e-5, ["model", "step", "tokens"])
    more = dict(max_tokens=15 * BATCH)
    one = Run(cwd, **more).wait()
    whole = Run(place("whole"), **more).wait()
    assert one.values("loss") == pytest.approx(whole.values("loss"), abs=1e-5)
    run = Run(cwd, processes=2, shard_size=3, **more).wait(2)
    run.complaint("shard_size", "a divisor of 2", "got 3")


def test_the_group_of_a_dead_worker_starts_again_by_itself(cwd, place):
    knobs = LONG | {"max_tokens": 120 * BATCH}
    run = Run(cwd, command=[*torchrun(2), "--max-restarts=3"],
              env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, **knobs)
    wait_for(lambda: run.step() >= 8, "step 8", kill=run)
    os.kill(children(run.pid)[1], signal.SIGKILL)
    run.wait()
    assert run.out.count("going on from") == 1
    assert_uninterrupted(run, Run(place("whole"), processes=2, **knobs).wait())


# ---- several nodes: agents of torchrun that share nothing but an address

class Agent:
    """torchrun with one worker, in a folder of its own; what it and its worker say goes to the file
    `output` there."""

    def __init__(self, folder, port, nodes, restarts, **knobs):
        arguments = [f"--{key}={value}"
                     for key, value in {**TINY, "batch_size": 1, **knobs}.items()]
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=1",
                      f"--max-restarts={restarts}", "--rdzv-conf=last_call_timeout=1"]
        with open(folder / "output", "w") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
                 "--nproc_per_node=1", *rendezvous, TRAIN, *arguments], cwd=folder,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                # without it torchrun hangs when a node joins later
                env={**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        self.folder = folder

    def output(self):
        return (self.folder / "output").read_text(errors="replace")

    def kill(self):
        """With its worker, as when a machine loses its power."""
        pids = [self.popen.pid, *children(self.popen.pid)]
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


@pytest.fixture
def agents(place):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folders, started = [place("node"), place("node")], []

    def start(nodes, restarts=0, which=folders, **knobs):
        for folder in which:
            started.append(Agent(folder, port, nodes, restarts, **knobs))
            time.sleep(0.5)
        return started[-len(which):]

    yield folders, start
    for agent in started:
        if agent.popen.poll() is None:
            agent.kill()


def test_two_nodes_are_one_run(agents, place, reference):
    folders, start = agents
    shared = place("shared") / "run"
    for agent in start(2, out_dir=shared):
        assert agent.popen.wait(120) == 0, agent.output()[-3000:]
    log = [json.loads(line) for line in (shared / "log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert losses == pytest.approx(reference.values("loss"), abs=1e-5)


def test_a_run_grows_by_a_node_and_shrinks_when_it_is_lost(agents, place):
    folders, start = agents
    shared = place("shared") / "run"
    knobs = dict(restarts=3, out_dir=shared, max_tokens=100000 * BATCH, checkpoint_interval=20,
                 eval_interval=1000)
    first, = start("1:2", which=folders[:1], **knobs)
    wait_for(lambda: (shared / "ckpt.pt").exists(), "a checkpoint", 120)
    assert "1 process\n" in first.output()
    second, = start("1:2", which=folders[1:], **knobs)
    wait_for(lambda: "going on from" in first.output() + second.output(), "the larger run", 120)
    assert "2 processes" in first.output() + second.output()
    before = first.output()
    saved = (shared / "ckpt.pt").stat().st_mtime_ns
    wait_for(lambda: (shared / "ckpt.pt").stat().st_mtime_ns > saved,
             "a checkpoint of the larger run", 120)
    second.kill()
    wait_for(lambda: "going on from" in first.output()[len(before):], "the smaller run", 120)
    assert "1 process\n" in first.output()[len(before):]
    os.kill(children(first.popen.pid)[0], signal.SIGTERM)
    assert first.popen.wait(60) == 0, first.output()[-3000:]
    assert "stopped after step" in first.output()[len(before):]


@pytest.mark.parametrize("damage", ["missing", "truncated", "vocabulary"])
def test_data_that_is_wrong_on_one_node(agents, place, damage):
    folders, start = agents
    shards = folders[1] / "data"
    source = shards.resolve()
    shards.unlink()
    shutil.copytree(source, shards)
    if damage == "missing":
        (shards / "x_train_000001.bin").unlink()
    elif damage == "truncated":
        os.truncate(shards / "x_train_000001.bin", 2000)
    else:
        (shards / "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 300}')
    shared = place("shared") / "run"
    both = start(2, out_dir=shared)
    for agent in both:
        assert agent.popen.wait(120) != 0
    lines = {line for agent in both for line in agent.output().splitlines()
             if line.startswith("train.py: ")}
    assert len(lines) == 1, lines
    assert ("x_train_000001.bin" if damage == "truncated"
            else "differs between processes") in lines.pop()
    assert not (shared / "log.jsonl").exists()


# ---- another corpus, other weights

def test_another_corpus(cwd, data, tokens, reference):
    (cwd / "other").mkdir()
    write_shard(cwd / "other/y_val_000000.bin", tokens[:5000])
    write_shard(cwd / "other/y_train_000000.bin", tokens[::-1][:50000])
    shutil.copy(data / "meta.json", cwd / "other")
    Run(cwd).wait()
    other = dict(data_dir="other", max_tokens=20 * BATCH, checkpoint_interval=2)
    Run(cwd, **other).wait(2).complaint("data_dir", "other", "--change_data=True")
    shutil.copytree(cwd / "other", cwd / "words")
    meta = json.loads((data / "meta.json").read_text())
    (cwd / "words/meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}))
    Run(cwd, **{**other, "data_dir": "words"}, change_data=True).wait(2).complaint(
        "trained on byte tokens", "words holds gpt2 tokens")
    run = Run(cwd, change_data=True, **other).wait()
    assert run.values("loss").keys() == {*range(1, 21)} and run.values("data_dir") == {13: "other"}
    assert run.checkpoint()["data_step"] == 12
    again = Run(cwd, data_dir="other", max_tokens=22 * BATCH).wait()  # from now on that is its data
    assert again.values("data_dir") == {13: "other"} and again.checkpoint()["data_step"] == 12
    assert again.checkpoint()["step"] == 22
    # The loss of step 13 is that of the weights y after 12 steps, on the first batch of the new
    # corpus
    path = reference.folder / "ckpt.pt"
    saved = state.load(path)
    model = GPT(GPTConfig(**saved["model_config"]))
    optimizer = train.build_optimizer(train.Config(**saved["config"]), model)
    state.restore(path, saved, model, optimizer)
    optimizer.train()
    batch = TokenBatches(cwd / "other", "train", TINY["block_size"], 257, 0).get(range(12))
    assert model(*batch).item() == pytest.approx(run.values("loss")[13], abs=1e-5)


def test_weights_of_another_run(cwd, reference):
    run = Run(cwd, init_from=reference.folder / "ckpt.pt", max_tokens=BATCH, lr=0, adam_lr=0).wait()
    assert_same(run.checkpoint(), reference.checkpoint(), 0.0, ["model"])
    assert run.checkpoint()["step"] == 1
    Run(cwd, init_from=reference.folder / "ckpt.pt", n_layer=3, resume=False).wait(2).complaint(
        "n_layer is 3", "made with 2")
    Run(cwd, init_from="nowhere.pt", resume=False).wait(2).complaint(
        "nowhere.pt", "no such checkpoint")


# ---- size

def memory(pid="self"):
    """Bytes of memory that are not file pages, now."""
    fields = dict(line.split(":")
                  for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["RssAnon"].split()[0])


def test_a_checkpoint_is_written_tensor_by_tensor(tmp_path, monkeypatch):
    """As torch.save would write it, without a copy of more than one tensor at a time."""
    tree = {"model": {str(i): torch.randn(1024, 1024) for i in range(20)},
            "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0),
            "optimizer": {"state": {0: {"z": torch.randn(7, 5, dtype=torch.float64),
                                        "b": torch.randn(9).bfloat16()}},
                          "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0]}]},
            "step": 3}
    tree["model"]["transposed"] = torch.randn(30, 20).T
    state.save(tmp_path / "a.pt", {"x": torch.zeros(1)})  # imports what a save needs
    largest, before, cpu = [0], memory(), torch.Tensor.cpu

    def watched(tensor):  # a copy, as from a card
        largest[0] = max(largest[0], memory() - before)
        return cpu(tensor).clone()

    monkeypatch.setattr(torch.Tensor, "cpu", watched)
    state.save(tmp_path / "a.pt", tree)
    monkeypatch.undo()
    assert largest[0] < 6 * 4 * 2**20  # of 80 MB
    torch.save(tree, tmp_path / "b.pt")
    for mmap in (True, False):
        a, b = (torch.load(tmp_path / name, weights_only=True, mmap=mmap)
                for name in ("a.pt", "b.pt"))
        leaves, spec = torch.utils._pytree.tree_flatten(a)
        others, other_spec = torch.utils._pytree.tree_flatten(b)
        assert spec == other_spec
        for x, y in zip(leaves, others):
            assert (torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor)
                    else x == y)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_a_thousand_shards(tmp_path):
    """100B tokens in sparse files: every batch is found at once, and reading on for long takes no
    memory."""
    n = 100_000_000
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, n
    for i in range(1000):
        path = tmp_path / f"x_train_{i:06d}.bin"
        path.write_bytes(header.tobytes())
        os.truncate(path, HEADER_BYTES + 2 * n)
    batches = TokenBatches(tmp_path, "train", 1024, 50304, seed=0)
    assert len(batches) == 1000 * ((n - 1) // 1024)
    x, y = batches.get(range(8))
    assert x.shape == (8, 1024) and not x.any()
    before = memory()
    for step in range(2000):
        batches.get(range(step * 97, step * 97 + 2))
    assert memory() - before < 30e6  # the order of a few shards


def test_a_process_starts_with_its_share(tmp_path):
    """And with one parameter at a time whole: 2 of 4 bytes a parameter, where it once began with 4
    and went on to 6."""
    run = Run(tmp_path, plain=True, command=[*torchrun(2), driver(tmp_path, ARGV)]).wait()
    starts = [float(x) for x in re.findall(r"at most ([\d.]+) while it started", run.out)]
    assert len(starts) == 2 and max(starts) < 3, run.out


ARGV = f"""
os.chdir({str(REPO)!r})
knobs = dict(n_layer=10, n_embd=640, n_head=8, vocab_size=1024)
sys.argv = ["", "experiments/memory.py", "configs/125m_sf.py", "--measure", \
*(f"--{{k}}={{v}}" for k, v in knobs.items())]
"""


def test_rows_are_cut_before_they_are_moved(monkeypatch):
    """Fifth of eight processes, 19 rows: it moves rows 12 to 14 and no others."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=4, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (8,))
        p = DTensor.from_local(torch.zeros(3, 5), mesh, [Shard(0)], run_check=False,
                               shape=(19, 5), stride=(5, 1))
        moved, to = [], torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to",
                            lambda t, *a, **k: (moved.append(t.numel()), to(t, *a, **k))[1])
        whole = torch.arange(95.0).view(19, 5)
        mine = state.like(whole, p)
        assert (max(moved) == 15 and torch.equal(mine.to_local(), whole[12:15])
                and mine.shape == whole.shape)
        assert (mine.placements == p.placements
                and mine.to_local().data_ptr() != whole[12:15].data_ptr())
    finally:
        torch.distributed.destroy_process_group()


# ---- does it fit

def fits(*arguments, status=0):
    run = subprocess.run(
        [sys.executable, "experiments/memory.py", "configs/772m_sf.py", *arguments], cwd=REPO,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert run.returncode == status, run.stderr
    if status:
        return run.stderr
    *parts, total, host = run.stdout.splitlines()
    assert float(host.split()[-2]) == pytest.approx(4e-9 * 50304 * 1280, abs=0.01)  # the embedding
    return ({line[:24].strip(): float(line[24:].split()[0]) for line in parts}
            | {"all": float(total[24:].split()[0])}, total)


def test_whether_a_run_fits_a_card():
    """Against counts by hand: words of 4 bytes, what autograd keeps of a block, logits of 4,096
    tokens at a time."""
    parameters = 36 * (12 * 1280**2 + 2 * 1280) + 50304 * 1280 + 1280
    one, verdict = fits("--card=60")
    kept = 48 * 16 * 1024 * 1280 * 36 + 2 * (parameters - 36 * 2560) + 3 * 4 * 4096 * 50304
    assert (one["weights"] == one["gradients"] == one["optimizer's state"] / 2
            == pytest.approx(4e-9 * parameters, abs=0.01))
    assert one["forward and backward"] == pytest.approx(1e-9 * kept, rel=0.1)
    assert "fits a card of 60 GB" in verdict and "not" not in verdict
    assert "does not fit a card of 20 GB" in fits("--card=20")[1]
    eight, _ = fits("--processes=8", "--activation_checkpointing=True", "--card=20")
    assert eight["weights"] == pytest.approx(one["weights"] / 8, abs=0.01)
    assert eight["forward and backward"] < one["forward and backward"] / 4
    for knob, reason in {"--processes=7": "processes", "--n_head=7": "n_embd",
                         "--optimizer=schedulefree_plus": "count adamw"}.items():
        error = fits(knob, status=2)
        assert error.startswith("memory.py: ") and error.count("\n") == 1 and reason in error
