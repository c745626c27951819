"""data.py and prepare_fineweb.py: real files, real processes, real signals."""
import errno
import gzip
import http.server
import json
import os
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import zlib

import numpy as np
import pytest
import torch

import prepare_fineweb
from data import TokenBatches, read_meta, read_shard, write_shard
from prepare_fineweb import get_tokenizer

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WIKITEXT = os.path.join(HERE, "..", "shared", "data", "wikitext2.parquet")
TIKTOKEN = os.path.join(HERE, "..", "shared", "tiktoken_cache")
needs_gpt2 = pytest.mark.skipif(not os.path.isdir(TIKTOKEN),
                                reason="GPT-2's vocabulary is not in ../shared")
needs_wikitext = pytest.mark.skipif(not os.path.exists(WIKITEXT),
                                    reason="../shared/data/wikitext2.parquet is not there")
os.environ.update(TIKTOKEN_CACHE_DIR=TIKTOKEN) if os.path.isdir(TIKTOKEN) else None
BYTE_META = {"tokenizer": "byte", "vocab_size": 257, "eot": 256}


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    n = len(tokens) if count is None else count
    return (struct.pack("<256i", magic, version, n, *[0] * 253)
            + struct.pack(f"<{len(tokens)}H", *tokens))


# A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*args, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, os.path.join(HERE, "prepare_fineweb.py"), *map(str, args)], cwd=cwd,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, **environment})


def finish(process):
    out, err = process.communicate(timeout=120)
    # what is left of stderr without the progress bar
    return process.returncode, out, [line for line in re.split(r"[\r\n]+", err)
                                     if line.strip() and not re.search(r"\[\d+:\d\d", line)]


def run(*args, **kwargs):
    return finish(start(*args, **kwargs))


def refused(result, status, *words):
    assert result[0] == status, result
    assert len(result[2]) == 1 and result[2][0].startswith("prepare_fineweb.py: "), result
    assert all(word in result[2][0] for word in words), result


def tokens_in(folder):
    """Tokens of every shard in order, validation first, without the help of data.py."""
    names = sorted((n for n in os.listdir(folder) if n.endswith(".bin")),
                   key=lambda n: ("_train_" in n, n))
    return {n: np.fromfile(os.path.join(folder, n), "<u2", offset=1024).tolist() for n in names}


def flat(folder):
    return sum(tokens_in(folder).values(), [])


def as_bytes(documents):
    return [token for text in documents for token in (256, *text.encode())]


def contents(folder):
    return {n: (folder / n).read_bytes() for n in sorted(os.listdir(folder))}


# --- shards ---


def test_shard_format(tmp_path):
    tokens = [1, 258, 65535, 0, 50256]
    for given in (tokens, np.array(tokens, np.uint16), np.array(tokens),
                  np.array(tokens[::-1])[::-1]):
        write_shard(tmp_path / "a.bin", given)
        assert (tmp_path / "a.bin").read_bytes() == shard_bytes(tokens)
    got = read_shard(tmp_path / "a.bin")
    assert isinstance(got, np.memmap) and got.dtype == np.uint16 and got.tolist() == tokens
    with pytest.raises(ValueError):
        got[0] = 1
    for bad in ([65536], [-1]):
        with pytest.raises(ValueError, match="0..65535"):
            write_shard(tmp_path / "a.bin", bad)
    assert os.listdir(tmp_path) == ["a.bin"] and read_shard(tmp_path / "a.bin").tolist() == tokens
    write_shard(tmp_path / "a.bin", [])
    assert read_shard(tmp_path / "a.bin").shape == (0,)


@pytest.mark.parametrize("content, words", [
    (b"", "too short"), (b"x" * 1023, "too short"), (shard_bytes([1, 2], magic=20240519), "magic"),
    (shard_bytes([1, 2], version=2), "version 2"), (shard_bytes([1, 2], count=3), "3 tokens"),
    (shard_bytes([1, 2], count=1), "1 tokens"), (shard_bytes([1, 2], count=-1), "-1 tokens"),
    (shard_bytes([1, 2])[:-1], "2 tokens")])
def test_broken_shard(tmp_path, content, words):
    path = tmp_path / "a_train_000000.bin"
    path.write_bytes(content)
    for read in (lambda: read_shard(path), lambda: TokenBatches(tmp_path, "train", 1, 257)):
        with pytest.raises(ValueError) as e:
            read()
        assert str(path) in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_meta(tmp_path):
    assert read_meta(tmp_path) == {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256}
    (tmp_path / "meta.json").write_text(json.dumps({**BYTE_META, "source": "é"}), encoding="utf-8")
    assert read_meta(tmp_path) == {**BYTE_META, "source": "é"}
    for bad in ("{", "[]", "{}", '{"tokenizer": "byte"}', '{"vocab_size": 257}',
                '{"tokenizer": 1, "vocab_size": 257}', '{"tokenizer": "byte", "vocab_size": "257"}',
                '{"tokenizer": "byte", "vocab_size": 0}', "\x00",
                '{"tokenizer": "byte", "vocab_size": 65537}'):
        (tmp_path / "meta.json").write_text(bad)
        with pytest.raises(ValueError, match="meta.json"):
            read_meta(tmp_path)
    with pytest.raises(FileNotFoundError, match="none: no such data folder; prepare_fineweb.py"):
        read_meta(tmp_path / "none")


