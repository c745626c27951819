"""The knobs of train.py, and how a config file and the command line set them."""
import ast
import contextlib
import difflib
import runpy
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from baselines import OPTIMIZERS
from distributed import LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, Failure

SCHEDULES = ("constant", "cosine", "linear", "wsd")
CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
DEVICES = ["cuda"] * CUDA + ["mps"] * MPS + ["cpu"]
AT_LEAST_1 = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "total_batch_tokens",
              "ns_steps", "eval_interval", "log_interval", "checkpoint_interval", "eval_tokens")


@dataclass
class Config:
    # the run
    out_dir: str = ""  # for config.json, log.jsonl and ckpt.pt; "": runs/<name of the config>
    data_dir: str = "data/fineweb"  # token shards, made by prepare_fineweb.py
    seed: int = 0  # of the initial weights and of the order of the batches
    device: str = DEVICES[0]  # cuda, mps or cpu; default: the first available
    dtype: str = ""  # of products: float32 or bfloat16; "": bfloat16 on cuda. Weights are float32
    compile: bool = CUDA  # torch.compile the blocks and the loss
    activation_checkpointing: bool = False  # compute each block twice: slower, far less memory
    shard_size: int = 0  # processes that share a copy of the model, best of one node; 0: all
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False: start over
    change_data: bool = False  # resume with other shards than the checkpoint's
    init_from: str = ""  # a checkpoint whose weights a new run starts from
    eval_only: bool = False  # only print the validation loss of init_from, or of out_dir/ckpt.pt
    # the model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # tokens in a sequence
    vocab_size: int = 0  # 0: the data's, padded to a multiple of 64
    # the budget
    batch_size: int = 16  # sequences a process takes at once; changes memory and speed only
    total_batch_tokens: int = 524288  # tokens in a step, over processes and accumulation steps
    max_tokens: int = 0  # tokens to train on; 0: until it is stopped
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    # the optimizer
    optimizer: str = "sf_normuon"  # or another of baselines.OPTIMIZERS: see configs/125m_*
    lr: float = 0.008
    weight_decay: float = 0.05  # of hidden matrices; adam_weight_decay is of the rest
    betas: tuple = (0.9, 0.95)
    momentum: float = 0.8  # sf_normuon, normuon, muon, amuse
    warmup_steps: int = 2000
    schedule: str = "constant"  # constant, cosine, linear, wsd; schedule-free optimizers: constant
    min_lr_ratio: float = 0.1  # where cosine ends, relative to lr; linear and wsd end at 0
    decay_at: str = "z"  # sf_normuon, sf_adamw: z, y or none
    normalize_rows: bool = True  # sf_normuon, normuon
    step_norm: str = "rms"  # sf_normuon, normuon: rms (steps of RMS 0.2 lr) or spectral
    ns_steps: int = 5  # Newton-Schulz iterations
    rho: float = 0.8  # amuse: how fast the gradient moves from z to x (the log's rho is RMS(z))
    averaging_power: float = 0.0  # schedule-free optimizers: r of the average's weights, tʳ
    beta_power: float = 0.0  # sf_normuon, sf_adamw: p of 1-β1, which falls as (warmup_steps / t)ᵖ
    averaging_start: int = 0  # schedulefree_plus: steps until the average starts
    sf_beta: float = 0.9  # schedulefree_plus: β of y = β x + (1-β) z
    polyak_beta: float = 0.0  # schedulefree_plus: of the average of gradient norms
    beta_anneal_steps: int = 0  # schedulefree_plus: steps in which β grows from sf_beta to 0.965
    adam_lr: float = 0.0  # for parameters that are not hidden matrices; 0: lr
    adam_betas: tuple = (0.95, 0.99)  # for the same; pure AdamW methods take betas for all
    adam_weight_decay: float = 0.05
    # intervals, in steps
    eval_interval: int = 250
    log_interval: int = 10
    checkpoint_interval: int = 1000
    eval_tokens: int = 10485760  # of the validation data, after eval_offset
    eval_offset: int = 0  # tokens of the validation data that are skipped


def parse(argv: list[str]) -> Config:
    """The knobs that a config file and --knob=value set. Raises Failure for bad ones. A config may
    have names of its own, which begin with _."""
    knobs = {f.name: f for f in fields(Config)}
    paths = [a for a in argv if not a.startswith("-")]
    if len(paths) > 1:
        raise Failure(f"one config at a time, got {' '.join(paths)}; knobs are --name=value", 2)
    given = []  # (where it is set, knob, value)
    for path in paths:
        if not Path(path).exists():
            raise Failure(f"{path}: no such config", 2)
        try:
            values = runpy.run_path(path)
        except (Exception, SystemExit) as e:
            raise Failure(f"{path} is not a config of assignments: {type(e).__name__}: {e}", 2)
        given += [(path, key, v) for key, v in values.items() if not key.startswith("_")]
    for argument in argv:
        if argument.startswith("-"):
            key, equals, value = argument.lstrip("-").partition("=")
            if argument == "--eval_only":
                value = "True"
            elif not equals and key in knobs:
                raise Failure(f"{argument}: write it --{key}=value", 2)
            with contextlib.suppress(Exception):  # anything else stays a string
                if key in knobs and knobs[key].type is not str:
                    value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
            given.append(("command line", key, value))
    cfg = Config()
    for where, key, value in given:
        if key not in knobs:
            nearest = difflib.get_close_matches(key, knobs, n=1, cutoff=0)[0]
            raise Failure(f"{where}: unknown knob {key!r}; did you mean {nearest!r}?", 2)
        setattr(cfg, key, convert(where, key, value, knobs[key].type))
    cfg.out_dir = cfg.out_dir or f"runs/{Path(paths[0]).stem if paths else 'default'}"
    check(cfg)
    return cfg


