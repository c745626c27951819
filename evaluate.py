"""Validation loss, bits per byte, and a sample of text."""
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import load_weights
from config import Config
from data import TokenBatches
from distributed import RANK, WORLD_SIZE, Failure, gather, say, together
from model import GPT
from prepare_fineweb import get_tokenizer


def autocast(cfg: Config):
    kind = torch.device(cfg.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def get_batch(cfg: Config, data: TokenBatches, positions) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets on the device, int64 (len(positions), block_size). Raises as data.get."""
    batch = data.get(positions)
    if torch.device(cfg.device).type == "cuda":  # pinned: the copy need not be waited for
        return tuple(t.pin_memory().to(cfg.device, non_blocking=True) for t in batch)
    return tuple(t.to(cfg.device) for t in batch)


def eval_range(cfg: Config, data: TokenBatches) -> range:
    """The sequences that are evaluated. Raises ValueError if eval_offset leaves none."""
    first = cfg.eval_offset // cfg.block_size
    if first >= len(data):
        raise ValueError(f"eval_offset {cfg.eval_offset} leaves none of the {len(data)} sequences "
                         f"of {cfg.block_size} tokens for validation in {cfg.data_dir}")
    return range(first, min(len(data), first + max(1, cfg.eval_tokens // cfg.block_size)))


@torch.no_grad()
def evaluate(cfg: Config, model: GPT, data: TokenBatches) -> float:
    """Mean loss in nats over eval_tokens, the same ones on any number of processes."""
    sequences, losses, counts = eval_range(cfg, data), [], []
    for first in range(0, len(sequences), WORLD_SIZE * cfg.batch_size):
        mine = sequences[first + RANK * cfg.batch_size:][:cfg.batch_size]
        # Every process needs a batch of the same shape: uncounted sequences fill it up.
        filled = [*mine, *[sequences[-1]] * (cfg.batch_size - len(mine))]
        inputs, targets = get_batch(cfg, data, filled)
        targets[len(mine):] = -1
        with autocast(cfg):
            losses.append(model(inputs, targets))
        counts.append(len(mine))
    losses = torch.stack(losses).tolist()  # the only wait for the device
    total = sum(loss * count for loss, count in zip(losses, counts))
    if WORLD_SIZE > 1:
        model.reshard()  # or the embedding stays gathered: the next step would see x in it
        total = torch.tensor(total, dtype=torch.float64, device=cfg.device)
        dist.all_reduce(total)
    return float(total) / len(sequences)


def bits_per_byte(cfg: Config, data: TokenBatches, tokenizer, loss: float) -> float:
    """From the mean loss in nats of the evaluated tokens; comparable between tokenizers.

    The end-of-text token has no bytes, but its loss counts.
    """
    lengths = np.zeros(data.vocab_size, np.int64)
    lengths[:tokenizer.vocab_size] = [len(symbol) for symbol in tokenizer.symbols]
    lengths[tokenizer.eot] = 0
    sequences = eval_range(cfg, data)
    size = sum(lengths[data.get(sequences[i : i + 64])[1]].sum()
               for i in range(0, len(sequences), 64))
    return loss * len(sequences) * cfg.block_size / math.log(2) / size


def load_tokenizer(meta: dict):
    """The tokenizer; None, after a line that says so, if it cannot be loaded."""
    try:
        tokenizer = get_tokenizer(meta["tokenizer"])
        if tokenizer.vocab_size <= meta["vocab_size"]:
            return tokenizer
        say(f"(no text: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} words, "
            f"the data's vocab_size is {meta['vocab_size']})")
    except Exception as e:  # tiktoken downloads, which can fail in any way
        say(f"(the tokenizer {meta['tokenizer']} could not be loaded: {type(e).__name__})")


def sample(cfg: Config, model: GPT, meta: dict) -> str:
    """A text from the start of a document, the same on all processes, which must all call it."""
    tokenizer = load_tokenizer(meta)
    if None in gather(tokenizer and tokenizer.name):
        return ""
    start = torch.full((1, 1), tokenizer.eot, device=cfg.device)
    with autocast(cfg), torch.compiler.set_stance("force_eager"):  # every length would be compiled
        idx = model.generate(start, 300, temperature=0.8, top_k=50,
                             vocab_size=tokenizer.vocab_size,
                             generator=torch.Generator(cfg.device).manual_seed(cfg.seed))
    return tokenizer.decode(idx[0, 1:].tolist())


def print_evaluation(cfg: Config, model: GPT, data: TokenBatches, meta: dict) -> None:
    """Prints a checkpoint's validation loss, perplexity and bits per byte. Writes nothing."""
    cfg.init_from = cfg.init_from or str(Path(cfg.out_dir) / "ckpt.pt")
    saved = together(lambda: load_weights(cfg, model, meta["tokenizer"]))
    loss = evaluate(cfg, model, data)
    if not math.isfinite(loss):
        raise Failure(f"{cfg.init_from} is damaged, take an earlier copy: its loss is {loss}")
    tokens = len(eval_range(cfg, data)) * cfg.block_size
    say(f"{cfg.init_from}, step {saved['step']}, on {tokens:,} tokens of {cfg.data_dir}\n"
        f"validation loss  {loss:.6f} nats per token\n"
        f"perplexity       {math.exp(min(loss, 700)):.6f}")
    if RANK == 0 and (tokenizer := load_tokenizer(meta)):
        say(f"bits per byte    {bits_per_byte(cfg, data, tokenizer, loss):.6f}")
