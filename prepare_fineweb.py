"""Text in, token shards out.

    python prepare_fineweb.py --subset sample-10BT            # streamed from the Hugging Face hub
    python prepare_fineweb.py --files a.parquet b.jsonl.gz c.txt --out data/mine
    python prepare_fineweb.py --shards 10                     # FineWeb that is tokenized already

Every document is preceded by the end-of-text token and documents run on across shards, of which the first is for
validation. Interrupted and started again with the same arguments, it goes on after the last complete shard.
"""
import argparse
import fcntl
import glob
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import zlib
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import closing
from functools import cached_property

import numpy as np
from tqdm import tqdm

from data import read_meta, read_shard, write_atomically, write_shard

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text"}  # of datasets
SUBSET_TOKENS = {"sample-10BT": 10.35e9, "sample-100BT": 103e9}  # of GPT-2, about: for the time left
BATCH_CHARS = 2**20  # of text that a worker encodes at once
BAR = {"unit": " tokens", "unit_scale": True, "mininterval": 1}


class Refused(Exception):
    """The command line asks for what cannot be: exit status 2."""


class GPT2Tokenizer:
    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken

        self.encoding = tiktoken.get_encoding("gpt2")

    @cached_property  # which workers that only encode do not need
    def symbols(self):
        return [self.encoding.decode_single_token_bytes(token) for token in range(self.vocab_size)]

    def encode(self, text):
        # tiktoken's regular expression overflows its stack on a run of some 500,000 blanks
        pieces = re.split(r"(\s{100000})", text)
        return np.array([token for piece in pieces for token in self.encoding.encode_ordinary(piece)], np.uint16)

    def decode(self, tokens):
        return self.encoding.decode([t for t in np.asarray(tokens).tolist() if t < self.vocab_size])


class ByteTokenizer:
    name, vocab_size, eot = "byte", 257, 256
    symbols = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, tokens):
        known = (self.symbols[t] for t in np.asarray(tokens).tolist() if t < self.vocab_size)
        return b"".join(known).decode("utf-8", "replace")


TOKENIZERS = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer}


def get_tokenizer(name):
    """Tokenizer with name, vocab_size, eot, symbols (the bytes of each token), encode(str) -> uint16 (n,) and
    decode(tokens) -> str.

    encode adds no eot and takes the text of a special token as ordinary text. decode skips what lies beyond the
    vocabulary, which models pad. ValueError for an unknown name.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}; known: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def read_batches(sources, position):
    """Yield (position, texts): a few documents, and where in the sources the first of them stands."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    for i in range(position["source"], len(sources)):
        name, arguments = sources[i]
        try:
            documents = datasets.load_dataset(**arguments, split="train", streaming=True)
            if documents.features is not None and "text" not in documents.features:
                raise ValueError("has no `text` column")
            if position["state"]:
                documents.load_state_dict(position["state"])
            texts, size = [], 0
            for document in documents:
                text = document.get("text")
                if not isinstance(text, str):
                    raise ValueError(f"`text` must be a string in every row, found {text!r:.40}")
                texts.append(text)
                size += len(text) + 1
                if size >= BATCH_CHARS:
                    yield position, texts
                    position, texts, size = {"source": i, "state": documents.state_dict()}, [], 0
            if texts:
                yield position, texts
            position = {"source": i + 1, "state": None}
        except UnicodeDecodeError as e:
            raise ValueError(f"{name}: not UTF-8 ({e})") from e
        except Exception as e:  # the readers of many formats and the network have no error in common
            raise ValueError(f"{name}: {str(e) or type(e).__name__}") from e


def start_worker(name):
    def die_with_parent():  # a parent killed with -9 cannot tell its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    global tokenizer
    tokenizer = get_tokenizer(name)


def encode_batch(texts):
    eot = np.array([tokenizer.eot], np.uint16)
    return np.concatenate([part for text in texts for part in (eot, tokenizer.encode(text))])


