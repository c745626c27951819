"""Text in, token shards out.

    python prepare_fineweb.py --subset sample-10BT            # streamed from the Hugging Face hub
    python prepare_fineweb.py --files a.parquet b.jsonl.gz c.txt --out data/mine
    python prepare_fineweb.py --shards 10                     # FineWeb that is tokenized already

The end-of-text token precedes every document, and documents run on across shards. The first shard
is for validation. A text file is ONE document; with --lines each of its lines is one. The same
command, started again after an interruption, continues after the last complete shard.
"""
import argparse
import glob
import io
import json
import os
import re
import signal
import sys
import sysconfig
import tempfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data import read_meta, read_shard, shard_length, write_atomically, write_shard

FINEWEB = "HuggingFaceFW/fineweb"
NO_TEXT = "no text in column `{}`; --column names another"
BATCH_CHARS = 2**20  # of text that a thread encodes at once
# tiktoken overflows its stack on half a million blanks, so long texts are encoded in pieces. They
# end before a blank that follows a word where they can, since no token crosses such a place.
PIECE = re.compile(r"(?s).{,65535}(?:\S(?=[ \t\n])|.\Z)|.{1,65536}")


def fail(message, status=2):  # 2: usage error, 1: failed while running
    print(f"{os.path.basename(sys.argv[0])}:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


# ---- tokenizers

class GPT2Tokenizer:
    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken

        self.encoding = tiktoken.get_encoding("gpt2")
        self.symbols = [self.encoding.decode_single_token_bytes(t) for t in range(self.vocab_size)]

    def encode(self, text):
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        parts = [np.empty(0, np.uint32)]
        for piece in PIECE.findall(text):
            parts.append(self.encoding.encode_to_numpy(piece, disallowed_special=()))
        return np.concatenate(parts).astype(np.uint16)

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


# ---- reading: each reader yields the texts of an open file, None where a row has none

def read_parquet(file, column):
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    if table.metadata.num_rows and column not in table.schema_arrow.names:
        raise ValueError(NO_TEXT.format(column))
    for batch in table.iter_batches(256, columns=[column]):
        for row in batch.to_pylist():
            yield row[column]


def open_text(file):
    return io.TextIOWrapper(file, "utf-8-sig", newline="\n")  # "\n" leaves "\r" as it is


def read_json(file, column):
    for n, line in enumerate(open_text(file), 1):
        if line.strip():
            try:
                text = json.loads(line).get(column)
            except (ValueError, AttributeError):
                raise ValueError(f"line {n} is not a JSON object: {line:.40}") from None
            yield text


def read_lines(file, column):
    for line in open_text(file):
        yield line.removesuffix("\n").removesuffix("\r")


def read_text(file, column):
    """The parts of one document, each at least BATCH_CHARS long and so a batch of its own."""
    text, size = open_text(file), BATCH_CHARS + 2**16
    rest = text.read(size)
    while more := text.read(size):
        *pieces, last = PIECE.findall(rest)
        yield "".join(pieces)
        rest = last + more
    yield rest


READERS = {".parquet": read_parquet, ".json": read_json, ".jsonl": read_json, ".ndjson": read_json,
           ".txt": read_text}


def kind_of(path):
    """(reader or None, compression or None), by the ending of the name."""
    stem, suffix = os.path.splitext(path.lower())
    codec = {".gz": "gzip", ".zst": "zstd"}.get(suffix)
    return READERS.get(os.path.splitext(stem)[1] if codec else suffix), codec


def open_binary(path):
    """The uncompressed bytes of a file, here or on the hub (hf://…)."""
    if path.startswith("hf://"):
        import huggingface_hub

        return huggingface_hub.HfFileSystem().open(path)
    import pyarrow

    return pyarrow.input_stream(path, compression=kind_of(path)[1])


def list_subset(subset):
    """The paths (hf://…) of a subset of FineWeb."""
    import datasets

    datasets.logging.set_verbosity(100)  # above CRITICAL: it logs what it raises
    try:
        return sorted(datasets.load_dataset_builder(FINEWEB, subset).config.data_files["train"])
    except Exception as e:  # the errors of the network and of the hub have no base in common
        raise ValueError(f"{FINEWEB} {subset}: {str(e) or type(e).__name__}") from e


def cut_batches(texts):
    """Yield lists of texts of about BATCH_CHARS together."""
    batch, size = [], 0
    for text in texts:
        if not isinstance(text, str | None):
            raise ValueError(f"a text must be a string, found {text!r:.40}")
        batch.append(text)
        size += 1 + len(text or "")
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_batches(files, column, lines, start):
    """Yield ([file, batch], texts, continued), from the position `start` = [file, batch] on.

    continued: the first text continues the document of the batch before.
    """
    for i in range(start[0], len(files)):
        reader, _ = kind_of(files[i])
        reader = read_lines if lines and reader is read_text else reader
        try:
            with open_binary(files[i]) as file:
                for n, texts in enumerate(cut_batches(reader(file, column))):
                    if n == 0 and reader is read_json and all(text is None for text in texts):
                        raise ValueError(NO_TEXT.format(column))
                    if [i, n] >= start:  # those before it were encoded by an interrupted run
                        yield [i, n], texts, reader is read_text and n > 0
        except UnicodeDecodeError as e:
            raise ValueError(f"{files[i]}: not UTF-8 ({e})") from e
        except Exception as e:  # the errors of formats and of the network have no base in common
            raise ValueError(f"{files[i]}: {str(e) or type(e).__name__}") from e


# ---- encoding

def encode_batch(tokenizer, texts, continued):
    parts = [np.empty(0, np.uint16)]
    for text in texts:
        if text is not None:
            parts += [np.uint16([tokenizer.eot]), tokenizer.encode(text)]
    return np.concatenate(parts)[continued:]  # no eot inside a document


def encode_batches(batches, tokenizer):
    """Yield (position, number of nulls, tokens uint16 (n,)) of each batch, in order.

    There is a thread for each core: tiktoken releases the GIL. Only a few batches are read ahead.
    """
    pending, cores = deque(), os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for position, texts, continued in batches:
            tokens = pool.submit(encode_batch, tokenizer, texts, continued)
            pending.append((position, texts.count(None), tokens))
            if len(pending) > 2 * cores:
                position, nulls, tokens = pending.popleft()
                yield position, nulls, tokens.result()
        for position, nulls, tokens in pending:
            yield position, nulls, tokens.result()


# ---- writing

def write_json(path, value):
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_meta(out, tokenizer, train_tokens, val_tokens, made_with):
    write_json(os.path.join(out, "meta.json"), {
        "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
        "train_tokens": train_tokens, "val_tokens": val_tokens, **made_with})


def open_folder(out, made_with):
    """Make the folder if need be. Return its meta.json, its progress.json, or {} if it has neither.

    Usage error if it was made with other arguments than `made_with`.
    """
    os.makedirs(out, exist_ok=True)
    for name in ("meta.json", "progress.json"):
        path = os.path.join(out, name)
        if os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as file:
                    found = json.load(file)
                if not isinstance(found, dict):
                    raise ValueError("not an object")
            except ValueError as e:
                fail(f"{path}: not valid JSON ({e}); give another --out")
            for key, value in made_with.items():
                if found.get(key) != value:
                    fail(f"{path}: made with another {key}, {found.get(key)}; give another --out")
            return found
    return {}


def refuse_other_shards(out, ours):
    """Usage error if the folder holds shards that training would mix with ours."""
    others = {name for name in os.listdir(out) if name.endswith(".bin")} - set(ours)
    if others:
        fail(f"{os.path.join(out, min(others))}: not a shard of this data; give another --out")


def validation_tokens(tokens, eot):
    """How long the first tenth of a small text is, by whole documents; a single one is cut."""
    tenth = max(1, len(tokens) // 10)
    starts = np.flatnonzero(tokens == eot)
    return int(max(starts[1], starts[starts <= tenth][-1])) if len(starts) > 1 else tenth


def prepare(out, files, tokenizer, made_with, progress):
    """Tokenize the files into shards; `progress` is what an interrupted run has left, or {}."""
    shard_tokens, limit = made_with["shard_tokens"], made_with["tokens"]
    progress_path = os.path.join(out, "progress.json")
    sizes = [os.path.getsize(path) for path in files if not path.startswith("hf://")]
    if not progress:
        refuse_other_shards(out, ())
        progress = {**made_with, "sizes": sizes, "shards": 0, "position": [0, 0], "skip": 0,
                    "nulls": 0}
    if progress.get("sizes") != sizes:  # older versions did not write them
        fail(f"{progress_path}: begun with files of other sizes; give another --out")
    stem = os.path.join(out, os.path.basename(os.path.abspath(out)))

    def save_shard(i, tokens):
        write_json(progress_path, progress)  # first: it says whose shards these are
        write_shard(f"{stem}_train_{i - 1:06d}.bin" if i else f"{stem}_val_000000.bin", tokens)

    parts, size = [np.empty(0, np.uint16)], 0  # the tokens of the next shard, and their number
    done, nulls = progress["shards"] * shard_tokens, progress["nulls"]
    batches = read_batches(files, made_with["column"], made_with["lines"], progress["position"])
    with tqdm(initial=done, total=limit, unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for position, more_nulls, tokens in encode_batches(batches, tokenizer):
            # a shard may end inside a batch: a resumed run skips what that shard holds
            skip, crc = 0, zlib.crc32(tokens)
            if position == progress["position"]:
                skip = progress["skip"]
                if crc != progress.get("crc", crc):
                    raise ValueError(f"{progress_path}: begun with another text; give another "
                                     "--out")
            end = skip + limit - done if limit else None
            tokens = tokens[skip:end]
            parts.append(tokens)
            size += len(tokens)
            done += len(tokens)
            bar.update(len(tokens))
            while size > shard_tokens:  # not when it is just full: it may be all there is
                rest = np.concatenate(parts)
                save_shard(progress["shards"], rest[:shard_tokens])
                parts, size = [rest[shard_tokens:]], size - shard_tokens
                progress.update(shards=progress["shards"] + 1, position=position,
                                skip=skip + len(tokens) - size, nulls=nulls, crc=crc)
                write_json(progress_path, progress)
            nulls += more_nulls
            if done == limit:
                break

    tokens, shards, val_tokens = np.concatenate(parts), progress["shards"], shard_tokens
    if shards == 0:  # a small text: its beginning is for validation
        if size < 2:
            raise ValueError(f"{made_with['source']}: {size} tokens are too few to split")
        shards, val_tokens = 1, validation_tokens(tokens, tokenizer.eot)
        save_shard(0, tokens[:val_tokens])
        tokens = tokens[val_tokens:]
    save_shard(shards, tokens)
    write_meta(out, tokenizer, done - val_tokens, val_tokens, made_with)
    os.unlink(progress_path)
    if nulls:
        print(f"{out}: skipped {nulls} rows whose `{made_with['column']}` is null")


def fetch_shards(out, n):
    """Download the validation shard and n training shards of GPT-2 tokens from the hub."""
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # plain HTTP times out, and resumes
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(100)  # above CRITICAL: it logs what it raises
    huggingface_hub.utils.disable_progress_bars()
    repo = "kjj0/fineweb10B-gpt2" if n <= 103 else "kjj0/fineweb100B-gpt2"
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, n + 1)]
    open_folder(out, {"source": repo})
    refuse_other_shards(out, names)
    lengths = []
    for name in tqdm(names, unit=" shards"):
        try:
            path = huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_dir=out)
        except Exception as e:  # httpx, the hub and the system have no error in common
            raise ValueError(f"{repo}/{name}: {str(e) or type(e).__name__}") from e
        try:
            lengths.append(len(read_shard(path)))
        except ValueError:
            os.unlink(path)  # or it would not be fetched again
            raise
    write_meta(out, GPT2Tokenizer, sum(lengths[1:]), lengths[0], {"source": repo})


