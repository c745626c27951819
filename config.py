"""The knobs of train.py, and how a config file and the command line set them."""
import ast
import contextlib
import difflib
import runpy
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from distributed import LOCAL_RANK, WORLD_SIZE, Failure

SCHEDULE_FREE = ("sf_normuon", "sf_adamw", "amuse", "schedulefree_plus")
OPTIMIZERS = (*SCHEDULE_FREE, "adamw", "normuon", "muon")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
DEVICES = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


@dataclass
class Config:
    # the run
    out_dir: str = ""  # config.json, log.jsonl and ckpt.pt go here; "": runs/<name of the config>
    data_dir: str = "data/fineweb"  # token shards, made by prepare_fineweb.py
    seed: int = 0  # of the initial weights and of the order of the batches
    device: str = DEVICES[0]  # cuda, mps or cpu: the first that is there
    dtype: str = ""  # of the products: float32 or bfloat16 (weights stay float32); "": bfloat16 on cuda, else float32
    compile: bool = torch.cuda.is_available()  # torch.compile each block and the loss; Newton-Schulz always is, on CUDA
    activation_checkpointing: bool = False  # compute each block again in the backward pass: slower, far less memory
    shard_size: int = 0  # processes that share one copy of the model, such as those of one node; 0: all of them
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False: start anew
    change_data: bool = False  # go on with another data_dir than the checkpoint's, from its beginning
    init_from: str = ""  # a checkpoint whose weights a new run starts from
    eval_only: bool = False  # only print the validation loss of init_from or, without it, of out_dir/ckpt.pt
    # the model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # tokens in a sequence
    vocab_size: int = 0  # 0: the data's, padded to a multiple of 64
    # the budget
    batch_size: int = 16  # sequences that a process takes at once; changes memory and speed only
    total_batch_tokens: int = 524288  # tokens in a step, over all processes and accumulation steps
    max_tokens: int = 0  # tokens to train on; 0: until it is stopped
    grad_clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    # the optimizer
    optimizer: str = "sf_normuon"  # one of OPTIMIZERS
    lr: float = 0.008
    weight_decay: float = 0.05
    betas: tuple = (0.9, 0.95)
    momentum: float = 0.8  # sf_normuon, normuon, muon, amuse
    warmup_steps: int = 2000
    schedule: str = "constant"  # one of SCHEDULES; the schedule-free optimizers want constant
    min_lr_ratio: float = 0.1  # where cosine ends, as a part of lr; linear and wsd end at 0
    decay_at: str = "z"  # sf_normuon, sf_adamw: z, y or none
    normalize_rows: bool = True  # sf_normuon, normuon
    ns_steps: int = 5  # Newton-Schulz iterations
    rho: float = 0.8  # amuse: how fast the gradient moves from near z to x (in the log, rho is RMS(z))
    averaging_power: float = 0.0  # schedule-free ones: r of the average's weights, tʳ
    beta_power: float = 0.0  # sf_normuon, sf_adamw: p of 1-β1, which falls as (warmup_steps / t)ᵖ
    sf_beta: float = 0.9  # schedulefree_plus: β, how far y is from z towards x
    averaging_start: int = 0  # schedulefree_plus: steps until the average starts
    polyak_beta: float = 0.0  # schedulefree_plus: of the average of gradient norms
    beta_anneal_steps: int = 0  # schedulefree_plus: steps over which β grows from 0.9 to 0.965
    adam_lr: float = 0.0  # of what is not a hidden matrix: embeddings and gains; 0: as lr
    adam_betas: tuple = (0.95, 0.99)  # of the same; sf_adamw, adamw and schedulefree_plus take betas for all
    adam_weight_decay: float = 0.05
    # intervals, in steps
    eval_interval: int = 250
    log_interval: int = 10
    checkpoint_interval: int = 1000
    eval_tokens: int = 10485760  # of the validation data, from its start


# What may differ when a run is resumed. Everything else belongs to its mathematics; max_tokens does so in a schedule only.
MAY_CHANGE = {"out_dir", "max_tokens", "eval_interval", "log_interval", "checkpoint_interval", "batch_size", "device",
              "compile", "activation_checkpointing", "shard_size", "resume", "change_data"}