# --- batches ---


def make_folder(folder, *lengths, split="train"):
    """Shards whose tokens tell where they stand: shard k holds 1000 k, 1000 k + 1, …"""
    for k, n in enumerate(lengths):
        write_shard(folder / f"my_val_0_{split}_{k:06d}.bin", 1000 * k + np.arange(n))
    return folder


def test_batches_are_permutations(tmp_path):
    make_folder(tmp_path, 101, 100, 3, 10, 41)  # with block_size 10: 10, 9, 0, 0 and 4 sequences
    expected = [list(range(s, s + 10))
                for s in [*range(0, 100, 10), *range(1000, 1090, 10), *range(4000, 4040, 10)]]
    batches = TokenBatches(tmp_path, "train", 10, 5000, seed=3)
    assert len(batches) == 23
    inputs, targets = batches.get([0])
    targets.fill_(-1)
    assert (inputs >= 0).all()  # the two share no memory, not even those of a single sequence
    inputs, targets = batches.get(range(23 * 3))
    assert (inputs.dtype == targets.dtype == torch.int64
            and inputs.shape == targets.shape == (69, 10))
    assert torch.equal(inputs + 1, targets) and inputs.is_contiguous() and targets.is_contiguous()
    epochs = inputs.view(3, 23, 10).tolist()
    for epoch in epochs:
        assert sorted(epoch) == expected != epoch
        shards = [row[0] // 1000 for row in epoch]
        assert sum(a != b for a, b in zip(shards, shards[1:])) == 2  # one shard after the other
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for firsts in (batches.get(range(23 * 20))[0][:, 0].view(20, 23).tolist(),  # epochs, then seeds
                   [TokenBatches(tmp_path, "train", 10, 5000, k).get(range(23))[0][:, 0].tolist()
                    for k in range(20)]):
        # the shards' order, too
        assert len({tuple(dict.fromkeys(token // 1000 for token in row)) for row in firsts}) > 1

    again = TokenBatches(tmp_path, "train", 10, 5000, seed=3)
    # no replay, whatever came before
    for positions in ([68], [0, 68, 1], torch.tensor([40, 41]), np.array([22, 23])):
        assert torch.equal(again.get(positions)[0], inputs[list(map(int, positions))])
    assert not torch.equal(TokenBatches(tmp_path, "train", 10, 5000, seed=4).get(range(69))[0],
                           inputs)
    # what a resumed run relies on, in any version of numpy
    assert inputs[:5, 0].tolist() == [1010, 1060, 1050, 1030, 1070]


def test_validation_keeps_its_order(tmp_path):
    make_folder(tmp_path, 50, 31, split="val")
    batches = TokenBatches(tmp_path, "val", 10, 5000, seed=3)
    assert batches.get(range(len(batches)))[0][:, 0].tolist() == [0, 10, 20, 30, 1000, 1010, 1020]
    # although _val_ and digits stand in every name
    with pytest.raises(FileNotFoundError, match="no train shard"):
        TokenBatches(tmp_path, "train", 10, 5000)


@pytest.mark.parametrize("lengths, split, error, words", [
    (None, "train", FileNotFoundError, "No such file or directory"),
    ((), "train", FileNotFoundError, "no train shard"),
    ((50,), "val", FileNotFoundError, "no val shard"),
    ((10, 5), "train", ValueError, "block_size \\+ 1 = 11")])
def test_missing_shards(tmp_path, lengths, split, error, words):
    folder = make_folder(tmp_path, *lengths) if lengths is not None else tmp_path / "none"
    with pytest.raises(error, match=words) as e:
        TokenBatches(folder, split, 10, 5000)
    assert str(folder) in str(e.value)


@pytest.mark.parametrize("train, val", [
    ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"),  # llm.c
    ("fineweb_train_000001.bin", "fineweb_val_000000.bin"), ("train.bin", "val.bin"),
    ("my_val_train_0.bin", "my_train_val.bin"), ("a-train-00001-of-00002.bin", "a.val.bin")])
def test_shards_of_other_programs(tmp_path, train, val):
    for name, token in {train: 1, val: 2, "interval_7.bin": 3, "train_0.txt": 4}.items():
        (tmp_path / name).write_bytes(shard_bytes([token] * 11))
    for split, token in {"train": 1, "val": 2}.items():
        batches = TokenBatches(tmp_path, split, 10, 50257)
        assert len(batches) == 1 and batches.get([0])[0].unique().tolist() == [token]


def test_numbered_shards_keep_their_order(tmp_path):
    for k, number in enumerate(("000002", "000010", "000100")):
        write_shard(tmp_path / f"a_val_{number}.bin", 1000 * k + np.arange(11))
    write_shard(tmp_path / "a_val.bin", 9000 + np.arange(11))
    firsts = TokenBatches(tmp_path, "val", 10, 10**4).get(range(4))[0][:, 0].tolist()
    assert firsts == [9000, 0, 1000, 2000]


def test_a_file_that_cannot_be_synced_leaves_what_was_there(tmp_path, monkeypatch):
    def fsync(fd):
        raise OSError(errno.EIO, "trouble")

    write_shard(tmp_path / "a.bin", [1])
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="a.bin could not be written: .*trouble"):
        write_shard(tmp_path / "a.bin", [2])
    assert os.listdir(tmp_path) == ["a.bin"] and read_shard(tmp_path / "a.bin").tolist() == [1]


def test_bad_tokens_and_truncated_shards(tmp_path):
    path = make_folder(tmp_path, 101) / "my_val_0_train_000000.bin"
    TokenBatches(tmp_path, "train", 10, 101).get(range(10))
    with pytest.raises(ValueError, match="vocab_size 100") as e:
        TokenBatches(tmp_path, "train", 10, 100).get(range(10))  # 100 is only a target
    assert str(path) in str(e.value)
    batches = TokenBatches(tmp_path, "train", 10, 101)
    os.truncate(path, 1100)
    with pytest.raises(ValueError, match="101 tokens"):
        batches.get([0])
    path.unlink()
    with pytest.raises(OSError, match="my_val_0_train_000000.bin"):
        batches.get([0])


MEMORY = """
import sys; from data import TokenBatches
import torch
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before = rss()
batches = TokenBatches(sys.argv[1], "train", 1024, 50257)
opened = rss()
for k in range(0, 20000, 50):
    batches.get(range(k, k + 50))
print(len(batches), opened - before, rss() - opened)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"),
                    reason="needs /proc to read its own memory")
def test_memory_of_1000_shards(tmp_path):
    for k in range(1000):  # 200 GB, all holes
        with open(tmp_path / f"a_train_{k:06d}.bin", "wb") as f:
            f.write(shard_bytes([], count=10**8))
            f.truncate(1024 + 2 * 10**8)
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=HERE, capture_output=True,
                          text=True, check=True)
    sequences, opening, using = map(int, done.stdout.split())
    assert sequences == 1000 * 97656
    assert opening < 20 and using < 60, (opening, using)  # MiB; a map that is kept would hold 200


# --- tokenizers ---


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "byte"])
def test_tokenizer(name):
    tokenizer = get_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == {"gpt2": ("gpt2", 50257, 50256),
                                                                   "byte": ("byte", 257, 256)}[name]
    # the last crashes plain tiktoken
    for text in ("", "Héllo\n\n wörld 🙂", "<|endoftext|>", " " * 10**6 + "x"):
        tokens = tokenizer.encode(text)
        assert (tokens.dtype == np.uint16 and tokenizer.eot not in tokens
                and tokenizer.decode(tokens) == text)
    hi = tokenizer.encode("hi")
    for padded in ([*hi, tokenizer.eot, 50257, 50303],
                   torch.tensor([*hi.tolist(), tokenizer.eot, 50303])):
        assert tokenizer.decode(padded) == "hi<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) in ("�", "é")
    assert tokenizer.decode(tokenizer.encode("a\ud83d")) == "a?"  # half a surrogate pair
    with pytest.raises(ValueError, match="gpt2, byte"):
        get_tokenizer("nope")


# --- text into shards ---

RANDOM = np.random.RandomState(0)
DOCUMENTS = ["".join(RANDOM.choice(list("abc é🙂"), RANDOM.randint(0, 300))) for _ in range(400)]
DOCUMENTS[3], DOCUMENTS[5], DOCUMENTS[7] = "", "two\nlines\r\n", "<|endoftext|>"
LINES = [" ".join(text.split()) for text in DOCUMENTS]


def zstd(content):
    import pyarrow
    return pyarrow.compress(content, "zstd", asbytes=True)


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def write_corpus(folder, documents=DOCUMENTS):
    rows = "".join(json.dumps({"id": i, "text": text}) + "\n"
                   for i, text in enumerate(documents)).encode()
    write_parquet(folder / "a[1].parquet", id=list(range(len(documents))), text=documents)
    (folder / "b.jsonl").write_bytes(rows)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(rows))
    (folder / "d.txt").write_text("\n".join(LINES), encoding="utf-8")
    (folder / "e.txt.gz").write_bytes(gzip.compress("\n".join(LINES).encode()))
    return ["a[1].parquet", "b.jsonl", "c.jsonl.gz", "d.txt", "e.txt.gz"]


def test_files_to_shards(tmp_path):
    files = write_corpus(tmp_path)
    command = ["--files", *files, "--lines", "--out", "data/mine", "--tokenizer", "byte",
               "--shard-tokens", "5_000"]
    status, out, err = run(*command, cwd=tmp_path)
    assert status == 0 and not err
    expected, folder = as_bytes(DOCUMENTS * 3 + LINES * 2), tmp_path / "data" / "mine"
    shards = tokens_in(folder)
    assert flat(folder) == expected
    assert list(shards) == ["mine_val_000000.bin"] + [
        f"mine_train_{i:06d}.bin" for i in range(len(shards) - 1)]
    assert ({len(tokens) for tokens in list(shards.values())[:-1]} == {5000}
            and 1 <= len(list(shards.values())[-1]) <= 5000)
    meta = read_meta(folder)
    assert BYTE_META.items() < meta.items() and "a[1].parquet" in meta["source"]
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(expected) - 5000, 5000)
    assert sorted(os.listdir(folder)) == sorted([*shards, "meta.json"])
    assert TokenBatches(folder, "train", 64, 257).get([0])[0].shape == (1, 64)

    before = contents(folder)
    status, out, err = run(*command, cwd=tmp_path)
    assert status == 0 and "complete" in out and not err
    refused(run(*command, "--tokens", 9e4, cwd=tmp_path), 2, "meta.json", "tokens")
    (refused(run(*command, "--tokenizer", "gpt2", cwd=tmp_path), 2, "meta.json", "tokenizer")
     if os.path.isdir(TIKTOKEN) else 0)
    (folder / "meta.json").rename(tmp_path / "meta.json")
    refused(run(*command, cwd=tmp_path), 2, "mine_train_000000.bin")  # shards of unknown origin
    (tmp_path / "meta.json").rename(folder / "meta.json")
    assert contents(folder) == before


@needs_gpt2
@needs_wikitext
def test_gpt2_and_tokens(tmp_path):
    import pyarrow.parquet
    import tiktoken
    gpt2 = tiktoken.get_encoding("gpt2")
    texts = pyarrow.parquet.read_table(WIKITEXT)["text"].to_pylist()
    expected = [token for text in texts for token in (50256, *gpt2.encode_ordinary(text))]
    status, _, err = run("--files", WIKITEXT, "--out", "x", "--tokens", "6e4",
                         "--shard-tokens", 2e4, cwd=tmp_path)
    assert status == 0 and not err and flat(tmp_path / "x") == expected[:60000]
    # no empty shard behind them
    assert [len(tokens) for tokens in tokens_in(tmp_path / "x").values()] == [20000] * 3
    meta = read_meta(tmp_path / "x")
    assert (meta["tokenizer"], meta["train_tokens"], meta["val_tokens"]) == ("gpt2", 40000, 20000)


def test_subset_and_small_text(tmp_path):
    """FineWeb's own layout, in a folder of its name, which load_dataset prefers to the hub."""
    folder = tmp_path / "HuggingFaceFW" / "fineweb"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n"
        "  data_files:\n  - split: train\n    path: sample/10BT/*\n"
        "dataset_info:\n  config_name: sample-10BT\n  features:\n"
        "  - name: text\n    dtype: string\n  - name: id\n    dtype: string\n"
        "  splits:\n  - name: train\n---\n")
    for i in range(2):
        write_parquet(folder / "sample" / "10BT" / f"{i:03d}_00000.parquet",
                      text=DOCUMENTS[i::2], id=["x"] * 200)
    documents = DOCUMENTS[::2] + DOCUMENTS[1::2]
    total = len(as_bytes(documents))
    # a text that just fills the first shard is a small one, too
    status, _, err = run("--tokenizer", "byte", "--shard-tokens", total, cwd=tmp_path,
                         HF_HUB_OFFLINE="1")
    assert status == 0 and not err
    val, train = tokens_in(tmp_path / "data" / "fineweb").values()
    assert val + train == as_bytes(documents) and train[0] == 256
    n = max(k for k in range(len(documents)) if len(as_bytes(documents[:k])) <= total / 10)
    assert val == as_bytes(documents[:n])


def test_small_text_keeps_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_text("long " * 50 + "\nb\n")
    assert run("--files", "a.txt", "--lines", "--tokenizer", "byte", "--out", "x",
               cwd=tmp_path)[0] == 0
    assert list(tokens_in(tmp_path / "x").values()) == [as_bytes(["long " * 50]), as_bytes(["b"])]


@pytest.mark.parametrize("name, pack", [
    ("book.txt", bytes), ("book.txt.gz", gzip.compress), ("BOOK.TXT.ZST", zstd)])
def test_a_text_file_is_one_document_cut_inside(tmp_path, name, pack):
    book = "\r\n".join(["", "Chapter é", "", *LINES * 40, "no newline at the end"]).encode()
    assert len(book) > 2 * 2**20  # more than a batch
    (tmp_path / name).write_bytes(pack(book))
    assert run("--files", name, "--tokenizer", "byte", "--out", "x", cwd=tmp_path)[0] == 0
    val, train = tokens_in(tmp_path / "x").values()
    assert val + train == [256, *book] and len(val) == len([256, *book]) // 10


@needs_gpt2
def test_a_text_file_has_the_tokens_of_the_whole(tmp_path):
    """It is read and encoded in pieces, which end at no place that a token crosses."""
    import tiktoken
    text = ("\n".join(LINES) + " word's\u3000x.\n\n\n    if x:\n\t\treturn\n") * 60
    assert len(text) > 3 * 2**20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert run("--files", "a.txt", "--out", "x", cwd=tmp_path)[0] == 0
    assert flat(tmp_path / "x") == [50256, *tiktoken.get_encoding("gpt2").encode_ordinary(text)]


@needs_gpt2
@pytest.mark.parametrize("unit", ["word and. ", "He's\n\n   here,  isn't\u3000he?\t", " \n 12 ",
                                  "\x1cb a\x1f ", "漢字。" * 9 + " "], ids=repr)
def test_a_long_document_has_the_tokens_of_the_whole(unit):
    import tiktoken
    gpt2, whole = get_tokenizer("gpt2"), tiktoken.get_encoding("gpt2").encode_ordinary
    for first in range(len(unit)):  # so that pieces end anywhere in the unit
        text = unit[first:] + unit * (150_000 // len(unit)) + "\n\n"
        assert gpt2.encode(text).tolist() == whole(text)


@needs_gpt2
def test_no_text_is_slow():
    """Beside words: blanks once took 350 times as long, and any long run does before tiktoken 0.13.
    20 times was the most seen here."""
    tokenizer = get_tokenizer("gpt2")

    def seconds(unit):
        text = (unit * (2**18 // len(unit) + 1))[:2**18]
        begin = time.process_time()
        assert len(tokenizer.encode(text)) > 1000
        return time.process_time() - begin

    words = max(seconds("word and. ") for _ in range(3))
    for unit in (" " * 99999 + "x", "\n" * 50000 + "x", "a", "=", "-=", "7", "\u6f22",
                 "\U0001f642"):
        assert seconds(unit) < 100 * words, unit[:9]


def test_interrupted_and_started_again(tmp_path):
    documents = DOCUMENTS * 30
    files = write_corpus(tmp_path, documents)[:4]
    command = ["--files", *files, "--lines", "--tokenizer", "byte", "--shard-tokens", "1e5"]
    uninterrupted = start(*command, "--out", "whole/x", cwd=tmp_path)
    folder, expected, shards = tmp_path / "x", as_bytes(documents * 3 + LINES), 0
    n = -(-len(expected) // 10**5)
    for sign, enough in ((signal.SIGKILL, 1), (signal.SIGINT, n // 3), (signal.SIGTERM, n // 2),
                         (signal.SIGKILL, n * 3 // 4)):
        process = start(*command, "--out", "x", cwd=tmp_path)
        while shards < enough and process.poll() is None:
            shards = len(list(folder.glob("*.bin")))
        process.send_signal(sign)
        if sign == signal.SIGKILL:
            assert process.wait() == -sign
            process.stdout.close(), process.stderr.close()
        else:
            refused(finish(process), 130, "the same command continues")
        shards = len(list(folder.glob("*.bin")))
        assert enough <= shards < n and not (folder / "meta.json").exists()  # in the middle
        done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    # whole files are skipped
    assert json.loads((folder / "progress.json").read_text())["position"][0] >= 2
    refused(run(*command, "--out", "x", "--shard-tokens", "2e5", cwd=tmp_path), 2,
            "progress.json", "shard_tokens")
    assert run(*command, "--out", "x", cwd=tmp_path)[0] == 0
    assert finish(uninterrupted)[0] == 0
    assert contents(folder) == contents(tmp_path / "whole" / "x") and flat(folder) == expected
    kept = [name for name, when in done.items() if (folder / name).stat().st_mtime_ns == when]
    assert len(kept) >= len(done) - 1  # what was complete is not written again
    assert run(*command, "--out", "x", cwd=tmp_path)[0] == 0
    (folder / "x_train_000001.bin").unlink()
    refused(run(*command, "--out", "x", cwd=tmp_path), 1, "x: lacks shards")


def test_files_of_the_hub_are_read_from_a_position(tmp_path, monkeypatch):
    """The position is ours: the one of datasets 5.0.0 was wrong, so it only lists the files."""
    import huggingface_hub

    class Hub:
        def open(self, path):
            return open(tmp_path / path.removeprefix("hf://datasets/x/"), "rb")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    monkeypatch.setattr(prepare_fineweb, "BATCH_CHARS", 5000)
    texts = [text if i % 7 else None for i, text in enumerate(DOCUMENTS)]
    write_parquet(tmp_path / "a.parquet", text=texts)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    files = [f"hf://datasets/x/{name}" for name in ("a.parquet", "b.jsonl", "a.parquet")]
    read = lambda position: list(prepare_fineweb.read_batches(files, "text", False, position))
    whole = read([0, 0])
    assert [text for _, batch, _ in whole for text in batch] == texts * 3 and len(whole) > 20
    for i, (position, _, _) in enumerate(whole):
        assert read(position) == whole[i:]


def kill_when(folder, shards, *command):
    process = start(*command, cwd=folder)
    while process.poll() is None and len(list(folder.glob("x/*.bin"))) < shards:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "x" / "meta.json").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt", "a.jsonl.zst"])
def test_resumed_text_is_checked(tmp_path, name):
    """Killed again and again; then the text is longer, shorter or another: one line, nothing
    damaged."""
    def write(documents):
        path = tmp_path / name
        if name == "a.parquet":
            write_parquet(path, text=documents)
        elif name == "a.txt":
            path.write_text("".join(filter(None, documents)), encoding="utf-8", newline="")
        else:
            pack = zstd if name.endswith(".zst") else bytes
            path.write_bytes(pack("\n".join(json.dumps({"text": t}) for t in documents).encode()))

    documents = [text if i % 7 else None for i, text in enumerate(DOCUMENTS * 40)]
    write(documents)
    kept = [text for text in documents if text is not None]
    expected = as_bytes(["".join(kept)] if name == "a.txt" else kept)
    command = ["--files", name, "--tokenizer", "byte", "--shard-tokens", 20011, "--out", "x"]
    total = -(-len(expected) // 20011)
    for shards in (total // 4, total * 5 // 8):  # in the first batch of text and in the second
        kill_when(tmp_path, shards, *command)
    before = contents(tmp_path / "x")
    for other in (documents + ["more"], documents[:40]):
        write(other)
        refused(run(*command, cwd=tmp_path), 2, "progress.json", "sizes")
    if not name.endswith(("parquet", "zst")):  # of the same size
        write([text and text.replace("e", "a") for text in documents])
        refused(run(*command, cwd=tmp_path), 1, "progress.json", "another text")
    write(documents)
    for more in (["--lines"], ["--column", "content"]):
        refused(run(*command, *more, cwd=tmp_path), 2, "progress.json", more[0][2:])
    assert contents(tmp_path / "x") == before
    status, out, err = run(*command, cwd=tmp_path)
    assert status == 0 and flat(tmp_path / "x") == expected
    if name != "a.txt":  # counted over all the starts
        assert f"skipped {len(documents) - len(kept)} rows whose `text` is null" in out
    for more in (["--lines"], ["--column", "content"]):
        refused(run(*command, *more, cwd=tmp_path), 2, "meta.json", more[0][2:])


def test_only_the_text_column_matters(tmp_path):
    rows = [{"text": f"2024-01-{i % 28 + 1:02d}", "lang": None, "n": 1} for i in range(300_000)]
    rows += [{"text": "x", "lang": "en", "n": "one"},
             {"text": "\ud83d", "lang": {}, "n": [1.5, "a"]},
             {"n": 2}, {"text": None}, {"text": "12:30", "n": {"deep": None}}]
    lines = "\n".join(map(json.dumps, rows)) + '\n\n{"n": ' + "9" * 4000 + ', "text": "last"}'
    assert len(lines) > 12 * 10**6
    (tmp_path / "a.jsonl").write_text(lines)
    status, out, _ = run("--files", "a.jsonl", "--tokenizer", "byte", "--out", "x", cwd=tmp_path)
    assert status == 0 and "skipped 2 rows whose `text` is null" in out
    texts = [row["text"] for row in rows if row.get("text")]
    texts[texts.index("\ud83d")] = "?"
    assert flat(tmp_path / "x") == as_bytes([*texts, "last"])


def test_column(tmp_path):
    import pyarrow
    texts = ["a", "b", None, "a"] * 3
    write_parquet(tmp_path / "a.parquet", id=[1] * 12,
                  content=pyarrow.array(texts).dictionary_encode(), text=list(range(12)))
    write_parquet(tmp_path / "b.parquet", content=pyarrow.array(texts, pyarrow.large_string()))
    write_parquet(tmp_path / "null.parquet", content=pyarrow.array([None], pyarrow.string()))
    (tmp_path / "c.jsonl").write_text('{"id": 1}\n' * 2 + '{"content": "c", "text": 3}\n')
    (tmp_path / "d.json").write_text('{"content": "d"}\n{"content": null}')
    files = ["a.parquet", "null.parquet", "b.parquet", "c.jsonl", "d.json"]
    command = ["--files", *files, "--tokenizer", "byte", "--out", "x"]
    status, out, _ = run(*command, "--column", "content", cwd=tmp_path)
    assert status == 0 and "skipped 10 rows whose `content` is null" in out
    assert flat(tmp_path / "x") == as_bytes(["a", "b", "a"] * 6 + ["c", "d"])
    refused(run(*command[:2], *command[6:], "--out", "y", "--column", "c", cwd=tmp_path), 1,
            "no text in column `c`", "--column")


def test_kinds_of_files(tmp_path):
    """Upper case, byte order marks, odd names, no rows, no text, members one after another."""
    row = lambda text: (json.dumps({"text": text}) + "\n").encode()
    files = {"A.JSONL": b"\xef\xbb\xbf" + row("a"), "b::c.txt": b"\xef\xbb\xbfb",
             "hf:::d.Txt": b"d",
             "e.ndjson.GZ": gzip.compress(row("e")) + gzip.compress(row("f")),
             "g.jsonl.zst": zstd(row("g")) + zstd(row("h")),
             "i.json": b"\xef\xbb\xbf \n" + row("i"),
             "j.jsonl.gz": gzip.compress(b""), "n.txt": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    import pyarrow
    write_parquet(tmp_path / "K.PARQUET", text=pyarrow.array([], pyarrow.string()))
    write_parquet(tmp_path / "l.parquet", other=pyarrow.array([], pyarrow.null()))
    write_parquet(tmp_path / "m.parquet", text=["m"])
    names = sorted([*files, "K.PARQUET", "l.parquet", "m.parquet"], key=str.lower)
    names.sort(key=lambda name: name.removeprefix("hf:::").lower())
    assert run("--files", *names, "--tokenizer", "byte", "--out", "x", cwd=tmp_path)[0] == 0
    assert flat(tmp_path / "x") == as_bytes([*"abdefghim", ""])


def test_help_says_what_a_document_is(tmp_path):
    status, out, _ = run("--help", cwd=tmp_path)
    assert status == 0 and "FILE IS ONE DOCUMENT" in " ".join(out.split())
    assert "--lines" in out and "--column" in out


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"good\n\xff\xfe\n", "not UTF-8"),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "not UTF-8"),
    ("a.json", b'[\n{"text": "x"}\n]', "line 1 is not a JSON object"),
    ("a.jsonl.gz", gzip.compress(GOOD * 9999)[:-20], "Truncated"),
    ("a.parquet", b"PAR1 noise PAR1", "arquet"),
    ("a.parquet", {"content": ["x"]}, "no text in column `text`"),
    ("a.parquet", {"text": [1, 2]}, "found 1"), ("a.txt", b"", "1 tokens are too few"),
    ("a.jsonl", b'{"text": null}\n', "no text in column `text`"),
    ("a.jsonl", b'{"content": "x"}\n' * 2**20 + GOOD, "no text in column `text`"),
    ("a.jsonl", GOOD + b"{", "line 2 is not a JSON object"),
    ("a.jsonl", GOOD + b"[" * 10**5, "recursion"), ("a.jsonl", b"3\n", "line 1 is not a JSON"),
    ("a.jsonl", GOOD + b'{"text": ["x"]}', "found ['x']"), ("a.txt.zst", b"noise", "a.txt.zst")])
def test_bad_files(tmp_path, name, content, words):
    (write_parquet(tmp_path / name, **content) if isinstance(content, dict)
     else (tmp_path / name).write_bytes(content))
    refused(run("--files", name, "--tokenizer", "byte", "--out", "x", cwd=tmp_path), 1, name, words)
    assert os.listdir(tmp_path / "x") == []


@pytest.mark.parametrize("status, args, words", [
    (2, ["--files", "none.txt"], ["none.txt", "no such file"]),
    (2, ["--files", "."], [".", "unknown kind"]),
    (2, ["--files", "a.csv"], ["a.csv", ".parquet, .json"]),
    (2, ["--shards", "1", "--tokenizer", "byte"], ["--tokenizer"]),
    (2, ["--files", "a.txt", "--out", "foreign"], ["b_train_000000.bin"]),
    (2, ["--shards", "1", "--out", "foreign"], ["b_train_000000.bin"]),
    (2, ["--files", "a.txt", "--out", "noise"], ["progress.json", "not valid JSON"]),
    (2, ["--files", "a.txt", "--out", "list"], ["progress.json", "not valid JSON"]),
    (2, ["--files", "a.txt", "--shard-tokens", "2147483648"], ["--shard-tokens", "2**31"]),
    (1, ["--files", "a.txt", "--out", "a.txt/x"], ["a.txt"])])
def test_bad_arguments(tmp_path, status, args, words):
    for name, content in {"a.txt": "x\ny\n", "foreign/b_train_000000.bin": "",
                          "noise/progress.json": "{", "list/progress.json": "[]"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    refused(run("--tokenizer", "byte", *args, cwd=tmp_path) if "--shards" not in args
            else run(*args, cwd=tmp_path), status, *words)
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob("*/meta.json"))


@pytest.mark.parametrize("args", [
    ["--tokens", "0"], ["--tokens", "x"], ["--tokens", "nan"], ["--tokens", "inf"],
    ["--tokens", "1.5"], ["--tokenizer", "x"], ["--subset", "a", "--shards", "1"]])
def test_argparse(tmp_path, args):
    status, _, err = run(*args, cwd=tmp_path)
    assert status == 2 and len(err) == 1 and args[0] in err[0]


# --- the standard library ---


def test_stdlib_by_two_processes_at_once(tmp_path):
    code = "import prepare_fineweb, sys; prepare_fineweb.prepare_stdlib(sys.argv[1])"
    for folder in ("a", "b"):
        racing = [subprocess.Popen([sys.executable, "-c", code, tmp_path / folder / "stdlib"],
                                   cwd=HERE) for _ in range(2)]
        assert [process.wait(120) for process in racing] == [0, 0]
        assert os.listdir(tmp_path / folder) == ["stdlib"]
    folder = tmp_path / "a" / "stdlib"
    assert contents(folder) == contents(tmp_path / "b" / "stdlib")
    assert list(contents(folder)) == ["meta.json", "stdlib_train_000000.bin",
                                      "stdlib_val_000000.bin"]
    documents, stdlib = {"train": set(), "val": set()}, sysconfig.get_path("stdlib")
    for parent, folders, files in os.walk(stdlib):
        folders[:] = [f for f in folders if f not in (
            "test", "tests", "site-packages", "dist-packages", "__pycache__")]
        for name in (os.path.relpath(os.path.join(parent, f), stdlib) for f in files
                     if f.endswith(".py")):
            with open(os.path.join(stdlib, name), "rb") as f:
                documents["val" if zlib.crc32(name.encode()) % 20 == 0 else "train"].add(f.read())
    meta = read_meta(folder)
    assert BYTE_META.items() < meta.items() and "standard library" in meta["source"]
    for split in documents:
        tokens = read_shard(folder / f"stdlib_{split}_000000.bin")
        assert tokens[0] == 256 and len(tokens) == meta[f"{split}_tokens"] > 10**5
        pieces = np.split(tokens, np.flatnonzero(tokens == 256)[1:])
        assert {piece[1:].astype(np.uint8).tobytes() for piece in pieces} == documents[split]
    assert 5 < meta["train_tokens"] / meta["val_tokens"] < 60


# --- ready shards from the hub ---


@pytest.fixture
def hub():
    """A hub that holds hub.files {path: bytes}; .drop and .stall name one whose first answer ends,
    or stops, midway."""
    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            content = hub.files.get(self.path)
            first = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
            self.send_response(404 if content is None else 206 if first else 200)
            self.send_header("Content-Length", len(content or b"") - first)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("ETag", f'"{zlib.crc32(content):08x}"')
                self.send_header("X-Repo-Commit", "0123456789" * 4)
            if first:
                self.send_header("Content-Range",
                                 f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            return (content or b"")[first:]

        def do_GET(self):
            content, trouble = self.do_HEAD(), {hub.drop: "drop", hub.stall: "stall"}.pop(
                self.path, None)
            self.wfile.write(content[: len(content) // 2] if trouble else content)
            if trouble:
                hub.drop, hub.stall = (hub.drop, None) if trouble == "stall" else (None, hub.stall)
                hub.stalled.set() if trouble == "stall" else None
                time.sleep(0 if trouble == "drop" else 15)
                self.close_connection = True

        def log_message(self, *args):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    hub.daemon_threads, hub.block_on_close = True, False
    hub.files, hub.requests, hub.drop, hub.stall, hub.stalled = (
        {}, [], None, None, threading.Event())
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def fetch(hub, folder, *args, run=run):
    return run("--shards", *args, "--out", "x", cwd=folder,
               HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(folder / "home"),
               NO_PROXY="127.0.0.1")


def test_shards_from_the_hub(tmp_path, hub):
    url, folder = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/", tmp_path / "x"
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin",
             "fineweb_train_000003.bin"]
    # the hub's library writes 10 MiB at a time, so only a larger file can be left half done
    hub.files = {url + name: shard_bytes(np.arange(n) % 50257)
                 for name, n in zip(names, (11, 12 * 2**20, 13, 14))}
    big = url + names[1]
    hub.stall = big
    process = fetch(hub, tmp_path, 2, run=start)
    assert hub.stalled.wait(60)
    while not any(path.stat().st_size >= 10 * 2**20 for path in folder.rglob("*.incomplete")):
        assert process.poll() is None
    process.kill()
    process.communicate()
    # a partial file is nowhere near the shards
    assert sorted(os.listdir(folder)) == [".cache", names[0]]

    hub.requests, hub.drop = [], big
    assert fetch(hub, tmp_path, 2)[0] == 0
    ranges = [given for command, path, given in hub.requests if command == "GET" and path == big]
    # the hub's library starts a file anew in a new process, but not after a drop
    assert ranges == [None, "bytes=10485760-"]
    assert not any(command == "GET" and names[0] in path for command, path, _ in hub.requests)
    assert ({name: (folder / name).read_bytes() for name in names[:3]}
            == {n: hub.files[url + n] for n in names[:3]})
    assert sorted(os.listdir(folder)) == sorted([*names[:3], "meta.json", ".cache"])
    assert read_meta(folder) == {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256,
                                 "train_tokens": 12 * 2**20 + 13, "val_tokens": 11,
                                 "source": "kjj0/fineweb10B-gpt2"}

    os.truncate(folder / names[2], 1030)
    refused(fetch(hub, tmp_path, 3), 1, names[2])  # not whole
    hub.requests = []  # the next start fetches it again and leaves the others alone
    assert (fetch(hub, tmp_path, 3)[0] == 0
            and (folder / names[2]).read_bytes() == hub.files[url + names[2]])
    assert ({path for command, path, _ in hub.requests if command == "GET" and url in path}
            == {url + names[2], url + names[3]})
    refused(fetch(hub, tmp_path, 2), 2, names[3])
    refused(fetch(hub, tmp_path, 104), 2, "kjj0/fineweb10B-gpt2")


def test_bad_and_missing_shards_from_the_hub(tmp_path, hub):
    url, name = "/datasets/kjj0/fineweb100B-gpt2/resolve/main/", "fineweb_val_000000.bin"
    port, hub.server_port = hub.server_port, 9  # where nobody listens; it takes a while to give up
    (tmp_path / "down").mkdir()
    unreachable = fetch(hub, tmp_path / "down", 1, run=start)
    hub.server_port, hub.files = port, {url + name: shard_bytes([1, 2], magic=1)}
    for _ in range(2):  # the bad one is not kept
        refused(fetch(hub, tmp_path, 104), 1, name, "magic")
        assert not list(tmp_path.glob("x/**/*.bin")) and not (tmp_path / "x" / "meta.json").exists()
    hub.files = {url + name: shard_bytes([1, 2])}
    refused(fetch(hub, tmp_path, 104), 1, "fineweb_train_000001.bin", "404")
    assert read_shard(tmp_path / "x" / name).tolist() == [1, 2]
    refused(finish(unreachable), 1, name)
