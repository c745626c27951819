"""What must stay true of train.py and model.py: real processes, signals and files.

Importing torch takes seconds, so most runs are forked from a server that has imported train.py's modules once (the
standard library's forkserver); each is still a process of its own that runs train.py as __main__ from its first line.
The others are started as a user starts them, by python or torchrun.
"""
import json
import math
import multiprocessing
import os
import random
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
from torch.nn import functional as F

import model as model_module
import train
from data import TokenBatches, write_shard
from model import GPT, GPTConfig

REPO = Path(__file__).resolve().parent
TRAIN = str(REPO / "train.py")
BATCH = 12 * 64  # tokens in a step: 12 sequences are whole batches for 1, 2 and 3 processes
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, batch_size=2, total_batch_tokens=BATCH, max_tokens=12 * BATCH,
            lr=0.02, warmup_steps=4, grad_clip=0.5, eval_interval=4, log_interval=1, checkpoint_interval=4,
            eval_tokens=11 * 64, device="cpu", compile=False, data_dir="data", out_dir="run")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
HANG = 120  # seconds: far more than anything here takes


# ---------------------------------------------------------------- processes

def fork_server():
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(REPO))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "test_train"])
    return context


FORKS = fork_server()


def run_as_main(cwd, argv, environment, file_limit):
    """In the forked process: become `python train.py argv`."""
    os.chdir(cwd)
    os.environ.update(environment)
    for fd, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY | os.O_APPEND | os.O_CREAT),
                            (2, "stderr", os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        os.dup2(os.open(name, flags), fd)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    for name in ("config", "processes"):  # which read the environment
        sys.modules.pop(name, None)
    sys.argv = [TRAIN, *argv]
    runpy.run_path(TRAIN, run_name="__main__")


class Run:
    """train.py in the folder cwd with TINY's knobs, unless `plain`, and the given ones: forked, or by command."""

    def __init__(self, cwd, *argv, plain=False, processes=1, command=None, file_limit=None, env={}, **knobs):
        self.cwd, self.folder = cwd, cwd / knobs.get("out_dir", "run")
        knobs = knobs if plain else {**TINY, **knobs}
        argv = [*argv, *(f"--{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in knobs.items())]
        for name in ("stdout", "stderr"):
            (cwd / name).unlink(missing_ok=True)
        self.popen, self.forks = None, []
        if command:
            files = [open(cwd / name, "a") for name in ("stdout", "stderr")]
            self.popen = subprocess.Popen([*command, TRAIN, *argv], cwd=cwd, env={**ENV, **env}, stdin=subprocess.DEVNULL,
                                          stdout=files[0], stderr=files[1], start_new_session=True)
            self.pid = self.popen.pid
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(processes):
            environment = {} if processes == 1 else dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            self.forks.append(FORKS.Process(target=run_as_main, args=(cwd, argv, environment, file_limit)))
            self.forks[-1].start()
        self.pid = self.forks[0].pid

    def running(self):
        return self.popen.poll() is None if self.popen else any(p.is_alive() for p in self.forks)

    def wait(self, status=0):
        """Until it ends, with this exit status, or one of these, on every process."""
        wait_for(lambda: not self.running(), f"the end of {self.cwd}", kill=self)
        self.statuses = [self.popen.returncode] if self.popen else [p.exitcode for p in self.forks]
        self.out, self.err = (Path(self.cwd / n).read_text(errors="replace") for n in ("stdout", "stderr"))
        if status is not None:
            assert {*self.statuses} <= ({*status} if isinstance(status, tuple) else {status}), (self.statuses, self.err[-3000:])
        return self

    def kill(self):
        for p in [self.popen] if self.popen else self.forks:
            p.kill()

    def log(self):
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

    def step(self):
        return max([entry["step"] for entry in self.log()], default=0)

    def values(self, key):
        return {entry["step"]: entry[key] for entry in self.log() if key in entry}

    def checkpoint(self):
        return torch.load(self.folder / "ckpt.pt", weights_only=True, map_location="cpu")

    def complaint(self, *words):
        """The one line on stderr, beside the progress bar, without traceback, with these words in it."""
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
                what += f"; {[p.exitcode for p in kill.forks]}, stderr: {(kill.cwd / 'stderr').read_text()[-2000:]}"
            pytest.fail(f"{'it ended' if ended else f'{seconds} s were not enough'}, waiting for {what}")
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


# ---------------------------------------------------------------- the model

SMALL = GPTConfig(vocab_size=96, block_size=48, n_layer=3, n_head=4, n_embd=48)


@pytest.fixture
def small():
    torch.manual_seed(0)
    gpt = GPT(SMALL)
    for p in gpt.parameters():  # larger than at the start, so that every part shows in the logits; gains that differ
        p.data.mul_(3) if p.ndim == 2 else p.data.uniform_(0.5, 1.5)
    return gpt


def test_model_is_arcee(small):
    """An independent implementation with the same weights gives the same logits."""
    transformers = pytest.importorskip("transformers")
    c = SMALL
    hf = transformers.ArceeForCausalLM(transformers.ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, hidden_act="relu2", max_position_embeddings=c.block_size,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)).eval()
    names = {"wte.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for i in range(c.n_layer):
        for ours, theirs in {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.up_proj",
                             "mlp.down": "mlp.down_proj", **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}}.items():
            names[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    state = {names[k]: v for k, v in small.state_dict().items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    idx = torch.randint(0, c.vocab_size, (2, c.block_size))
    with torch.no_grad():
        assert (small(idx) - hf(idx).logits).abs().max() < 1e-5


def test_loss(small, monkeypatch):
    """The mean over targets that are not -1, the same in chunks as in one piece, with the same gradients."""
    idx, targets = torch.randint(0, 96, (2, 3, 48)).unbind()
    targets[1, 7:] = -1
    expected = F.cross_entropy(small(idx).double().flatten(0, 1), targets.flatten(), ignore_index=-1)
    grads = torch.autograd.grad(expected, list(small.parameters()))
    for chunk, cached in ((4096, 2**20), (4096, 7 * 96), (50, 7 * 96), (1, 1)):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", chunk)
        monkeypatch.setattr(model_module, "CACHED_LOGITS", cached)
        loss = small(idx, targets)
        assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < 1e-6
        for g, h in zip(torch.autograd.grad(loss, list(small.parameters())), grads):
            assert (g - h).abs().max() < 1e-6
    assert small(idx, torch.full_like(idx, -1)).item() == 0


def test_causal(small):
    idx = torch.randint(0, 96, (1, 48))
    other = idx.clone()
    other[0, 30] = (other[0, 30] + 1) % 96
    changed = (small(idx) - small(other)).abs().amax(-1)[0]
    assert changed[:30].max() == 0 and changed[30:].min() > 0
    with pytest.raises(ValueError, match="block_size"):
        small(torch.zeros(1, 49, dtype=torch.long))


def test_generate(small):
    """Any length, reproducible, inside the vocabulary; temperature 0 and top_k 1 take the likeliest token."""
    idx = torch.randint(0, 96, (2, 5))
    seeded = lambda seed=0, **k: small.generate(idx, 60, generator=torch.Generator().manual_seed(seed), **k)
    assert seeded().shape == (2, 65) and torch.equal(seeded()[:, :5], idx)
    assert torch.equal(seeded(), seeded()) and not torch.equal(seeded(), seeded(1))
    assert torch.equal(seeded(top_k=1), seeded(temperature=0)) and torch.equal(seeded(temperature=0), seeded(5, temperature=0))
    assert small.generate(idx, 1, temperature=0)[0, -1] == small(idx)[0, -1].argmax()
    assert seeded(vocab_size=20, temperature=5.0)[:, 5:].max() < 20
    top = small(idx)[:, -1].topk(3).indices
    draws = torch.cat([small.generate(idx, 1, top_k=3, temperature=3.0)[:, -1:] for _ in range(30)], 1)
    assert all({*row.tolist()} == {*allowed.tolist()} for row, allowed in zip(draws, top))


@pytest.mark.parametrize("config", sorted(REPO.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_config_builds_its_optimizer(config):
    cfg = train.parse([str(config), "--device=cpu", "--n_layer=1"])
    with torch.device("meta"):
        gpt = GPT(GPTConfig(64, cfg.block_size, 1, cfg.n_head, cfg.n_embd))
    assert cfg.max_tokens and [group["lr"] for group in train.build_optimizer(cfg, gpt).param_groups]


@pytest.mark.parametrize("config, count", [("125m_sf", 123_587_328), ("772m_sf", 772_271_360)])
def test_sizes(config, count):
    cfg = train.parse([str(REPO / f"configs/{config}.py"), "--device=cpu"])
    with torch.device("meta"):
        gpt = GPT(GPTConfig(50304, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    assert sum(p.numel() for p in gpt.parameters()) == count
    L, D, T = cfg.n_layer, cfg.n_embd, cfg.block_size
    products = L * (4 * D * D + 2 * D * 4 * D + 2 * T * D) + 50304 * D  # multiply-adds per token, forward
    assert gpt.flops_per_token() == 3 * 2 * products
    assert {p.shape for p in gpt.hidden_matrices()} == {(D, D), (4 * D, D), (D, 4 * D)} and len(gpt.hidden_matrices()) == 6 * L


# ---------------------------------------------------------------- config

def test_parse(tmp_path, monkeypatch):
    """The command line wins over the config, the last flag over the first, numbers in any notation."""
    config = tmp_path / "mine.py"
    config.write_text("# comment\nlr = 1\nn_layer = 3\nmax_tokens = 2.5e9\nbetas = [0.5, 0.25]\ncompile = False\n")
    cfg = train.parse([str(config), "--n_layer=4", "--n_layer=5", "--device=cpu"])
    assert (cfg.lr, cfg.n_layer, cfg.max_tokens, cfg.betas, cfg.compile) == (1.0, 5, 2_500_000_000, (0.5, 0.25), False)
    assert type(cfg.lr) is float and type(cfg.max_tokens) is int and cfg.out_dir == "runs/mine" and cfg.dtype == "float32"
    for text, tokens in (("2.5e9", 2_500_000_000), ("2_500_000_000", 2_500_000_000), ("0", 0)):
        assert train.parse([f"--max_tokens={text}", "--device=cpu"]).max_tokens == tokens
    for text, value in (("0.9,0.99", (0.9, 0.99)), ("(0.9, 0.99)", (0.9, 0.99)), ("[1, 0]", (1.0, 0.0))):
        assert train.parse([f"--betas={text}", "--device=cpu"]).betas == value
    for text, value in (("True", True), ("False", False), ("true", True), ("false", False)):
        assert train.parse([f"--resume={text}", "--device=cpu"]).resume is value
    assert train.parse(["--out_dir=1e3", "--device=cpu"]).out_dir == "1e3"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs(path):
    """Every config parses, fits one process and eight, and gives an optimizer."""
    cfg = train.parse([str(path), "--device=cpu"])
    assert cfg.out_dir == f"runs/{path.stem}" and (cfg.total_batch_tokens // cfg.block_size) % (cfg.batch_size * 8) % 8 == 0
    with torch.device("meta"):
        gpt = GPT(GPTConfig(512, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    train.build_optimizer(cfg, gpt)


def test_help(tmp_path):
    run = Run(tmp_path, "--help", plain=True).wait()
    assert all(re.search(rf"\b{name}\b", run.out) for name in vars(train.Config())) and not tree(tmp_path)


def test_knobs_reach_the_optimizer():
    """Matrices and the rest in groups of their own, with every ablation."""
    with torch.device("meta"):
        gpt = GPT(SMALL)

    def groups(*argv):
        optimizer = train.build_optimizer(train.parse(["--device=cpu", "--weight_decay=0.3", "--adam_weight_decay=0.4", *argv]), gpt)
        matrices = {id(p) for p in gpt.hidden_matrices()}
        assert [{id(p) in matrices for p in g["params"]} for g in optimizer.param_groups] == [{True}, {False}]
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(gpt.parameters()))
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.4]
        return optimizer.param_groups

    knobs = dict(decay_at="y", momentum=0.25, normalize_rows=False, ns_steps=3, warmup_steps=7, lr=0.5,
                 averaging_power=2.0, beta_power=0.5)
    a, b = groups(*(f"--{k}={v}" for k, v in knobs.items()), "--adam_lr=0.125", "--adam_betas=0.5,0.6", "--betas=0.7,0.8")
    assert {k: a[k] for k in knobs} == knobs and a["use_muon"] and a["betas"] == (0.7, 0.8)
    assert (b["lr"], b["betas"], b["decay_at"], b["warmup_steps"], b["use_muon"]) == (0.125, (0.5, 0.6), "y", 7, False)
    a, b = groups("--optimizer=sf_adamw", "--betas=0.7,0.8", "--lr=0.5", "--decay_at=none")
    assert {(g["use_muon"], g["betas"], g["lr"], g["decay_at"]) for g in (a, b)} == {(False, (0.7, 0.8), 0.5, "none")}
    a, b = groups("--optimizer=normuon", "--momentum=0.25", "--normalize_rows=False", "--ns_steps=3")
    assert (a["momentum"], a["normalize_rows"], a["ns_steps"], a["use_muon"], b["use_muon"]) == (0.25, False, 3, True, False)
    a, b = groups("--optimizer=muon", "--momentum=0.25", "--ns_steps=3", "--adam_betas=0.5,0.6")
    assert (a["momentum"], a["ns_steps"], b["betas"]) == (0.25, 3, (0.5, 0.6))
    a, b = groups("--optimizer=adamw", "--betas=0.7,0.8")
    assert a["betas"] == b["betas"] == (0.7, 0.8)
    knobs = dict(momentum=0.25, ns_steps=3, warmup_steps=7, rho=0.5, averaging_power=2.0, lr=0.5)
    a, b = groups("--optimizer=amuse", *(f"--{k}={v}" for k, v in knobs.items()), "--adam_lr=0.125", "--adam_betas=0.5,0.6")
    assert {k: a[k] for k in knobs} == knobs and a["use_muon"] and not b["use_muon"]
    assert {**knobs, "lr": 0.125} == {k: b[k] for k in knobs} and b["betas"] == (0.5, 0.6) and a["betas"] == (0.9, 0.95)
    knobs = dict(warmup_steps=7, averaging_power=2.0, averaging_start=9, polyak_beta=0.5, beta_anneal_steps=11, lr=0.5)
    for g in groups("--optimizer=schedulefree_plus", *(f"--{k}={v}" for k, v in knobs.items()), "--betas=0.7,0.8"):
        assert {k: g[k] for k in knobs} == knobs and g["betas"] == (0.7, 0.8)


def bad_shard(header):
    return lambda cwd: (cwd / "bad/x_train_000000.bin").write_bytes(np.array(header + [0] * 253, "<i4").tobytes() + b"\0" * 400)


BAD = {  # name: (arguments, status, what the line must name[, how the working directory is prepared])
    "misspelt": (["--wieght_decay=1"], 2, ["wieght_decay", "'weight_decay'"]),
    "misspelt_in_config": (["c.py"], 2, ["c.py", "n_layers", "'n_layer'"], "n_layers = 2"),
    "no_equals": (["--lr", "0.1"], 2, ["0.1"]),
    "no_value": (["--lr"], 2, ["--lr="]),
    "empty_value": (["--lr="], 2, ["lr"]),
    "word_for_number": (["--lr=fast"], 2, ["lr", "fast"]),
    "fraction": (["--n_layer=2.5"], 2, ["n_layer", "2.5"]),
    "infinite": (["--lr=1e999"], 2, ["lr", "inf"]),
    "overflowing": (["--lr=1e300"], 2, ["lr", "1e+300"]),
    "nan_beta": (["c.py"], 2, ["beta"], "betas = float('nan'), 0.9"),
    "bool": (["--resume=maybe"], 2, ["resume", "maybe"]),
    "int_for_bool": (["--resume=2"], 2, ["resume", "2"]),
    "one_beta": (["--betas=0.9"], 2, ["betas"]),
    "type_in_config": (["c.py"], 2, ["c.py", "out_dir"], "out_dir = 3"),
    "config_missing": (["nope.py"], 2, ["nope.py"]),
    "config_folder": (["data"], 2, ["data"]),
    "config_syntax": (["c.py"], 2, ["c.py", "SyntaxError"], "lr = = 3"),
    "config_binary": (["c.py"], 2, ["c.py"], "\0\1\2"),
    "config_raises": (["c.py"], 2, ["c.py", "ZeroDivisionError"], "lr = 1/0"),
    "config_exits": (["c.py"], 2, ["c.py"], "raise SystemExit(0)"),
    "config_imports": (["c.py"], 2, ["c.py", "math"], "import math"),
    "two_configs": (["c.py", "d.py"], 2, ["c.py d.py"]),
    "heads": (["--n_head=5"], 2, ["n_embd", "n_head"]),
    "odd_heads": (["--n_head=32"], 2, ["n_embd", "n_head"]),
    "batch": (["--total_batch_tokens=1000"], 2, ["total_batch_tokens", "block_size"]),
    "batch_size": (["--batch_size=5"], 2, ["total_batch_tokens", "batch_size"]),
    "zero": (["--n_layer=0"], 2, ["n_layer"]),
    **{key: ([f"--{key}=-0.5"], 2, [key, "-0.5"]) for key in ("lr", "adam_lr", "weight_decay", "grad_clip", "min_lr_ratio",
                                                                     "rho", "averaging_power", "beta_power")},
    **{key: ([f"--{key}=-1"], 2, [key, "-1"]) for key in ("averaging_start", "beta_anneal_steps")},
    "amuse_warmup": (["--optimizer=amuse", "--warmup_steps=1"], 2, ["warmup_steps", "2"]),
    "polyak_beta": (["--optimizer=schedulefree_plus", "--polyak_beta=1"], 2, ["polyak_beta", "1"]),
    "seed": (["--seed=-1"], 2, ["seed"]),
    "betas": (["--betas=1.5,0.9"], 2, ["beta"]),
    "momentum": (["--momentum=1"], 2, ["momentum"]),
    "adamw_betas": (["--optimizer=adamw", "--betas=0.9,1"], 2, ["beta"]),
    "muon_steps": (["--optimizer=muon", "--ns_steps=200"], 2, ["200"]),
    "optimizer": (["--optimizer=adam"], 2, ["sf_normuon", "sf_adamw", "adamw", "normuon", "muon", "amuse",
                                                   "schedulefree_plus"]),
    "schedule": (["--schedule=cos", "--optimizer=adamw"], 2, ["constant", "cosine", "linear", "wsd"]),
    "no_horizon": (["--schedule=cosine", "--optimizer=adamw", "--max_tokens=0"], 2, ["max_tokens"]),
    **{f"{name}_schedule": (["--schedule=cosine", f"--optimizer={name}"], 2, ["schedule", name])
       for name in ("sf_normuon", "amuse", "schedulefree_plus")},
    "decay_at": (["--decay_at=x"], 2, ["decay_at"]),
    "dtype": (["--dtype=float16"], 2, ["dtype", "bfloat16"]),
    "device": (["--device=tpu9"], 2, ["device", "tpu9"]),
    "device_meta": (["--device=meta"], 2, ["device", "meta"]),
    "too_wide": (["--n_embd=1e9"], (1, 2), []),
    "many_sequences": (["--total_batch_tokens=64e12", "--batch_size=7"], 2, ["batch_size"]),
    "data_missing": (["--data_dir=nope"], 2, ["nope"]),
    "data_missing_stdlib": (["--data_dir=./data2/stdlib"], 2, ["data2/stdlib"]),
    "data_is_a_file": (["--data_dir=data/meta.json"], 2, ["data/meta.json"]),
    "data_empty": (["--data_dir=bad"], 2, ["bad"], lambda cwd: [p.unlink() for p in (cwd / "bad").iterdir()]),
    "no_val": (["--data_dir=bad"], 2, ["bad", "val"], lambda cwd: (cwd / "bad/x_val_000000.bin").unlink()),
    "no_train": (["--data_dir=bad"], 2, ["bad", "train"], lambda cwd: [p.unlink() for p in (cwd / "bad").glob("*train*")]),
    "magic": (["--data_dir=bad"], 1, ["x_train_000000.bin", "77"], bad_shard([77, 1, 200])),
    "version": (["--data_dir=bad"], 1, ["x_train_000000.bin", "version 9"], bad_shard([20240520, 9, 200])),
    "length": (["--data_dir=bad"], 1, ["x_train_000000.bin", "201"], bad_shard([20240520, 1, 201])),
    "short_file": (["--data_dir=bad"], 1, ["x_val"], lambda cwd: (cwd / "bad/x_val_000000.bin").write_bytes(b"abc")),
    "block_size": (["--block_size=1e6", "--total_batch_tokens=1e6", "--batch_size=1"], (1, 2), ["block_size"]),
    "meta": (["--data_dir=bad"], 1, ["meta.json"], lambda cwd: (cwd / "bad/meta.json").write_text("{")),
    "vocab": (["--vocab_size=256"], 2, ["vocab_size 256", "257"]),
    "out_dir_under_file": (["--out_dir=file/run"], (1, 2), ["file"], lambda cwd: (cwd / "file").write_text("")),
    "stdlib_under_file": (["--data_dir=data/stdlib"], (1, 2), ["data"],
                          lambda cwd: ((cwd / "data").unlink(), (cwd / "data").write_text(""))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cwd, data, case):
    """One line that names the thing, the right exit status, nothing made, nothing lost."""
    argv, status, words, prepare, *_ = *BAD[case], lambda cwd: None
    if isinstance(prepare, str):
        (cwd / "c.py").write_text(prepare)
    else:
        shutil.copytree(data, cwd / "bad")
        prepare(cwd)
    before = tree(cwd)
    knobs = {k: v for k, v in TINY.items() if not any(a.startswith(f"--{k}=") for a in argv) and f"{k} =" not in str(prepare)}
    Run(cwd, *argv, plain=True, **knobs).wait(status).complaint(*words)
    assert tree(cwd) == before


def test_bad_input_under_torchrun(cwd):
    """The line comes out, once, although torchrun ends all processes as soon as the first one, here rank 1, fails."""
    (cwd / "c.py").write_text("__import__('time').sleep(4 * (__import__('os').environ['RANK'] == '0'))\nlrr = 1\n")
    run = Run(cwd, "c.py", command=torchrun(2), plain=True).wait(1)
    assert re.findall(r"^train.py: .*", run.err, re.M) == ["train.py: c.py: unknown knob 'lrr'; did you mean 'lr'?"], run.err


# ---------------------------------------------------------------- runs

def validation_loss(data, gpt, weights):
    validation = TokenBatches(str(data), "val", 64, 320)
    gpt.load_state_dict(weights)
    with torch.no_grad():
        return float(torch.stack([gpt(*validation.get([i])) for i in range(11)]).double().mean())


def test_contract(reference, data):
    """config.json, log.jsonl and ckpt.pt hold what is promised, and the model in the checkpoint is the averaged one."""
    cfg = json.loads((reference.folder / "config.json").read_text())
    assert cfg.keys() == vars(train.Config()).keys() and cfg["lr"] == 0.02 and cfg["betas"] == [0.9, 0.95]
    entries = reference.log()
    steps, evals = [e for e in entries if "loss" in e], [e for e in entries if "val_loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 13)) and [e["step"] for e in evals] == [4, 8, 12]
    for e in entries:
        assert e["tokens"] == e["step"] * BATCH
    for e in steps:
        assert e.keys() >= {"step", "tokens", "loss", "lr", "tokens_per_second"} and "mfu" not in e
        assert e["lr"] == pytest.approx(0.02 * min(1, e["step"] / 4))
    assert evals[0]["train_time_s"] < evals[1]["train_time_s"] < evals[2]["train_time_s"] and evals[2]["rho"] > 0
    ckpt = reference.checkpoint()
    assert ckpt.keys() >= {"model", "model_config", "optimizer", "config", "step", "tokens"}
    assert ckpt["step"] == 12 and ckpt["tokens"] == 12 * BATCH and ckpt["config"].keys() == cfg.keys()
    gpt = GPT(GPTConfig(**ckpt["model_config"]))
    assert gpt.config.vocab_size == 320
    assert all(type(v) in (torch.Tensor, int, float, str, bool, type(None)) for v in flat(ckpt).values())
    assert {k: v.shape for k, v in ckpt["model"].items()} == {k: v.shape for k, v in gpt.state_dict().items()}
    loss = lambda weights: validation_loss(data, gpt, weights)
    assert loss(ckpt["model"]) == pytest.approx(evals[2]["val_loss"], abs=1e-5)
    names, state = [n for n, p in gpt.named_parameters()], ckpt["optimizer"]["state"]
    order = [n for n in names if gpt.get_parameter(n).ndim == 2 and n != "wte.weight"]
    order += [n for n in names if n not in order]
    z = {n: state[i]["z"] for i, n in enumerate(order)}
    y = {n: ckpt["model"][n].lerp(z[n], 0.1 if gpt.get_parameter(n).ndim == 2 and n != "wte.weight" else 0.05) for n in names}
    assert abs(loss(z) - evals[2]["val_loss"]) > 1e-3 and abs(loss(y) - evals[2]["val_loss"]) > 1e-5  # x is neither z nor y
    assert all(x in reference.out for x in ("parameters", "tokens per step", "run/ckpt.pt", "finished"))
    assert not list(reference.folder.glob("*.tmp"))


@pytest.mark.parametrize("n, by", [(2, "torchrun"), (3, "fork")])
def test_processes(cwd, reference, n, by):
    """The number of processes changes nothing but rounding, in losses, weights and optimizer state, and evaluations
    change nothing at all, even where no checkpoint follows them."""
    run = Run(cwd, processes=n, command=torchrun(n) if by == "torchrun" else None, checkpoint_interval=10**6,
              env={"PYTHONIOENCODING": "ascii"}).wait()
    for key in ("loss", "val_loss", "lr", "grad_norm", "rho", "alpha"):
        assert run.values(key) == pytest.approx(reference.values(key), abs=2e-5), key
    assert_same(run.checkpoint(), reference.checkpoint(), 1e-5)
    assert run.out.count("finished: the model is in") == 1 and f"{n} processes" in run.out


def test_nothing_is_compiled_after_the_first_steps(cwd, data, monkeypatch):
    """By torch's own count of compiled graphs; without the compiler's code generation, which has no part in that."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="eager"))
    cfg = train.Config(**TINY | dict(compile=True, dtype="bfloat16", data_dir=str(data)))
    batches, val, _, vocab_size = train.open_data(cfg)
    model = train.build_model(cfg, vocab_size)
    optimizer = train.build_optimizer(cfg, model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for step in range(8):
        train.gradient(cfg, model, batches, step)
        optimizer.step()
        model.zero_grad()
        if step in (2, 5):
            train.evaluate(cfg, model, val)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and graphs[2:] == [graphs[2]] * 6


COMPILED = dict(n_layer=1, eval_interval=99, max_tokens=3 * BATCH)


@pytest.mark.parametrize("knobs", [dict(batch_size=12, activation_checkpointing=True), dict(batch_size=3), "compile"], ids=str)
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
    "constant": lambda t: 1, "linear": lambda t: (N - t) / (N - W), "wsd": lambda t: min(1, (N - t) / 24),
    "cosine": lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * (t - W) / (N - W)))}


OWN = {  # what their state must carry over a resume
    "sf_adamw": dict(averaging_power=2.0, beta_power=0.5),
    "amuse": dict(betas=(0.6, 0.99), adam_betas=(0.6, 0.99), averaging_power=1.0),
    "schedulefree_plus": dict(betas=(0.3, 0.99), adam_lr=0.15, grad_clip=0, averaging_start=20, averaging_power=1.0,
                              polyak_beta=0.9, beta_anneal_steps=50)}


@pytest.mark.parametrize("optimizer, schedule, lr", [
    ("sf_normuon", "constant", 0.03), ("sf_adamw", "constant", 0.01), ("adamw", "cosine", 0.01), ("normuon", "linear", 0.03),
    ("muon", "wsd", 0.03), ("amuse", "constant", 0.03), ("schedulefree_plus", "constant", 0.15)])
def test_optimizers(cwd, place, data, tokens, optimizer, schedule, lr):
    """Each learns more than the frequencies of the bytes, on a schedule that ends where it should, killed and resumed
    without a trace, the same on two processes, and leaves the model that it evaluated."""
    knobs = dict(optimizer=optimizer, schedule=schedule, max_tokens=N * BATCH, warmup_steps=W, lr=lr, adam_lr=0.01,
                 n_embd=48, eval_interval=60, checkpoint_interval=20, batch_size=6) | OWN.get(optimizer, {})
    whole, part, two = Run(cwd, **knobs), Run(place("part"), **knobs), Run(place("two"), processes=2, **knobs)
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
    assert validation_loss(data, gpt, ckpt["model"]) == pytest.approx(whole.values("val_loss")[N], abs=1e-5)
    if "beta" in ckpt["optimizer"].get("param_groups", [{}])[0]:
        assert all(not g["train_mode"] and g["step"] == N and g["beta"] > 0.6 for g in ckpt["optimizer"]["param_groups"])
    assert_same(part.wait().checkpoint(), ckpt)
    rounding = 0.03 if optimizer == "muon" else 2e-4  # torch's computes in bfloat16
    late = two.wait().values("loss")  # from step 21 on by one process; rounding grows from step to step
    for t in (*range(1, 11), 21, 22):
        assert (early if t < 20 else late)[t] == pytest.approx(whole.values("loss")[t], abs=rounding * (1 if t < 20 else 10)), t


def test_grad_clip(cwd, place):
    """The gradient is scaled to the norm grad_clip, the logged norm is that before; 0 does not clip."""
    runs = [Run(place("clip"), optimizer="adamw", weight_decay=0, adam_weight_decay=0, lr=0.01, grad_clip=clip)
            for clip in (1e-13, 0)]
    small, none = [run.wait().values("val_loss") for run in runs]
    assert abs(small[12] - small[4]) < 1e-3 and none[12] < none[4] - 0.1  # below eps, AdamW stands still
    assert runs[0].values("grad_norm")[1] == pytest.approx(runs[1].values("grad_norm")[1]) and runs[0].values("grad_norm")[1] > 0.1


def test_out_of_memory(cwd):
    Run(cwd, batch_size=10**9, total_batch_tokens=64 * 10**9, max_tokens=0).wait(1).complaint("out of memory", "batch_size")


def test_last_step_not_finite(cwd):
    """A model that was broken by the very last step is not announced as finished."""
    Run(cwd, optimizer="adamw", lr=1e38, warmup_steps=0, max_tokens=BATCH).wait(1).complaint("step 1")


def test_same_batches_and_weights(cwd, reference, place):
    """Another optimizer meets the same first batch at the same weights; another seed does not."""
    runs = [Run(place("k"), max_tokens=BATCH, **knobs) for knobs in (dict(optimizer="adamw"), dict(seed=1), dict(lr=0))]
    first, seed, still = [run.wait().values("loss")[1] for run in runs]
    assert first == reference.values("loss")[1] == still and seed != first


def test_bfloat16(cwd, place):
    """Weights, state and losses stay float32 while the products are bfloat16, on two processes as on one, and no operation
    warns that the types of its arguments make it slow."""
    run = Run(cwd, dtype="bfloat16").wait()
    two = Run(place("two"), processes=2, dtype="bfloat16").wait()
    assert "Warning" not in run.err + two.err
    assert two.values("loss") == pytest.approx(run.values("loss"), abs=5e-3)
    assert two.values("loss")[1] == pytest.approx(run.values("loss")[1], abs=1e-5)
    assert all(v.dtype == torch.float32 for k, v in flat(run.checkpoint()).items() if isinstance(v, torch.Tensor))
    assert run.values("loss")[12] < run.values("loss")[1] - 0.5


# ---------------------------------------------------------------- stopping and resuming

def test_resume_contract(cwd, reference):
    """What a finished run does when it is started again: says so, goes on, refuses, or starts anew and says so."""
    shutil.copytree(reference.folder, cwd / "run")
    before = tree(cwd)
    run = Run(cwd).wait()
    assert "finished" in run.out and not run.err and {**tree(cwd), "run/.lock": b""} == {**before, "run/.lock": b""}
    for key, value in dict(n_layer=1, n_embd=64, optimizer="adamw", lr=0.01, seed=3, total_batch_tokens=2 * BATCH, vocab_size=512,
                           betas=(0.8, 0.95), data_dir="./data", decay_at="y").items():
        Run(cwd, **{key: value}).wait(2).complaint(key, "ckpt.pt")
    assert {**tree(cwd), "run/.lock": b""} == {**before, "run/.lock": b""}
    shutil.move(cwd / "run", cwd / "moved")
    free = dict(out_dir="moved", max_tokens=14 * BATCH, eval_interval=7, log_interval=2, checkpoint_interval=5, batch_size=4,
                activation_checkpointing=True)
    run = Run(cwd, **free).wait()
    assert "at step 12" in run.out and run.checkpoint()["step"] == 14 and run.values("loss").keys() == {*range(1, 13), 14}
    longer = Run(cwd, max_tokens=14 * BATCH).wait()
    assert_same(run.checkpoint(), longer.checkpoint(), 1e-5)
    run = Run(cwd, max_tokens=2 * BATCH, resume=False).wait()
    assert re.search(r"replac.*run", run.out) and run.checkpoint()["step"] == 2 and run.step() == 2
    (run.folder / "ckpt.pt").unlink()
    (run.folder / "log.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    run = Run(cwd, max_tokens=2 * BATCH).wait()
    assert list(run.values("loss")) == [1, 2]


def test_log_is_cut(cwd, reference):
    """Lines after the checkpoint and a half-written one go, the others stay as they are."""
    run = Run(cwd, max_tokens=8 * BATCH).wait()
    log = run.folder / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    run = Run(cwd).wait()
    assert log.read_bytes().startswith(whole) and list(run.values("loss")) == list(range(1, 13))
    assert [e["step"] for e in run.log() if "loss" in e] == list(range(1, 13))
    assert_same(run.checkpoint(), reference.checkpoint())
    log.write_bytes(whole.rstrip(b"\n"))  # a line that lost its end of line is whole all the same
    run = Run(cwd, max_tokens=13 * BATCH).wait()
    assert run.step() == 13


LONG = dict(max_tokens=60 * BATCH, checkpoint_interval=3, eval_interval=5)
SOAK = pytest.mark.skipif(not os.environ.get("SOAK"), reason="long: SOAK=1")


def assert_uninterrupted(run, whole):
    assert_same(run.checkpoint(), whole.checkpoint())
    entries = [(e["step"], "loss" in e) for e in run.log()]
    assert len(entries) == len({*entries}) and {*entries} == {(e["step"], "loss" in e) for e in whole.log()}
    for key in ("loss", "val_loss"):
        assert run.values(key) == whole.values(key)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=SOAK)])
def test_kill(cwd, place, kills):
    """kill -9 at any moment, the same command again: in the end bitwise as if nothing had happened."""
    long = LONG | {"max_tokens": 30 * kills * BATCH}
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, whole = random.Random(seed), Run(place("whole"), **long)
    for _ in range(kills):
        run = Run(cwd, **long)
        target = run.step() + rng.randint(1, 28)
        wait_for(lambda: run.step() >= target or not run.running(), f"step {target}", kill=run)
        time.sleep(rng.random() * 0.1)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(-9)
    run = Run(cwd, **long).wait()
    assert_uninterrupted(run, whole.wait())


@pytest.mark.parametrize("processes, kills", [(2, 2), pytest.param(2, 20, marks=SOAK), pytest.param(3, 20, marks=SOAK)])
def test_kill_torchrun(cwd, place, processes, kills):
    """The same on several, of which torchrun is killed first (its orphans end within 5 seconds) and then a worker."""
    long = LONG | {"max_tokens": 30 * kills * BATCH}
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, whole = random.Random(seed), Run(place("whole"), processes=processes, **long)
    for i in range(kills):
        run = Run(cwd, command=torchrun(processes), **long)
        target = run.step() + rng.randint(1, 28)
        wait_for(lambda: run.step() >= target or not run.running(), f"step {target}", kill=run)
        workers = children(run.pid)
        assert len(workers) == processes
        time.sleep(rng.random() * 0.1)
        os.kill(run.pid if i % 2 == 0 else rng.choice(workers), signal.SIGKILL)
        if i % 2 == 0:
            wait_for_end(workers, 5)
        run.wait((-9, 1))
        assert not any(map(alive, workers))
        assert 'train.py", line' not in run.err, run.err
    run = Run(cwd, command=torchrun(processes), **long).wait()
    assert_uninterrupted(run, whole.wait())


def test_early_end(cwd):
    """torchrun killed while its workers still import torch: they end too. Ctrl-C at that time: no traceback."""
    run = Run(cwd, command=torchrun(2), max_tokens=0)
    wait_for(lambda: len(children(run.pid)) == 2, "workers", kill=run)
    workers = children(run.pid)
    time.sleep(0.5)
    os.kill(run.pid, signal.SIGKILL)
    run.wait(-9)
    wait_for_end(workers, 30)
    assert not (cwd / "run").exists()
    run = Run(cwd, command=[sys.executable], max_tokens=0)
    wait_for(lambda: "torch" in Path(f"/proc/{run.pid}/maps").read_text(), "torch", kill=run)
    os.kill(run.pid, signal.SIGINT)
    run.wait(None)
    assert "Traceback" not in run.err and not (cwd / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop(cwd, place, number):
    """The step is finished and saved, exit status 0, and the same command goes on."""
    knobs = dict(max_tokens=0, checkpoint_interval=10**6)
    run = Run(cwd, command=[sys.executable], **knobs)
    wait_for(lambda: run.step() >= 5, "step 5", kill=run)
    os.kill(run.pid, number)
    os.kill(run.pid, number)
    step = run.wait().step()
    assert run.checkpoint()["step"] == step and f"stopped after step {step}" in run.out and "goes on" in run.out
    short = Run(place("short"), **{**knobs, "max_tokens": step * BATCH}).wait()  # saves an evaluated model
    assert_same(run.checkpoint(), short.checkpoint(), 1e-5, ["model", "step"])
    end = dict(max_tokens=(step + 5) * BATCH, checkpoint_interval=10**6)
    run = Run(cwd, **end).wait()
    whole = Run(place("whole"), **end).wait()
    assert_same(run.checkpoint(), whole.checkpoint(), 1e-4, ["model", "step"])
    assert run.values("loss") == pytest.approx(whole.values("loss"), abs=2e-5)


def test_stop_torchrun_and_resume_on_other_numbers(cwd, place, reference):
    """SIGTERM to torchrun: both workers save and end by themselves. 1 and 3 processes go on from there."""
    run = Run(cwd, command=torchrun(2), max_tokens=0, checkpoint_interval=10**6)
    wait_for(lambda: run.step() >= 3, "step 3", kill=run)
    workers = children(run.pid)
    os.kill(run.pid, signal.SIGTERM)
    run.wait(1)
    step = run.step()
    assert run.checkpoint()["step"] == step and f"stopped after step {step}" in run.out and not any(map(alive, workers))
    assert 'train.py", line' not in run.err, run.err
    end = dict(max_tokens=(step + 6) * BATCH)
    whole = Run(place("whole"), **end)
    three = place("three")
    shutil.copytree(run.folder, three / "run")
    runs = [Run(cwd, **end), Run(three, processes=3, **end)]
    whole.wait()
    for run in runs:
        run.wait()
        assert run.values("loss") == pytest.approx(whole.values("loss"), abs=2e-5)
        assert_same(run.checkpoint(), whole.checkpoint(), 1e-5)


def test_two_runs_in_one_folder(background):
    """The second is refused after a wait, and the first does not notice."""
    first, second = background["first"], background["second"]
    second.wait((1, 2)).complaint("run")
    assert json.loads((first.folder / "config.json").read_text())["lr"] == 0.02 and first.running()
    os.kill(first.pid, signal.SIGTERM)
    os.kill(first.pid, signal.SIGCONT)
    step = first.wait().step()
    assert first.checkpoint()["step"] == step and list(first.values("loss")) == list(range(1, step + 1))


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "other", "names", "groups", "folder"])
def test_damaged_checkpoint(cwd, reference, damage):
    """One line, and nothing is touched; --resume=False goes over it."""
    (cwd / "run").mkdir()
    path, whole = cwd / "run/ckpt.pt", (reference.folder / "ckpt.pt").read_bytes()
    if damage == "other":
        torch.save({"model": {}, "config": 3, "optimizer": {}, "step": 1, "train_time_s": 1.0}, path)
    elif damage == "names":
        saved = reference.checkpoint()
        torch.save({**saved, "model": {f"_orig_mod.{name}": value for name, value in saved["model"].items()}}, path)
    elif damage == "groups":
        saved = reference.checkpoint()
        groups = saved["optimizer"]["param_groups"][:1]
        torch.save({**saved, "optimizer": {**saved["optimizer"], "param_groups": groups}}, path)
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"truncated": whole[:-len(whole) // 3], "empty": b"", "noise": random.Random(0).randbytes(99999)}[damage])
    (cwd / "run/log.jsonl").write_text('{"step": 1}\n')
    before = tree(cwd)
    Run(cwd).wait(1).complaint("run/ckpt.pt", "--resume=False")
    assert {k: v for k, v in tree(cwd).items() if k != "run/.lock"} == before
    if damage != "folder":
        assert Run(cwd, max_tokens=BATCH, resume=False).wait().checkpoint()["step"] == 1


def test_data_made_anew(cwd, reference, tokens):
    """Resuming over shards with another vocabulary is one line too."""
    shutil.copytree(reference.folder, cwd / "run")
    (cwd / "data").unlink()
    shutil.copytree(reference.cwd / "data", cwd / "data")
    (cwd / "data/meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 500}))
    Run(cwd, max_tokens=20 * BATCH).wait((1, 2)).complaint("vocab")


# ---------------------------------------------------------------- failures on the way

@pytest.mark.parametrize("lr", [1e12, 1e30])
def test_not_finite(cwd, lr):
    """The run stops at the step whose loss is not finite, and no checkpoint with such weights is left."""
    run = Run(cwd, lr=lr, grad_clip=0, warmup_steps=0, optimizer="sf_adamw", checkpoint_interval=1).wait((1, 2))
    run.complaint("step 2" if lr == 1e12 else "")
    if (run.folder / "ckpt.pt").exists():
        assert all(torch.isfinite(v).all() for v in flat(run.checkpoint()).values() if isinstance(v, torch.Tensor))
    assert all(math.isfinite(v) for e in run.log() for v in e.values())
    assert "NaN" not in (run.folder / "log.jsonl").read_text()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_token_beyond_the_vocabulary(cwd, reference, data, tokens, processes, split):
    """Shard and vocab_size are named when it is met, by whichever process that is; the checkpoint before it stays."""
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
    assert re.search(rf"^train.py: .*{path.name}.*999.*vocab_size 320", run.err, re.M) and "Traceback" not in run.err, run.err
    if split == "train":
        assert run.checkpoint()["step"] == 4 and run.step() == 6


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
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
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
    """From nothing to a sample; two at once make the data together; any other folder must be there."""
    argv = [str(REPO / "configs/quickstart.py"), "--n_layer=1", "--block_size=128", "--batch_size=6", "--total_batch_tokens=1536",
            "--max_tokens=6144", "--eval_tokens=2048"]
    runs = [Run(tmp_path, *argv, plain=True, out_dir="a", device="cpu"),
            Run(tmp_path, *argv, plain=True, processes=2, out_dir="b", device="cpu")]
    for run in runs:
        run.wait()
        assert run.step() == 4
    assert runs[0].values("loss") == pytest.approx(runs[1].values("loss"), abs=2e-5)
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"stdlib"}
    assert {p.name for p in (tmp_path / "data/stdlib").iterdir()} == {"meta.json", "stdlib_train_000000.bin", "stdlib_val_000000.bin"}