def parse(argv: list[str]) -> Config:
    knobs = {f.name: f for f in fields(Config)}
    paths = [a for a in argv if not a.startswith("-")]
    if len(paths) > 1:
        raise Failure(f"one config at a time, got {' '.join(paths)}; knobs are written --knob=value", 2)
    given = []  # (where it stands, knob, value)
    for path in paths:
        try:
            values = runpy.run_path(path)
        except FileNotFoundError:
            raise Failure(f"{path}: no such config", 2)
        except (Exception, SystemExit) as e:
            raise Failure(f"{path} is not a config of plain Python assignments: {type(e).__name__}: {e}", 2)
        given += [(path, key, value) for key, value in values.items() if not key.startswith("__")]
    for argument in argv:
        if argument.startswith("-"):
            key, equals, value = argument.lstrip("-").partition("=")
            if argument == "--eval_only":
                value = "True"
            elif not equals and key in knobs:
                raise Failure(f"{argument}: write it --{key}=value", 2)
            with contextlib.suppress(ValueError, SyntaxError, MemoryError):
                if key in knobs and knobs[key].type is not str:
                    value = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
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
    def number(v):  # that fits into float32
        return type(v) in (int, float) and abs(v) < 3.4e38

    if kind in (bool, str) and type(value) is kind:
        return value
    if kind is int and number(value) and value == int(value) or kind is float and number(value):
        return kind(value)
    if kind is tuple and type(value) in (tuple, list) and len(value) == 2 and all(map(number, value)):
        return tuple(map(float, value))
    wanted = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string",
              tuple: "two numbers, like 0.9,0.95"}[kind]
    raise Failure(f"{where}: {key} must be {wanted}, got {value!r}", 2)


def check(cfg: Config) -> None:
    """Refuses impossible values, fills in dtype, and takes this process's card."""
    for key, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("decay_at", ("z", "y", "none")),
                       ("dtype", ("", "float32", "bfloat16"))):
        if getattr(cfg, key) not in known:
            raise Failure(f"{key} must be one of {', '.join(filter(None, known))}, got {getattr(cfg, key)!r}", 2)
    for key in ("betas", "adam_betas"):  # beta1 1 is only possible where it is not a decay but a place between z and x
        beta1, beta2 = getattr(cfg, key)
        if not (0 <= beta1 <= 1 and 0 <= beta2 < 1) or beta1 == 1 and cfg.optimizer not in SCHEDULE_FREE:
            raise Failure(f"{key} must be in [0, 1), got {beta1}, {beta2}", 2)
    if cfg.ns_steps > 99:
        raise Failure(f"ns_steps must be below 100, got {cfg.ns_steps}", 2)
    for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "total_batch_tokens", "ns_steps",
                "eval_interval", "log_interval", "checkpoint_interval", "eval_tokens"):
        if getattr(cfg, key) < 1:
            raise Failure(f"{key} must be at least 1, got {getattr(cfg, key)}", 2)
    for key in ("lr", "weight_decay", "adam_lr", "adam_weight_decay", "min_lr_ratio", "grad_clip", "warmup_steps",
                "max_tokens", "vocab_size", "seed", "shard_size", "rho", "averaging_power", "beta_power",
                "averaging_start", "beta_anneal_steps"):
        if getattr(cfg, key) < 0:
            raise Failure(f"{key} must not be negative, got {getattr(cfg, key)}", 2)
    if cfg.optimizer in SCHEDULE_FREE and cfg.schedule != "constant":
        raise Failure(f"schedule must be constant for {cfg.optimizer}, got {cfg.schedule!r}: its average replaces one", 2)
    if cfg.schedule != "constant" and not cfg.max_tokens:
        raise Failure(f"max_tokens must be given: the {cfg.schedule} schedule needs to know the end", 2)
    if cfg.seed >= 2**32:
        raise Failure(f"seed must be below 2**32, got {cfg.seed}", 2)
    device = cfg.device.partition(":")[0]
    if device not in DEVICES:
        raise Failure(f"device must be one of {', '.join(DEVICES)} here, got {cfg.device!r}", 2)
    if device == "cuda":  # each process takes its own card, and leaves nothing on the others
        try:
            torch.cuda.set_device(LOCAL_RANK if WORLD_SIZE > 1 else torch.device(cfg.device).index or 0)
        except RuntimeError as e:
            raise Failure(f"device {cfg.device!r}, process {LOCAL_RANK}: {e}", 2)
    if cfg.shard_size and WORLD_SIZE % cfg.shard_size:
        raise Failure(f"shard_size {cfg.shard_size} does not divide the {WORLD_SIZE} processes", 2)
    cfg.dtype = cfg.dtype or ("bfloat16" if device == "cuda" else "float32")
    sequences, rest = divmod(cfg.total_batch_tokens, cfg.block_size)
    share, uneven = divmod(sequences, WORLD_SIZE)
    if rest or uneven or share % cfg.batch_size:
        what, divided = ("the number of processes", sequences) if uneven else ("batch_size", share)
        fits = [n for n in range(1, min(divided, 1024) + 1) if divided % n == 0]
        hint = "it must be a multiple of block_size" if rest else f"{what} can be {', '.join(map(str, fits))}"
        raise Failure(f"total_batch_tokens {cfg.total_batch_tokens} is not a multiple of batch_size {cfg.batch_size} * "
                      f"block_size {cfg.block_size} * {WORLD_SIZE} processes: {hint}", 2)
