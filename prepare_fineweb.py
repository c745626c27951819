"""Text in, token shards out.

    python prepare_fineweb.py --subset sample-10BT            # streamed from the Hugging Face hub
    python prepare_fineweb.py --files a.parquet b.jsonl.gz c.txt --out data/mine
    python prepare_fineweb.py --shards 10                     # FineWeb that is tokenized already

Every document is preceded by the end-of-text token and documents run on across shards, of which
the first is for validation. A text file is ONE document, unless --lines makes each of its lines
one. Interrupted and started again with the same arguments, it goes on after the last complete
shard.
"""
import argparse
import codecs
import glob
import gzip
import io
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
from itertools import islice

import numpy as np
from tqdm import tqdm

from data import read_meta, read_shard, warn_once, write_atomically, write_shard

FINEWEB = "HuggingFaceFW/fineweb"
SUBSET_TOKENS = {"sample-10BT": 10.35e9, "sample-100BT": 103e9}  # GPT-2's, about: for the time left
BATCH_CHARS = 2**20  # of text that a worker encodes at once
BAR = {"unit": " tokens", "unit_scale": True, "mininterval": 1}
KIND = re.compile(r"(\.parquet$)|(\.jsonl?|\.ndjson|\.txt)(\.gz|\.zst|)$", re.IGNORECASE)
# A text up to its last break: where the two sides have the tokens of the whole. tiktoken's matches
# end before a blank (Python counts \x1c to \x1f as blanks too), and behind a word before
# punctuation; among blanks, no token of GPT-2 holds two of these kinds, save two newlines.
UP_TO_BREAK = re.compile(r"(?s).*(?:\S(?=[^\S\x1c-\x1f])|[^\W_](?=[!-/:-@\[-`{-~。，、！？])"
                         r"|[ \t\r](?=[ \t\r\n])|\n(?=[ \t\r]))")


class Refused(Exception):
    """The command line asks for what cannot be: exit status 2."""


def first_piece(text, size):
    """The longest beginning, up to `size` characters, that ends at a break; else `size` of them."""
    found = UP_TO_BREAK.match(text, 0, size) if len(text) > size else None
    return found[0] if found else text[:size]


