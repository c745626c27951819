"""The corpora of the studies, made from packages that every mirror of Debian has: the kernel's C
files, Webster's dictionary, and the sources of Go.

    mkdir -p data && cd data && apt-get download linux-source-6.1 dict-gcide golang-1.19-src
    for package in *.deb; do dpkg-deb -x $package .; done; cd ..
    python experiments/corpora.py data/usr/src/linux-source-6.1.tar.xz data/linux.jsonl
    python experiments/corpora.py data/usr/share/dictd/gcide.dict.dz data/english.jsonl
    python experiments/corpora.py data/usr/share/go-1.19/src data/go.jsonl
    python prepare_fineweb.py --files data/linux.jsonl --tokenizer byte --out data/linux

Any linux-6.1.*.tar.xz of kernel.org does as well. A document is a source file, or an entry of the
Collaborative International Dictionary of English (Webster's of 1913, grown since; 40 MB). They
are sorted by a hash, which mixes them.
"""
import gzip
import hashlib
import json
import lzma
import re
import sys
import tarfile
import zlib
from pathlib import Path

DIRECTORIES = ("block", "crypto", "fs", "init", "ipc", "kernel", "lib", "mm", "net",
               "security")  # no drivers: they repeat


def kernel(path: str) -> list[tuple[str, str]]:
    """(its path in the tree, text) of each file."""
    files = []
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]  # without linux-6.1/
            if member.isfile() and name.endswith(".c") and name.split("/")[0] in DIRECTORIES:
                files.append((name, tar.extractfile(member).read().decode("latin-1")))
    return files


def dictionary(path: str) -> list[tuple[str, str]]:
    """(text, text) of each entry: it is sorted by its own text's hash."""
    with gzip.open(path, "rt", encoding="latin-1") as text:
        parts = re.split(r"\n\n(?=\S)", text.read())  # a headword begins at the margin
    entries = [part.strip() for part in parts]
    return [(entry, entry) for entry in entries]


def go(folder: str) -> list[tuple[str, str]]:
    files = [file for file in Path(folder).rglob("*.go") if file.is_file()]
    return [(str(file.relative_to(folder)), file.read_text(encoding="latin-1")) for file in files]


if len(sys.argv) != 3:
    sys.exit(f"usage: {sys.argv[0]} linux.tar.xz|gcide.dict.dz|go/src out.jsonl")
source = Path(sys.argv[1])
try:
    read = go if source.is_dir() else dictionary if source.suffix == ".dz" else kernel
    documents = read(sys.argv[1])
except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as e:
    sys.exit(" ".join(f"{sys.argv[0]}: {sys.argv[1]}: {e}".split()))
documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
try:
    with open(sys.argv[2], "w") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for _, text in documents)
except OSError as e:
    sys.exit(f"{sys.argv[0]}: {e}")
print(f"{len(documents)} documents, {sum(len(text) for _, text in documents) / 1e6:.1f} MB")
