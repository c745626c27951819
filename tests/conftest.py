"""What the tests share: runs of train.py as processes of their own, and the small data that they
train on.

Importing torch takes seconds, so most runs are forked from a server that has imported train.py's
modules once (the standard library's forkserver); each is still a process of its own that runs
train.py as __main__ from its first line. The others are started as a user starts them, by python
or torchrun.
"""
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import TokenBatches, write_shard
from model import GPT, GPTConfig

REPO = Path(__file__).resolve().parents[1]
TRAIN = str(REPO / "train.py")
BATCH = 12 * 64  # tokens in a step: 12 sequences are whole batches for 1, 2 and 3 processes
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, batch_size=2, total_batch_tokens=BATCH,
            max_tokens=12 * BATCH, lr=0.02, warmup_steps=4, grad_clip=0.5, eval_interval=4,
            log_interval=1, checkpoint_interval=4, eval_tokens=11 * 64, device="cpu",
            compile=False, data_dir="data", out_dir="run")
PATH = ":".join(filter(None, [str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH")]))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
HANG = 120  # seconds: far more than anything here takes


# ---------------------------------------------------------------- processes

def fork_server():
    # without NVML's look for cards, the server opens the driver and its forks cannot use it
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=ENV["PYTHONPATH"],
                      PYTORCH_NVML_BASED_CUDA_CHECK="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "conftest"])
    return context


# under nohup the runs would inherit that it is ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
FORKS = fork_server()


def run_as_main(cwd, argv, environment, file_limit):
    """In the forked process: become `python train.py argv`."""
    os.chdir(cwd)
    os.environ.update(environment)
    for fd, name, flags in ((0, os.devnull, os.O_RDONLY),
                            (1, "stdout", os.O_WRONLY | os.O_APPEND | os.O_CREAT),
                            (2, "stderr", os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        os.dup2(os.open(name, flags), fd)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    # those that know the environment
    for name in ("distributed", "config", "state", "checkpoint", "evaluate"):
        sys.modules.pop(name, None)
    sys.argv = [TRAIN, *argv]
    runpy.run_path(TRAIN, run_name="__main__")


class Run:
    """train.py in the folder cwd with TINY's knobs, unless `plain`, and the given ones: forked, or
    by command."""

    def __init__(self, cwd, *argv, plain=False, processes=1, command=None, file_limit=None,
                 env={}, **knobs):
        self.cwd, self.folder = cwd, cwd / knobs.get("out_dir", "run")
        knobs = knobs if plain else {**TINY, **knobs}
        argv = [*argv, *(f"--{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
                         for key, v in knobs.items())]
        for name in ("stdout", "stderr"):
            (cwd / name).unlink(missing_ok=True)
        self.popen, self.forks = None, []
        if command:
            files = [open(cwd / name, "a") for name in ("stdout", "stderr")]
            self.popen = subprocess.Popen([*command, TRAIN, *argv], cwd=cwd, env={**ENV, **env},
                                          stdin=subprocess.DEVNULL, stdout=files[0],
                                          stderr=files[1], start_new_session=True)
            self.pid = self.popen.pid
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(processes):
            environment = {} if processes == 1 else dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            self.forks.append(FORKS.Process(target=run_as_main,
                                            args=(cwd, argv, environment, file_limit)))
            self.forks[-1].start()
        self.pid = self.forks[0].pid

    def running(self):
        return self.popen.poll() is None if self.popen else any(p.is_alive() for p in self.forks)

    def wait(self, status=0, seconds=HANG):
        """Until it ends, with this exit status, or one of these, on every process."""
        wait_for(lambda: not self.running(), f"the end of {self.cwd}", seconds, kill=self)
        self.statuses = [self.popen.returncode] if self.popen else [p.exitcode for p in self.forks]
        self.out, self.err = (Path(self.cwd / n).read_text(errors="replace")
                              for n in ("stdout", "stderr"))
        if status is not None:
            assert {*self.statuses} <= ({*status} if isinstance(status, tuple) else {status}), (
                self.statuses, self.err[-3000:])
        return self

    def kill(self):
        for p in [self.popen] if self.popen else self.forks:
            p.kill()

    def log(self):
        path = self.folder / "log.jsonl"
        return ([json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
                if path.exists() else [])

    def step(self):
        return max([entry["step"] for entry in self.log()], default=0)

    def values(self, key):
        return {entry["step"]: entry[key] for entry in self.log() if key in entry}

    def checkpoint(self):
        return torch.load(self.folder / "ckpt.pt", weights_only=True, map_location="cpu")

    def complaint(self, *words):
        """The one line on stderr, beside the progress bar, without traceback, with these words in
        it."""
        lines = [line.strip() for line in re.split(r"[\r\n]", self.err)]
        lines = [line for line in lines if line and not re.search(r"tok/s|\?tok|it/s", line)]
        assert len(lines) == 1 and lines[0].startswith("train.py: "), self.err[-3000:]
        assert len(lines[0]) < 600, lines[0]
        for word in words:
            assert word in lines[0], (word, lines[0])


def torchrun(n):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]


def wait_for(condition, what, seconds=HANG, kill=None):
    deadline = time.monotonic() + seconds
    while not condition():
        ended = kill and not kill.running() and not condition()
        if ended or time.monotonic() > deadline:
            if kill:
                kill.kill()
                what += (f"; {[p.exitcode for p in kill.forks]}, "
                         f"stderr: {(kill.cwd / 'stderr').read_text()[-2000:]}")
            pytest.fail(f"{'it ended' if ended else f'{seconds} s were not enough'}, "
                        f"waiting for {what}")
        time.sleep(0.02)


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return sorted(found)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids, seconds):
    try:
        wait_for(lambda: not any(map(alive, pids)), "the end of orphans", seconds)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def flat(value, path=""):
    """A nested dict or list as {path: leaf}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same(a, b, tolerance=0.0, parts=("model", "optimizer", "step", "tokens")):
    """Two checkpoints, bitwise or to a tolerance."""
    for part in parts:
        a_flat, b_flat = flat(a[part], part), flat(b[part], part)
        assert a_flat.keys() == b_flat.keys()
        for key, value in a_flat.items():
            if isinstance(value, torch.Tensor):
                difference = (value - b_flat[key]).abs().max().item()
                assert difference <= tolerance, (key, difference)
            else:
                assert value == b_flat[key], key


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*")) if p.name not in ("stdout", "stderr")}


# ---------------------------------------------------------------- data

@pytest.fixture(scope="session")
def tokens():
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join((stdlib / name).read_bytes() for name in ("argparse.py", "typing.py", "ast.py"))
    return np.frombuffer(text, np.uint8).astype(np.uint16)


@pytest.fixture(scope="session")
def data(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "x_val_000000.bin", tokens[:5000])
    write_shard(folder / "x_train_000000.bin", tokens[5000:100000])
    write_shard(folder / "x_train_000001.bin", tokens[100000:])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 257}))
    return folder


@pytest.fixture
def cwd(tmp_path, data):
    """A working directory with the shards in data/."""
    (tmp_path / "data").symlink_to(data)
    return tmp_path


@pytest.fixture(scope="session")
def place(tmp_path_factory, data):
    """Makes such directories for fixtures that live longer."""
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "data").symlink_to(data)
        return folder
    return make


@pytest.fixture(scope="session")
def background(place):
    """Runs that mostly wait or take long, started first and looked at last."""
    first = Run(place("first"), max_tokens=0)
    compiled = Run(place("compiled"), compile=True, **COMPILED) if shutil.which("g++") else None
    wait_for(lambda: first.step() >= 2, "step 2", kill=first)
    os.kill(first.pid, signal.SIGSTOP)  # a stopped process keeps its lock
    (first.cwd / "other").mkdir()
    second = Run(first.cwd / "other", data_dir="../data", out_dir="../run", resume=False, lr=0.5)
    yield dict(first=first, second=second, compiled=compiled)
    first.kill()


@pytest.fixture(scope="session")
def reference(place, background):
    """The run that the others are compared with, by plain python."""
    return Run(place("one"), command=[sys.executable]).wait()


# ---- models and runs that several files use

SMALL = GPTConfig(vocab_size=96, block_size=48, n_layer=3, n_head=4, n_embd=48)


@pytest.fixture
def small():
    torch.manual_seed(0)
    gpt = GPT(SMALL)
    # larger than at the start, so that every part shows in the logits; gains that differ
    for p in gpt.parameters():
        p.data.mul_(3) if p.ndim == 2 else p.data.uniform_(0.5, 1.5)
    return gpt


COMPILED = dict(n_layer=1, eval_interval=99, max_tokens=3 * BATCH)
LONG = dict(max_tokens=60 * BATCH, checkpoint_interval=3, eval_interval=5)
SOAK = pytest.mark.skipif(not os.environ.get("SOAK"), reason="long: SOAK=1")


def assert_uninterrupted(run, whole):
    assert_same(run.checkpoint(), whole.checkpoint())
    entries = [(e["step"], "loss" in e) for e in run.log()]
    assert (len(entries) == len({*entries})
            and {*entries} == {(e["step"], "loss" in e) for e in whole.log()})
    for key in ("loss", "val_loss"):
        assert run.values(key) == whole.values(key)


def validation_loss(data, gpt, weights):
    validation = TokenBatches(str(data), "val", 64, 320)
    gpt.load_state_dict(weights)
    with torch.no_grad():
        return float(torch.stack([gpt(*validation.get([i])) for i in range(11)]).double().mean())


def driver(folder, code):
    """A program that runs `code` and then becomes the program that follows it on the command
    line."""
    path = folder / "driver.py"
    path.write_text(f"import os, runpy, sys\n{code}\nsys.argv = sys.argv[1:]\n"
                    "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    return str(path)