def prepare_stdlib(out):
    """Make `out` from the bytes of Python's standard library: a text that needs no download.

    Whole files go to validation (1 in 20) or training. The folder appears complete or not at all;
    if two processes make it at once, the first wins and the other discards its own. OSError if it
    cannot be written.
    """
    stdlib, parts = sysconfig.get_path("stdlib"), {"train": [], "val": []}
    others = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
    for name in sorted(glob.glob("**/*.py", root_dir=stdlib, recursive=True)):
        if not others.intersection(name.split(os.sep)):
            split = "val" if zlib.crc32(name.encode()) % 20 == 0 else "train"
            document = np.fromfile(os.path.join(stdlib, name), np.uint8)
            parts[split] += [[ByteTokenizer.eot], document]
    tokens = {split: np.concatenate(documents) for split, documents in parts.items()}
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".") as temporary:
        building = os.path.join(temporary, "stdlib")
        os.mkdir(building)
        for split in tokens:
            write_shard(os.path.join(building, f"stdlib_{split}_000000.bin"), tokens[split])
        write_meta(building, ByteTokenizer, len(tokens["train"]), len(tokens["val"]),
                   {"source": f"Python {sys.version.split()[0]} standard library"})
        try:
            os.rename(building, out)
        except OSError:
            if not os.path.exists(os.path.join(out, "meta.json")):
                raise


