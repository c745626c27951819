"""What must stay true of the knobs: how they are given, what they reach, and what bad ones get."""
import re
import shutil

import numpy as np
import pytest
import torch

import config
import train
from conftest import REPO, SMALL, TINY, Run, torchrun, tree
from distributed import Failure
from model import GPT, GPTConfig
from sf_normuon import param_groups


def test_parse(tmp_path):
    """The command line wins over the config, the last flag over the first, numbers in any
    notation."""
    config = tmp_path / "mine.py"
    config.write_text("# comment\n_rate = 1  # a name of its own\nlr = _rate\nn_layer = 3\n"
                      "max_tokens = 2.5e9\nbetas = [0.5, 0.25]\ncompile = False\n")
    cfg = train.parse([str(config), "--n_layer=4", "--n_layer=5", "--device=cpu"])
    assert (cfg.lr, cfg.n_layer, cfg.max_tokens, cfg.betas, cfg.compile) == (
        1.0, 5, 2_500_000_000, (0.5, 0.25), False)
    assert (type(cfg.lr) is float and type(cfg.max_tokens) is int and cfg.out_dir == "runs/mine"
            and cfg.dtype == "float32")
    for text, tokens in (("2.5e9", 2_500_000_000), ("2_500_000_000", 2_500_000_000), ("0", 0)):
        assert train.parse([f"--max_tokens={text}", "--device=cpu"]).max_tokens == tokens
    for text, value in (("0.9,0.99", (0.9, 0.99)), ("(0.9, 0.99)", (0.9, 0.99)),
                        ("[1, 0]", (1.0, 0.0))):
        assert train.parse([f"--betas={text}", "--device=cpu"]).betas == value
    for text, value in (("True", True), ("False", False), ("true", True), ("false", False)):
        assert train.parse([f"--resume={text}", "--device=cpu"]).resume is value
    assert train.parse(["--out_dir=1e3", "--device=cpu"]).out_dir == "1e3"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs(path):
    """Every config parses, fits one process and eight, and gives an optimizer."""
    cfg = train.parse([str(path), "--device=cpu"])
    assert (cfg.out_dir == f"runs/{path.stem}" and cfg.max_tokens
            and (cfg.total_batch_tokens // cfg.block_size) % (cfg.batch_size * 8) % 8 == 0)
    with torch.device("meta"):
        gpt = GPT(GPTConfig(512, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    train.build_optimizer(cfg, gpt)


def test_help(tmp_path):
    run = Run(tmp_path, "--help", plain=True).wait()
    assert (all(re.search(rf"\b{name}\b", run.out) for name in vars(train.Config()))
            and not tree(tmp_path))


def test_knobs_reach_the_optimizer():
    """Matrices and the rest in groups of their own, with every ablation."""
    with torch.device("meta"):
        gpt = GPT(SMALL)

    def groups(*argv):
        optimizer = train.build_optimizer(
            train.parse(["--device=cpu", "--weight_decay=0.3", "--adam_weight_decay=0.4", *argv]),
            gpt)
        matrices = {id(p) for p in param_groups(gpt)[0]["params"]}
        assert ([{id(p) in matrices for p in g["params"]} for g in optimizer.param_groups]
                == [{True}, {False}])
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(gpt.parameters()))
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.4]
        return optimizer.param_groups

    knobs = dict(decay_at="y", momentum=0.25, normalize_rows=False, ns_steps=3, warmup_steps=7,
                 lr=0.5, averaging_power=2.0, beta_power=0.5)
    a, b = groups(*(f"--{k}={v}" for k, v in knobs.items()), "--adam_lr=0.125",
                  "--adam_betas=0.5,0.6", "--betas=0.7,0.8")
    assert {k: a[k] for k in knobs} == knobs and a["use_muon"] and a["betas"] == (0.7, 0.8)
    assert (b["lr"], b["betas"], b["decay_at"], b["warmup_steps"], b["use_muon"]) == (
        0.125, (0.5, 0.6), "y", 7, False)
    a, b = groups("--optimizer=sf_adamw", "--betas=0.7,0.8", "--lr=0.5", "--decay_at=none")
    assert {(g["use_muon"], g["betas"], g["lr"], g["decay_at"]) for g in (a, b)} == {
        (False, (0.7, 0.8), 0.5, "none")}
    a, b = groups("--optimizer=normuon", "--momentum=0.25",
                  "--normalize_rows=False", "--ns_steps=3")
    assert (a["momentum"], a["normalize_rows"], a["ns_steps"], a["use_muon"], b["use_muon"]) == (
        0.25, False, 3, True, False)
    a, b = groups("--optimizer=muon", "--momentum=0.25", "--ns_steps=3", "--adam_betas=0.5,0.6")
    assert (a["momentum"], a["ns_steps"], b["betas"]) == (0.25, 3, (0.5, 0.6))
    a, b = groups("--optimizer=adamw", "--betas=0.7,0.8")
    assert a["betas"] == b["betas"] == (0.7, 0.8)
    knobs = dict(momentum=0.25, ns_steps=3, warmup_steps=7, rho=0.5, averaging_power=2.0, lr=0.5)
    a, b = groups("--optimizer=amuse", *(f"--{k}={v}" for k, v in knobs.items()), "--adam_lr=0.125",
                  "--adam_betas=0.5,0.6")
    assert {k: a[k] for k in knobs} == knobs and a["use_muon"] and not b["use_muon"]
    assert ({**knobs, "lr": 0.125} == {k: b[k] for k in knobs} and b["betas"] == (0.5, 0.6)
            and a["betas"] == (0.9, 0.95))
    knobs = dict(warmup_steps=7, averaging_power=2.0, averaging_start=9, polyak_beta=0.5,
                 beta_anneal_steps=11, lr=0.5)
    for g in groups("--optimizer=schedulefree_plus", *(f"--{k}={v}" for k, v in knobs.items()),
                    "--betas=0.7,0.8"):
        assert {k: g[k] for k in knobs} == knobs and g["betas"] == (0.7, 0.8)


CARDS = {  # (device, RANK and LOCAL_RANK, processes on this node):
           # the card that is taken, of two, or the line
    ("cuda", 0, 1): 0, ("cuda:1", 0, 1): 1, ("cuda", 0, 2): 0, ("cuda", 1, 2): 1,
    ("cuda:2", 0, 1): "2 cards", ("cuda:x", 0, 1): "cuda:x", ("cuda:-1", 0, 1): "cuda:-1",
    ("cuda", 0, 3): "3 processes", ("cuda:1", 1, 2): "cuda:1"}


@pytest.mark.parametrize("case", CARDS, ids=str)
def test_each_process_takes_its_card(case, monkeypatch):
    """On a machine with two cards, as far as torch's own check of the argument goes."""
    device, rank, processes = case
    taken = []
    monkeypatch.setattr(config, "DEVICES", ["cuda", "cpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes),
                        ("LOCAL_RANK", rank)):
        monkeypatch.setattr(config, name, value, raising=False)
    argv = [f"--device={device}", "--block_size=1", "--total_batch_tokens=6", "--batch_size=1"]
    if isinstance(CARDS[case], int):
        cfg = train.parse(argv)
        assert taken == [CARDS[case]] and cfg.dtype == "bfloat16" and cfg.device == device
    else:
        with pytest.raises(Failure, match=CARDS[case]) as failure:
            train.parse(argv)
        assert failure.value.status == 2 and not taken


def bad_shard(header):
    return lambda cwd: (cwd / "bad/x_train_000000.bin").write_bytes(
        np.array(header + [0] * 253, "<i4").tobytes() + b"\0" * 400)


BAD = {  # name: (arguments, status, what the line must name
         #        [, how the working directory is prepared])
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
    "config_reads": (["c.py"], 2, ["c.py", "FileNotFoundError"], "lr = open('nix')"),
    "config_exits": (["c.py"], 2, ["c.py"], "raise SystemExit(0)"),
    "config_imports": (["c.py"], 2, ["c.py", "math"], "import math"),
    "two_configs": (["c.py", "d.py"], 2, ["c.py d.py"]),
    "heads": (["--n_head=5"], 2, ["n_embd", "n_head"]),
    "odd_heads": (["--n_head=32"], 2, ["n_embd", "n_head"]),
    "batch": (["--total_batch_tokens=1000"], 2, ["total_batch_tokens", "block_size"]),
    "batch_size": (["--batch_size=5"], 2, ["total_batch_tokens", "batch_size"]),
    "zero": (["--n_layer=0"], 2, ["n_layer"]),
    **{key: ([f"--{key}=-0.5"], 2, [key, "-0.5"])
       for key in ("lr", "adam_lr", "weight_decay", "grad_clip", "min_lr_ratio",
                   "rho", "averaging_power", "beta_power")},
    **{key: ([f"--{key}=-1"], 2, [key, "-1"]) for key in ("averaging_start", "beta_anneal_steps")},
    "amuse_warmup": (["--optimizer=amuse", "--warmup_steps=1"], 2, ["warmup_steps", "2"]),
    "polyak_beta": (["--optimizer=schedulefree_plus", "--polyak_beta=1"], 2, ["polyak_beta", "1"]),
    "seed": (["--seed=-1"], 2, ["seed"]),
    "betas": (["--betas=1.5,0.9"], 2, ["beta"]),
    "momentum": (["--momentum=1"], 2, ["momentum"]),
    "adamw_betas": (["--optimizer=adamw", "--betas=0.9,1"], 2, ["beta"]),
    "muon_steps": (["--optimizer=muon", "--ns_steps=200"], 2, ["200"]),
    "optimizer": (["--optimizer=adam"], 2, ["sf_normuon", "sf_adamw", "adamw", "normuon", "muon",
                                            "amuse", "schedulefree_plus"]),
    "schedule": (["--schedule=cos", "--optimizer=adamw"], 2,
                 ["constant", "cosine", "linear", "wsd"]),
    "no_horizon": (["--schedule=cosine", "--optimizer=adamw", "--max_tokens=0"], 2, ["max_tokens"]),
    "sf_beta": (["--sf_beta=0"], 2, ["sf_beta", "(0, 1)"]),
    "eval_offset": (["--eval_offset=1e9"], 1, ["eval_offset 1000000000", "data"]),
    **{f"{name}_schedule": (["--schedule=cosine", f"--optimizer={name}"], 2, ["schedule", name])
       for name in ("sf_normuon", "amuse", "schedulefree_plus")},
    "decay_at": (["--decay_at=x"], 2, ["decay_at"]),
    "dtype": (["--dtype=float16"], 2, ["dtype", "bfloat16"]),
    "device": (["--device=tpu9"], 2, ["device", "tpu9"]),
    "device_meta": (["--device=meta"], 2, ["device", "meta"]),
    "device_colon": (["--device=cpu:"], 2, ["device", "cpu:"]),
    "no_literal": (["--lr={[]:1}"], 2, ["lr", "{[]:1}"]),
    "beyond_64_bits": (["--vocab_size=1e20"], 2, ["vocab_size", "1e+20"]),
    "muon_momentum": (["--optimizer=muon", "--momentum=1.5"], 2, ["momentum", "1.5"]),
    "large_power": (["--averaging_power=1e3"], 2, ["averaging_power", "1000.0"]),
    "too_wide": (["--n_embd=1e9"], (1, 2), []),
    "many_sequences": (["--total_batch_tokens=64e12", "--batch_size=7"], 2, ["batch_size"]),
    "data_missing": (["--data_dir=nope"], 2, ["nope"]),
    "data_missing_stdlib": (["--data_dir=./data2/stdlib"], 2, ["data2/stdlib"]),
    "data_is_a_file": (["--data_dir=data/meta.json"], 2, ["data/meta.json"]),
    "data_empty": (["--data_dir=bad"], 2, ["bad"],
                   lambda cwd: [p.unlink() for p in (cwd / "bad").iterdir()]),
    "no_val": (["--data_dir=bad"], 2, ["bad", "val"],
               lambda cwd: (cwd / "bad/x_val_000000.bin").unlink()),
    "no_train": (["--data_dir=bad"], 2, ["bad", "train"],
                 lambda cwd: [p.unlink() for p in (cwd / "bad").glob("*train*")]),
    "magic": (["--data_dir=bad"], 1, ["x_train_000000.bin", "77"], bad_shard([77, 1, 200])),
    "version": (["--data_dir=bad"], 1, ["x_train_000000.bin", "version 9"],
                bad_shard([20240520, 9, 200])),
    "length": (["--data_dir=bad"], 1, ["x_train_000000.bin", "201"], bad_shard([20240520, 1, 201])),
    "short_file": (["--data_dir=bad"], 1, ["x_val"],
                   lambda cwd: (cwd / "bad/x_val_000000.bin").write_bytes(b"abc")),
    "block_size": (["--block_size=1e6", "--total_batch_tokens=1e6", "--batch_size=1"], (1, 2),
                   ["block_size"]),
    "meta": (["--data_dir=bad"], 1, ["meta.json"],
             lambda cwd: (cwd / "bad/meta.json").write_text("{")),
    "vocab": (["--vocab_size=256"], 2, ["vocab_size 256", "257"]),
    "out_dir_under_file": (["--out_dir=file/run"], (1, 2), ["file"],
                           lambda cwd: (cwd / "file").write_text("")),
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
    knobs = {k: v for k, v in TINY.items() if not any(a.startswith(f"--{k}=") for a in argv)
             and f"{k} =" not in str(prepare)}
    Run(cwd, *argv, plain=True, **knobs).wait(status).complaint(*words)
    assert tree(cwd) == before


def test_bad_input_under_torchrun(cwd):
    """The line comes out, once, although torchrun ends all processes as soon as the first one, here
    rank 1, fails."""
    (cwd / "c.py").write_text(
        "__import__('time').sleep(4 * (__import__('os').environ['RANK'] == '0'))\nlrr = 1\n")
    run = Run(cwd, "c.py", command=torchrun(2), plain=True).wait(1)
    assert re.findall(r"^train.py: .*", run.err, re.M) == [
        "train.py: c.py: unknown knob 'lrr'; did you mean 'lr'?"], run.err
