"""The Linux kernel's own C files as a corpus: real text, enough of it, and on every mirror.

    (mkdir -p data && cd data && apt-get download linux-source-6.1 && dpkg-deb -x linux-source-6.1_*.deb .)
    python experiments/linux_text.py data/usr/src/linux-source-6.1.tar.xz data/linux.jsonl
    python prepare_fineweb.py --files data/linux.jsonl --tokenizer byte --out data/linux

Any linux-6.1.*.tar.xz of kernel.org does as well. One document a file, in an order that mixes the directories.
"""
import hashlib
import json
import sys
import tarfile

DIRECTORIES = ("block", "crypto", "fs", "init", "ipc", "kernel", "lib", "mm", "net", "security")  # no drivers: they repeat

if len(sys.argv) != 3:
    sys.exit(f"usage: {sys.argv[0]} linux.tar.xz out.jsonl")
documents = []
with tarfile.open(sys.argv[1]) as tar:
    for member in tar:
        path = member.name.split("/", 1)[-1]  # without linux-6.1/
        if member.isfile() and path.endswith(".c") and path.split("/")[0] in DIRECTORIES:
            documents.append((hashlib.sha256(path.encode()).digest(), tar.extractfile(member).read().decode("latin-1")))
with open(sys.argv[2], "w") as out:
    for _, text in sorted(documents):
        out.write(json.dumps({"text": text}) + "\n")
print(f"{len(documents)} files, {sum(len(text) for _, text in documents) / 1e6:.1f} MB")