def convert(where: str, key: str, value, kind: type):
    number = lambda v: type(v) in (int, float) and abs(v) < 3.4e38  # that fits into float32
    if kind in (bool, str) and type(value) is kind:
        return value
    if kind in (int, float) and number(value) and (
            kind is float or value == int(value) and abs(value) < 2**63):
        return kind(value)
    if kind is tuple and type(value) in (tuple, list) and len(value) == 2:
        if all(map(number, value)):
            return tuple(map(float, value))
    rule = {int: "a whole number", float: "a finite number", bool: "True or False",
            str: "a string", tuple: "two numbers, like 0.9,0.95"}[kind]
    raise Failure(f"{where}: {key} must be {rule}, got {value!r}", 2)


def check(cfg: Config) -> None:
    """Refuses impossible values, fills in dtype, takes this process's card."""
    def need(condition, key, rule):
        if not condition:
            raise Failure(f"{key} must be {rule}, got {getattr(cfg, key)!r}", 2)

    for key, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES),
                       ("decay_at", ("z", "y", "none")), ("step_norm", ("rms", "spectral")),
                       ("dtype", ("", "float32", "bfloat16"))):
        need(getattr(cfg, key) in known, key, f"one of {', '.join(filter(None, known))}")
    scheduled = OPTIMIZERS[cfg.optimizer].scheduled
    for knob in (f.name for f in fields(cfg) if f.type in (int, float)):
        least = int(knob in AT_LEAST_1)
        need(getattr(cfg, knob) >= least, knob, f"at least {least}")
    for knob in ("betas", "adam_betas"):  # torch looks at its defaults, not at its groups
        beta1, beta2 = getattr(cfg, knob)
        need(0 <= beta2 < 1 and (0 <= beta1 < 1 or beta1 == 1 and not scheduled), knob, "in [0, 1)")
    need(0 < cfg.sf_beta < 1, "sf_beta", "in (0, 1)")
    need(cfg.seed < 2**32, "seed", "below 2**32")
    need(cfg.ns_steps < 100, "ns_steps", "below 100")
    need(cfg.momentum < 1, "momentum", "in [0, 1)")
    need(cfg.averaging_power <= 20, "averaging_power", "at most 20")  # weights are powers of t
    need(scheduled or cfg.schedule == "constant", "schedule", f"constant for {cfg.optimizer}")
    need(cfg.max_tokens or cfg.schedule == "constant", "max_tokens", f"known for {cfg.schedule}")
    need(WORLD_SIZE % (cfg.shard_size or 1) == 0, "shard_size", f"a divisor of {WORLD_SIZE}")
    kind = take_device(cfg.device)
    cfg.dtype = cfg.dtype or ("bfloat16" if kind == "cuda" else "float32")
    sequences, rest = divmod(cfg.total_batch_tokens, cfg.block_size)
    share, uneven = divmod(sequences, WORLD_SIZE)
    what, n = ("the number of processes", sequences) if uneven else ("batch_size", share)
    fits = ", ".join(str(d) for d in range(1, min(n, 1024) + 1) if n % d == 0 and not rest)
    need(not (rest or uneven or share % cfg.batch_size), "total_batch_tokens",
         f"a multiple of batch_size {cfg.batch_size} * block_size {cfg.block_size} * {WORLD_SIZE} "
         f"processes{fits and f' ({what} can be {fits})'}")


def take_device(device: str) -> str:
    """Takes this process's card, to leave nothing on the others. Returns cuda, mps or cpu."""
    kind, colon, number = device.partition(":")
    if kind not in DEVICES or colon and not number.isdecimal():
        raise Failure(f"device must be one of {', '.join(DEVICES)} here, got {device!r}", 2)
    if kind == "cuda":
        cards, card = torch.cuda.device_count(), int(number or LOCAL_RANK)
        if card >= cards or LOCAL_WORLD_SIZE > cards or WORLD_SIZE > 1 and number:
            raise Failure(f"device {device!r} for {LOCAL_WORLD_SIZE} processes on {cards} cards: "
                          "one process takes cuda or cuda:N, several take cuda", 2)
        torch.cuda.set_device(card)
    return kind
