"""Token shards on disk, and the batches that are cut from them.

A shard is 256 little-endian int32 (magic, version, number of tokens, then zeros), then that many
little-endian uint16: the format of llm.c, modded-nanogpt and dion. Ours are <name>_train_000000.bin
and so on; any .bin file counts whose name has the word train or val in it.
"""
import json
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def write_atomically(path, write):
    """Replace `path` by what write(file) writes, or leave it as it is and raise OSError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save raises both
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {e}")


def write_shard(path, tokens):
    """Write tokens (one-dimensional, integers below 65536) as a shard, whole or not at all.

    ValueError if a token does not fit in 16 bits or there are more than the header can count.
    """
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**16:
        raise ValueError(f"{path}: tokens must be in 0..65535, got {tokens.min()}..{tokens.max()}")
    if tokens.size >= 2**31:
        raise ValueError(f"{path}: {tokens.size} tokens are too many for one shard")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    parts = [header.data, np.ascontiguousarray(tokens, "<u2").data]
    write_atomically(path, lambda file: file.writelines(parts))


def shard_length(path):
    """Number of tokens in a shard. ValueError if its header or the file's size is wrong."""
    with open(path, "rb") as f:
        header, size = f.read(HEADER_BYTES), os.fstat(f.fileno()).st_size
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: too short to be a token shard ({size} bytes)")
    magic, version, n = np.frombuffer(header, "<i4")[:3].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"{path}: not a token shard (magic number {magic}, version {version}; "
                         f"expected {MAGIC}, {VERSION})")
    if size != HEADER_BYTES + 2 * n:
        held = (size - HEADER_BYTES) / 2
        raise ValueError(f"{path}: header counts {n} tokens, but the file holds {held:g}")
    return n


def read_shard(path):
    """Memory map of a shard's tokens, uint16 (n,), read-only. ValueError if it is not whole."""
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(shard_length(path),))


def read_meta(data_dir):
    """What meta.json says about the tokens: at least tokenizer (str) and vocab_size (int).

    Shards without a meta.json are taken as GPT-2's. FileNotFoundError if there is no such folder,
    ValueError if the file does not parse or lacks one of the two.
    """
    if not os.path.isdir(data_dir):
        raise FileNotFoundError(f"{data_dir}: no such data folder; prepare_fineweb.py makes one")
    path = os.path.join(data_dir, "meta.json")
    if not os.path.exists(path):
        return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256}
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not (isinstance(meta, dict) and isinstance(meta.get("tokenizer"), str)
            and isinstance(meta.get("vocab_size"), int) and 0 < meta["vocab_size"] <= 2**16):
        raise ValueError(f"{path}: needs `tokenizer`, a string, and `vocab_size`, from 1 to 65536")
    return meta


# A batch may straddle two shards or two epochs: two orders of shards and two of sequences.
@lru_cache(maxsize=4)
def permutation(n, *key):
    return np.random.RandomState(key).permutation(n)  # legacy: the same in every version of numpy


def split_of(name):
    """"train", "val" or None: the last such word, for the folder's name may hold the other one."""
    words = re.findall(r"(?<![a-z])(?:train|val)(?![a-z])", name) if name.endswith(".bin") else []
    return words[-1] if words else None


class TokenBatches:
    """The training or validation sequences of a folder of shards, each addressed by its position.

    A shard of n tokens gives (n - 1) // block_size sequences of block_size + 1 tokens, neighbours
    sharing one. len() counts those of all shards. Positions count on from the start of training,
    over epochs: in every epoch each training sequence comes exactly once, shards and the sequences
    inside each in a new order. What stands at a position depends on (seed, position) alone.
    Validation sequences stay in natural order.

    FileNotFoundError if the folder or its shards are missing, ValueError for a broken shard or if
    all are too short.
    """

    def __init__(self, data_dir, split, block_size, vocab_size, seed=0):
        shards = [os.path.join(data_dir, name) for name in sorted(os.listdir(data_dir))
                  if split_of(name) == split]
        if not shards:
            raise FileNotFoundError(f"{data_dir}: no {split} shard (*_{split}_000000.bin); "
                                    "prepare_fineweb.py makes them")
        lengths = {path: shard_length(path) for path in shards}
        self.lengths = {path: n for path, n in lengths.items() if n > block_size}
        if not self.lengths:
            raise ValueError(f"{data_dir}: no {split} shard holds block_size + 1 = "
                             f"{block_size + 1} tokens")
        self.paths = list(self.lengths)
        self.sequences = np.array([(n - 1) // block_size for n in self.lengths.values()])
        self.split, self.block_size = split, block_size
        self.vocab_size, self.seed = vocab_size, seed

    def __len__(self):
        return int(self.sequences.sum())

    def locate(self, position):
        """(shard, sequence inside the shard) at a position."""
        epoch, i = divmod(int(position), len(self))
        shuffled = self.split == "train"
        n = len(self.paths)
        order = permutation(n, self.seed, epoch) if shuffled else np.arange(n)
        ends = self.sequences[order].cumsum()
        k = ends.searchsorted(i, side="right")
        shard, i = int(order[k]), i - int(ends[k] - self.sequences[order[k]])
        if shuffled:
            i = int(permutation(int(self.sequences[shard]), self.seed, epoch, shard)[i])
        return shard, i

    def get(self, positions):
        """(inputs, targets), both int64 (len(positions), block_size), targets one token ahead.

        ValueError names the shard that holds a token beyond vocab_size or is no longer whole;
        OSError if it is gone.
        """
        import torch  # here: it takes seconds, and prepare_fineweb.py does without it

        batch = np.empty((len(positions), self.block_size + 1), np.int64)
        maps = {}  # for one batch only: the pages of a map stay resident as long as it lives
        for row, position in zip(batch, positions):
            shard, sequence = self.locate(position)
            path = self.paths[shard]
            if path not in maps:
                maps[path] = read_shard(path)
            row[:] = maps[path][sequence * self.block_size : (sequence + 1) * self.block_size + 1]
            if row.max() >= self.vocab_size:
                raise ValueError(f"{path}: holds token {row.max()}, beyond vocab_size "
                                 f"{self.vocab_size}")
        batch = torch.from_numpy(batch)
        # clones, since contiguous() of a single row would share it
        return batch[:, :-1].clone(), batch[:, 1:].clone()