class GPT2Tokenizer:
    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken

        self.encoding = tiktoken.get_encoding("gpt2")

    @cached_property  # which workers that only encode do not need
    def symbols(self):
        return [self.encoding.decode_single_token_bytes(token) for token in range(self.vocab_size)]

    def encode(self, text):
        # in pieces: some 500,000 blanks overflow the stack of tiktoken's regular expression
        start, parts = 0, [np.empty(0, np.uint16)]
        while start < len(text):
            piece = first_piece(text[start : start + 2**16 + 1], 2**16)
            parts.append(np.array(self.encoding.encode_ordinary(piece), np.uint16))
            start += len(piece)
        return np.concatenate(parts)

    def decode(self, tokens):
        known = [t for t in np.asarray(tokens).tolist() if t < self.vocab_size]
        return self.encoding.decode(known)


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
    """Tokenizer with name, vocab_size, eot, symbols (the bytes of each token),
    encode(str) -> uint16 (n,) and decode(tokens) -> str.

    encode adds no eot and takes a special token's text as ordinary text. decode skips what lies
    beyond the vocabulary, which models pad. ValueError for an unknown name.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}; known: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


# The readers yield (place, text or None) of every document from a place in an open file on. The
# place is a byte (of the uncompressed file) or, in parquet and JSON lists, a row.


def read_text(file, place, column):
    """The file is one document, in pieces of at most BATCH_CHARS."""
    decoder, text, ended = codecs.getincrementaldecoder("utf-8")(), "", False
    skip_bytes(file, place)
    while text or not ended:
        while len(text) <= BATCH_CHARS and not ended:
            block = file.read(BATCH_CHARS)
            ended = not block
            text += decoder.decode(block, final=ended)
        piece = first_piece(text, BATCH_CHARS)
        yield place, piece if place else piece.removeprefix("\ufeff")
        place += len(piece.encode())
        text = text[len(piece) :]


def read_lines(file, place, column):
    skip_bytes(file, place)
    for line in file:
        text = line.decode().removesuffix("\n").removesuffix("\r")
        yield place, text if place else text.removeprefix("\ufeff")
        place += len(line)


def skip_bytes(file, n):
    if file.seekable():
        file.seek(n)
    else:
        while n > 0:
            n -= len(file.read(min(n, BATCH_CHARS))) or n


def read_json(file, place, column):
    """An object a line, or one list of objects."""
    decode = json.JSONDecoder(parse_int=float).decode  # int() limits the digits

    def parse(at, text):
        try:
            return decode(text)
        except ValueError as e:
            raise ValueError(f"not JSON at byte {at}: {e}") from None

    if file.peek(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        rows = islice(enumerate(parse(0, file.read().decode("utf-8-sig"))), place, None)
    else:
        lines = read_lines(file, place, column)
        rows = ((at, parse(at, line)) for at, line in lines if line.strip())
    found, without = place > 0, 0
    for at, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"rows must be JSON objects, found {row!r:.40}")
        found = found or column in row
        if found:
            yield from ((at, None) for _ in range(without))
            yield at, row.get(column)
        without = 0 if found else without + 1
        if without == 1000:
            break
    if without:
        raise no_column(column, row)


def read_parquet(file, place, column):
    import pyarrow.parquet

    table, row = pyarrow.parquet.ParquetFile(file), 0
    if table.metadata.num_rows and column not in table.schema_arrow.names:
        raise no_column(column, table.schema_arrow.names)
    for group in range(table.num_row_groups):
        end = row + table.metadata.row_group(group).num_rows
        for batch in table.iter_batches(256, [group], [column]) if end > place else ():
            for text in batch.column(0).to_pylist():
                if row >= place:
                    yield row, text
                row += 1
        row = end


READERS = {".parquet": read_parquet, ".json": read_json, ".jsonl": read_json, ".ndjson": read_json,
           ".txt": read_text}


def no_column(column, others):
    return ValueError(f"has no `{column}` column; --column names another: {', '.join(others)}")


def open_binary(path):
    """The uncompressed bytes of a file, here or on the hub (hf://…)."""
    if path.startswith("hf://"):
        import huggingface_hub

        return huggingface_hub.HfFileSystem().open(path)
    if path.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")


def list_subset(subset):
    """Where the files of a subset of FineWeb are."""
    import datasets

    datasets.logging.set_verbosity(100)  # above CRITICAL: it logs what it raises
    try:
        return sorted(datasets.load_dataset_builder(FINEWEB, subset).config.data_files["train"])
    except Exception as e:  # the errors of the network and of the hub have nothing in common
        raise ValueError(f"{FINEWEB} {subset}: {str(e) or type(e).__name__}") from e


def read_batches(files, column, lines, position):
    """Yield (position, [(whether a document begins, text), …]), about BATCH_CHARS each.

    position: the file and the place in it where the batch begins, and the null rows before it. The
    last batch is empty: where the text ends.
    """
    nulls = position["nulls"]
    for i in range(position["source"], len(files)):
        batch, size, start = [], 0, position["place"] if i == position["source"] else 0
        try:
            kind = (KIND.search(files[i])[1] or KIND.search(files[i])[2]).lower()
            reader = read_lines if lines and kind == ".txt" else READERS[kind]
            with open_binary(files[i]) as file:
                for place, text in reader(file, start, column):
                    if text is None:
                        nulls += 1
                        continue
                    if not isinstance(text, str):
                        raise ValueError(f"`{column}` must be a string, found {text!r:.40}")
                    if not batch:
                        here = {"source": i, "place": place, "nulls": nulls}
                    batch.append((reader is not read_text or place == 0, text))
                    size += len(text) + 1
                    if size >= BATCH_CHARS:
                        yield here, batch
                        batch, size = [], 0
            if batch:
                yield here, batch
        except UnicodeDecodeError as e:
            raise ValueError(f"{files[i]}: not UTF-8 ({e})") from e
        except Exception as e:  # those of the formats and of the network have nothing in common
            raise ValueError(f"{files[i]}: {str(e) or type(e).__name__}") from e
    yield {"source": len(files), "place": 0, "nulls": nulls}, []


def start_worker(name):
    def die_with_parent():  # a parent killed with -9 cannot tell its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    global tokenizer
    tokenizer = get_tokenizer(name)


def encode_batch(batch):
    parts = [np.empty(0, np.uint16)]
    for begins, text in batch:
        parts += [[tokenizer.eot]] * begins + [tokenizer.encode(text)]
    return np.concatenate(parts).astype(np.uint16)


def encode_batches(batches, tokenizer_name, processes):
    """Yield (position, tokens uint16 (n,)) of every batch, in order, reading only a few ahead."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, start_worker, (tokenizer_name,))
    pending = deque()
    try:
        for position, batch in batches:
            # workers start here and inherit the mask: Ctrl-C reaches every process, but only this
            # one should heed it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            pending.append((position, pool.submit(encode_batch, batch)))
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
    write_json(os.path.join(out, "meta.json"), {
        "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
        "train_tokens": train_tokens, "val_tokens": val_tokens, **more})


def open_folder(out, **arguments):
    """Make the folder, lock it until this process ends, return what its meta.json and its
    progress.json hold, or None.

    Refused if either says that the folder was made with other arguments.
    """
    try:
        import fcntl  # here: who only imports a tokenizer may lack it (Windows)
    except ImportError:
        raise OSError("needs Linux or macOS: this system cannot lock the folder") from None

    os.makedirs(out, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"{out}: another process is at work in this folder") from None
    except OSError as e:  # NFS and cluster file systems
        warn_once(f"{out} cannot be locked ({e.strerror}): let no second process work in it")
    found = []
    for path in (os.path.join(out, "meta.json"), os.path.join(out, "progress.json")):
        try:
            with open(path, encoding="utf-8") as f:
                found.append(json.load(f))
            for key in arguments:
                if found[-1].get(key) != arguments[key]:
                    raise Refused(f"{path}: made with another {key} ({found[-1].get(key)}); "
                                  "give another --out")
        except FileNotFoundError:
            found.append(None)
        except (ValueError, AttributeError):
            raise Refused(f"{path}: does not parse; give another --out") from None
    return found


def refuse_foreign(out, ours):
    if foreign := {name for name in os.listdir(out) if name.endswith(".bin")} - {*ours}:
        path = os.path.join(out, min(foreign))
        raise Refused(f"{path}: not a shard of this data; give another --out")


def prepare(out, list_files, what, tokenizer, processes, expected):
    """Tokenize list_files(). what: options that a rerun must repeat; expected: tokens, about."""
    tokens, shard_tokens = what["tokens"], what["shard_tokens"]
    meta, progress = open_folder(out, tokenizer=tokenizer.name, **what)
    stem = os.path.join(out, os.path.basename(os.path.abspath(out)))
    progress_path = os.path.join(out, "progress.json")
    if meta:
        if progress:
            os.unlink(progress_path)
        return
    if not progress:
        refuse_foreign(out, ())
        progress = {**what, "tokenizer": tokenizer.name, "shards": 0, "skip": 0, "crc32": None,
                    "position": {"source": 0, "place": 0, "nulls": 0}}
    paths = [f"{stem}_val_000000.bin"]
    paths += [f"{stem}_train_{i:06d}.bin" for i in range(progress["shards"])]
    for path in paths[:-1]:
        read_shard(path)

    # the first batch goes on from a position: `skip` tokens of it stand in the last shard already
    done, skip, crc = progress["shards"] * shard_tokens, progress["skip"], progress["crc32"]
    shard, filled = np.empty(shard_tokens, np.uint16), 0
    texts = read_batches(list_files(), what["column"], what["lines"], progress["position"])
    with closing(encode_batches(texts, tokenizer.name, processes)) as batches, \
         tqdm(initial=done, total=tokens or expected, **BAR) as bar:
        for position, batch in batches:
            if crc not in (None, zlib.crc32(batch)):
                raise ValueError(f"{what['source']}: is not the text that {out} was begun with, or "
                                 "the tokenizer is another version; give another --out")
            start, end = skip, min(len(batch), skip + (tokens or sys.maxsize) - done)
            done, skip, crc = done + end - start, 0, None
            bar.update(end - start)
            while start < end:
                # full shards wait for the next token: only then they are not the last
                if filled == shard_tokens:
                    write_json(progress_path, progress)  # first: a shard without it is foreign
                    write_shard(paths[-1], shard)
                    progress.update(shards=len(paths), position=position, skip=start,
                                    crc32=zlib.crc32(batch))
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
        if filled < 2:
            raise ValueError(f"{what['source']}: {filled} tokens; validation and training "
                             "need one each")
        starts, tenth = np.flatnonzero(shard == tokenizer.eot), max(1, filled // 10)
        val_tokens = int(max(starts[1], *starts[starts <= tenth])) if len(starts) > 1 else tenth
        write_json(progress_path, progress)
        write_shard(paths[0], shard[:val_tokens])
        paths, shard = [f"{stem}_train_000000.bin"], shard[val_tokens:]
    write_shard(paths[-1], shard)
    write_meta(out, tokenizer, done - val_tokens, val_tokens, **what)
    os.unlink(progress_path)
    if position["nulls"]:
        print(f"{out}: {position['nulls']} rows whose `{what['column']}` is null were skipped")


def fetch_shards(out, n):
    """Download the validation shard and n training shards of GPT-2 tokens from the hub."""
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # plain HTTP times out, and resumes
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(100)  # above CRITICAL: it logs what it raises
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
                    huggingface_hub.hf_hub_download(repo, name, repo_type="dataset",
                                                    local_dir=partial)
                    lengths.append(len(read_shard(got)))
                except Exception as e:  # httpx, the hub and the system have no error in common
                    if os.path.exists(got):  # a bad one; what is only partly there has another name
                        os.unlink(got)
                    reason = str(e) or type(e).__name__
                    raise ValueError(f"{repo}/{name}: download failed: {reason}") from e
                os.replace(got, path)
            bar.update(lengths[-1])
    shutil.rmtree(partial, ignore_errors=True)
    write_meta(out, GPT2Tokenizer, sum(lengths[1:]), lengths[0], source=repo)


def prepare_stdlib(out):
    """Make `out` from the Python standard library's source files, as bytes: a text always at hand.

    Whole files go to validation (1 in 20) or training. The folder appears complete or not at all;
    if two processes make it at once, the first wins and the other discards its own. OSError if it
    cannot be written.
    """
    stdlib, parts = sysconfig.get_path("stdlib"), {"train": [], "val": []}
    for path in sorted(glob.glob(os.path.join(glob.escape(stdlib), "**", "*.py"), recursive=True)):
        name = os.path.relpath(path, stdlib)
        others = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
        if not others & {*name.split(os.sep)}:
            with open(path, "rb") as f:
                document = np.frombuffer(f.read(), np.uint8)
            split = "val" if zlib.crc32(name.encode()) % 20 == 0 else "train"
            parts[split] += [[ByteTokenizer.eot], document]
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


def number(text):
    if not 1 <= float(text) < 2**53 or float(text) % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(float(text))


def main():
    parser = argparse.ArgumentParser(
        description="Turn text into token shards. A .txt FILE IS ONE DOCUMENT, however long; with "
        "--lines EACH LINE IS ONE. Started again with the same arguments, it goes on.")
    parser.print_usage = lambda file: None  # a usage error gets one line
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    source.add_argument("--subset", default="sample-10BT", help="of FineWeb (default: %(default)s)")
    source.add_argument("--files", nargs="+", metavar="FILE", help="parquet, JSON lines (.json, "
                        ".jsonl, .ndjson) or text (.txt); all but parquet also .gz or .zst")
    source.add_argument("--shards", type=number, help="fetch ready shards of 100M GPT-2 tokens")
    add("--lines", action="store_true",
        help="EACH LINE of a .txt file is a document; without this THE WHOLE FILE IS ONE")
    add("--column", default="text", help="that holds the text, but in .txt (default: %(default)s)")
    add("--out", default="data/fineweb", help="folder for the shards (default: %(default)s)")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2")
    add("--tokens", type=number, help="stop there, validation included; may be written 2.5e9")
    add("--shard-tokens", type=number, default=10**8, help="in every shard but the last (1e8)")
    add("--processes", type=number, default=os.cpu_count(), help="that encode (default: all cores)")
    args = parser.parse_args()
    if args.shards:
        if args.shards > 1030:
            raise Refused(f"--shards {args.shards}: there are 1030")
        for option in ("lines", "column", "tokenizer", "tokens", "shard_tokens"):
            if getattr(args, option) != parser.get_default(option):
                raise Refused("--shards fetches GPT-2 tokens as they are, without "
                              f"--{option.replace('_', '-')}")
        fetch_shards(args.out, args.shards)
    else:
        if args.shard_tokens >= 2**31:
            raise Refused(f"--shard-tokens {args.shard_tokens}: must be below 2**31")
        for path in args.files or ():
            if not KIND.search(path):
                raise Refused(f"{path}: unknown kind of file; known: {', '.join(READERS)}, all but "
                              "the first also .gz or .zst")
            if not os.path.isfile(path) or not os.path.getsize(path):
                raise Refused(f"{path}: {'is empty' if os.path.isfile(path) else 'no such file'}")
        what = {"source": " ".join(args.files or (FINEWEB, args.subset)), "lines": args.lines,
                "column": args.column, "tokens": args.tokens, "shard_tokens": args.shard_tokens}
        known = args.tokenizer == "gpt2" and not args.files
        prepare(args.out, lambda: args.files or list_subset(args.subset), what,
                get_tokenizer(args.tokenizer), args.processes,
                SUBSET_TOKENS.get(args.subset) if known else None)
    meta = read_meta(args.out)
    print(f"{args.out}: complete, {meta['train_tokens']} training tokens, "
          f"{meta['val_tokens']} validation tokens")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on where it stopped"
    except BrokenExecutor:
        status, message = 1, "a worker died (out of memory?); the same command goes on"
    except (Refused, OSError, ValueError) as e:
        status, message = 2 if isinstance(e, Refused) else 1, str(e)
    if status:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        print("prepare_fineweb.py:", *message.split(), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(status)  # threads of the readers sometimes abort an ordinary exit