def encode_batches(sources, position, tokenizer_name, processes):
    """Yield (position, tokens uint16 (n,)) of every batch, in order, reading only a few batches ahead."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker, (tokenizer_name,))
    pending = deque()
    try:
        for position, texts in read_batches(sources, position):
            # workers start here and inherit the mask: Ctrl-C reaches every process, but only this one should heed it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending.append((position, pool.submit(encode_batch, texts)))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(pending) > 2 * processes:
                position, tokens = pending.popleft()
                yield position, tokens.result()
        for position, tokens in pending:
            yield position, tokens.result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_json(path, value):
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_meta(out, tokenizer, train_tokens, val_tokens, **more):
    write_json(os.path.join(out, "meta.json"), {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
               "eot": tokenizer.eot, "train_tokens": train_tokens, "val_tokens": val_tokens, **more})


def open_folder(out, **arguments):
    """Make the folder, lock it until this process ends, return what its meta.json and progress.json hold, or None.

    Refused if either says that the folder was made with other arguments.
    """
    os.makedirs(out, exist_ok=True)
    try:
        fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"{out}: another process is at work in this folder") from None
    found = []
    for path in (os.path.join(out, "meta.json"), os.path.join(out, "progress.json")):
        try:
            with open(path, encoding="utf-8") as f:
                found.append(json.load(f))
            for key in arguments:
                if found[-1].get(key) != arguments[key]:
                    raise Refused(f"{path}: made with another {key} ({found[-1].get(key)}); give another --out")
        except FileNotFoundError:
            found.append(None)
        except (ValueError, AttributeError):
            raise Refused(f"{path}: does not parse; give another --out") from None
    return found


def refuse_foreign(out, ours):
    if foreign := {name for name in os.listdir(out) if name.endswith(".bin")} - {*ours}:
        raise Refused(f"{os.path.join(out, min(foreign))}: not a shard of this data; give another --out")


def prepare(out, sources, source, tokenizer, tokens, shard_tokens, processes, expected):
    """Tokenize sources [(name, arguments of load_dataset)] into shards of shard_tokens, `tokens` in all (None: all)."""
    arguments = {"source": source, "tokenizer": tokenizer.name, "shard_tokens": shard_tokens, "tokens": tokens}
    meta, progress = open_folder(out, **arguments)
    stem, progress_path = os.path.join(out, os.path.basename(os.path.abspath(out))), os.path.join(out, "progress.json")
    if meta:
        if progress:
            os.unlink(progress_path)
        return
    if not progress:
        refuse_foreign(out, ())
        progress = {**arguments, "shards": 0, "position": {"source": 0, "state": None}, "skip": 0}
    paths = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{i:06d}.bin" for i in range(progress["shards"])]
    for path in paths[:-1]:
        read_shard(path)

    done, skip = progress["shards"] * shard_tokens, progress["skip"]  # skip: of the first batch, stand in a shard
    shard, filled = np.empty(shard_tokens, np.uint16), 0
    with closing(encode_batches(sources, progress["position"], tokenizer.name, processes)) as batches, \
         tqdm(initial=done, total=tokens or expected, **BAR) as bar:
        for position, batch in batches:
            start, end = skip, min(len(batch), skip + (tokens or sys.maxsize) - done)
            done, skip = done + end - start, 0
            bar.update(end - start)
            while start < end:
                if filled == shard_tokens:  # full shards wait for the next token: only then they are not the last
                    write_json(progress_path, progress)  # also before the first, which would else be foreign
                    write_shard(paths[-1], shard)
                    progress.update(shards=len(paths), position=position, skip=start)
                    write_json(progress_path, progress)
                    paths.append(f"{stem}_train_{len(paths) - 1:06d}.bin")
                    filled = 0
                n = min(shard_tokens - filled, end - start)
                shard[filled : filled + n] = batch[start : start + n]
                filled, start = filled + n, start + n
            if done == tokens:
                break
    shard, val_tokens = shard[:filled], shard_tokens
    if len(paths) == 1:  # a small text: its first tenth, by whole documents, is for validation
        starts = np.flatnonzero(shard == tokenizer.eot)
        if len(starts) < 2:
            raise ValueError(f"{source}: {len(starts)} documents; validation and training need one each")
        val_tokens = int(max(starts[1], *starts[starts <= filled / 10]))
        write_json(progress_path, progress)
        write_shard(paths[0], shard[:val_tokens])
        paths, shard = [f"{stem}_train_000000.bin"], shard[val_tokens:]
    write_shard(paths[-1], shard)
    write_meta(out, tokenizer, done - val_tokens, val_tokens, source=source, shard_tokens=shard_tokens, tokens=tokens)
    os.unlink(progress_path)


def fetch_shards(out, n):
    """Download n training shards of GPT-2 tokens, and the validation shard, from the Hugging Face hub."""
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # plain HTTP times out, and goes on where a connection broke
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)  # it logs what it raises
    huggingface_hub.utils.disable_progress_bars()
    repo = "kjj0/fineweb10B-gpt2" if n <= 103 else "kjj0/fineweb100B-gpt2"
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, n + 1)]
    open_folder(out, source=repo)
    refuse_foreign(out, names)
    partial, lengths = os.path.join(out, ".download"), []
    with tqdm(total=10**8 * len(names), **BAR) as bar:
        for name in names:
            path = os.path.join(out, name)
            try:
                lengths.append(len(read_shard(path)))
            except (OSError, ValueError):  # absent or not whole
                got = os.path.join(partial, name)
                try:
                    huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_dir=partial)
                    lengths.append(len(read_shard(got)))
                except Exception as e:  # the errors of httpx, the hub and the system have nothing in common
                    if os.path.exists(got):  # a bad one; what is only partly there has another name
                        os.unlink(got)
                    raise ValueError(f"{repo}/{name}: download failed: {str(e) or type(e).__name__}") from e
                os.replace(got, path)
            bar.update(lengths[-1])
    shutil.rmtree(partial, ignore_errors=True)
    write_meta(out, GPT2Tokenizer, sum(lengths[1:]), lengths[0], source=repo)


def prepare_stdlib(out):
    """Make `out` from the Python standard library's own source files, as bytes: text that is always there.

    Whole files go to validation (1 in 20) or training. The folder appears complete or not at all; of two processes
    that make it at once, the first wins and the other discards its own. OSError if it cannot be written.
    """
    stdlib, parts = sysconfig.get_path("stdlib"), {"train": [], "val": []}
    for path in sorted(glob.glob(os.path.join(glob.escape(stdlib), "**", "*.py"), recursive=True)):
        name = os.path.relpath(path, stdlib)
        if not {"site-packages", "dist-packages", "__pycache__", "test", "tests"} & {*name.split(os.sep)}:
            with open(path, "rb") as f:
                document = np.frombuffer(f.read(), np.uint8)
            parts["val" if zlib.crc32(name.encode()) % 20 == 0 else "train"] += [[ByteTokenizer.eot], document]
    parent, name = os.path.split(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    building = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        os.chmod(building, 0o755)  # mkdtemp's is for its owner alone
        tokens = {split: np.concatenate(parts[split]) for split in parts}
        for split in tokens:
            write_shard(os.path.join(building, f"stdlib_{split}_000000.bin"), tokens[split])
        write_meta(building, ByteTokenizer, len(tokens["train"]), len(tokens["val"]),
                   source=f"Python {sys.version.split()[0]} standard library")
        os.rename(building, out)
    except OSError:
        if not os.path.exists(os.path.join(out, "meta.json")):
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def file_arguments(path):
    kind = re.search(r"\.parquet$|\.(jsonl?|ndjson|txt)(?=(\.gz|\.zst)?$)", path)
    if not kind:
        raise Refused(f"{path}: unknown kind of file; known: {', '.join(READERS)}, all but the first also .gz or .zst")
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such file")
    if not os.path.getsize(path):
        raise Refused(f"{path}: is empty")
    arguments = {"path": READERS[kind[0]], "data_files": [glob.escape(os.path.abspath(path))]}
    return {**arguments, "columns": ["text"]} if kind[0] == ".parquet" else arguments  # the others are not read then


def number(text):
    if not 1 <= float(text) < 2**53 or float(text) % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(float(text))


def main():
    parser = argparse.ArgumentParser(description="Turn text into token shards.")
    parser.print_usage = lambda file: None  # what is asked wrongly gets one line
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--subset", default="sample-10BT", help="of FineWeb, streamed (default: %(default)s)")
    source.add_argument("--files", nargs="+", metavar="FILE", help="parquet, JSON lines (.json, .jsonl, .ndjson), text "
                        "(.txt, a document a line); all but parquet also .gz or .zst; documents are the column `text`")
    source.add_argument("--shards", type=number, help="fetch so many ready shards of 100M GPT-2 tokens, up to 1030")
    parser.add_argument("--out", default="data/fineweb", help="folder for the shards (default: %(default)s)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2")
    parser.add_argument("--tokens", type=number, help="stop there, validation included; may be written 2.5e9")
    parser.add_argument("--shard-tokens", type=number, default=10**8, help="in every shard but the last (default: 1e8)")
    parser.add_argument("--processes", type=number, default=os.cpu_count(), help="that encode (default: all cores)")
    args = parser.parse_args()
    if args.shards:
        if args.shards > 1030:
            raise Refused(f"--shards {args.shards}: there are 1030")
        if (args.tokenizer, args.tokens, args.shard_tokens) != ("gpt2", None, 10**8):
            raise Refused("--shards fetches GPT-2 tokens as they are, without --tokenizer, --tokens, --shard-tokens")
        fetch_shards(args.out, args.shards)
    else:
        if args.shard_tokens >= 2**31:
            raise Refused(f"--shard-tokens {args.shard_tokens}: must be below 2**31, the header counts in int32")
        name = " ".join(args.files) if args.files else f"HuggingFaceFW/fineweb {args.subset}"
        expected = None if args.files or args.tokenizer != "gpt2" else SUBSET_TOKENS.get(args.subset)
        sources = [(path, file_arguments(path)) for path in args.files or ()]
        sources = sources or [(name, {"path": "HuggingFaceFW/fineweb", "name": args.subset, "columns": ["text"]})]
        prepare(args.out, sources, name, get_tokenizer(args.tokenizer), args.tokens, args.shard_tokens,
                args.processes, expected)
    meta = read_meta(args.out)
    print(f"{args.out}: complete, {meta['train_tokens']} training tokens, {meta['val_tokens']} validation tokens")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on where it stopped"
    except BrokenExecutor:
        status, message = 1, "a worker died (out of memory?); the same command goes on where it stopped"
    except (Refused, OSError, ValueError) as e:
        status, message = 2 if isinstance(e, Refused) else 1, str(e)
    if status:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        print("prepare_fineweb.py:", *message.split(), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(status)  # threads of the readers sometimes abort an ordinary exit