# ---- command line

def number(text):
    if not 1 <= float(text) < 2**53 or float(text) % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(float(text))


def arguments():
    parser = argparse.ArgumentParser(
        description="Turn text into token shards. A .txt FILE IS ONE DOCUMENT, however long; with "
        "--lines EACH LINE IS ONE. The same command continues after an interruption.")
    parser.error = fail
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    source.add_argument("--subset", default="sample-10BT", help="of FineWeb (default: %(default)s)")
    source.add_argument("--files", nargs="+", metavar="FILE", help="parquet, JSON lines (.json, "
                        ".jsonl, .ndjson) or text (.txt), also as .gz or .zst")
    source.add_argument("--shards", type=number, help="fetch ready shards of 100M GPT-2 tokens")
    add("--lines", action="store_true",
        help="EACH LINE of a .txt file is a document; without this THE WHOLE FILE IS ONE")
    add("--column", default="text", help="that holds the text, but in .txt (default: %(default)s)")
    add("--out", default="data/fineweb", help="folder for the shards (default: %(default)s)")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2")
    add("--tokens", type=number, help="stop there, validation included; may be written 2.5e9")
    add("--shard-tokens", type=number, default=10**8, help="in every shard but the last (1e8)")
    args = parser.parse_args()
    for option in ("lines", "column", "tokenizer", "tokens", "shard_tokens"):
        if args.shards and getattr(args, option) != parser.get_default(option):
            fail(f"--shards fetches GPT-2 tokens as they are, without --{option.replace('_', '-')}")
    if args.shard_tokens >= 2**31:
        fail("--shard-tokens must be below 2**31, which a shard's header can count")
    for path in args.files or ():
        if not kind_of(path)[0]:
            fail(f"{path}: unknown kind of file; known: {', '.join(READERS)}, also as .gz or .zst")
        if not os.path.isfile(path):
            fail(f"{path}: no such file")
    return args


def main():
    args = arguments()
    if args.shards:
        fetch_shards(args.out, args.shards)
    else:
        made_with = {"source": " ".join(args.files or (FINEWEB, args.subset)),
                     "tokenizer": args.tokenizer, "lines": args.lines, "column": args.column,
                     "tokens": args.tokens, "shard_tokens": args.shard_tokens}
        found = open_folder(args.out, made_with)
        if "train_tokens" not in found:  # else it is complete
            files = args.files or list_subset(args.subset)
            prepare(args.out, files, get_tokenizer(args.tokenizer), made_with, found)
    meta = read_meta(args.out)
    shards = [os.path.join(args.out, n) for n in os.listdir(args.out) if n.endswith(".bin")]
    if sum(map(shard_length, shards)) < meta["train_tokens"] + meta["val_tokens"]:
        fail(f"{args.out}: lacks shards that were complete; remove it, or give another --out", 1)
    print(f"{args.out}: complete, {meta['train_tokens']} training tokens, "
          f"{meta['val_tokens']} validation tokens")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues where it stopped", 130)
    except (OSError, ValueError) as e:
        fail(e, 1)
