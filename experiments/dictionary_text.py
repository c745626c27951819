"""The Collaborative International Dictionary of English (Webster's of 1913, grown since) as a second corpus: 40 MB of
English, on every mirror of Debian.

    (mkdir -p data && cd data && apt-get download dict-gcide && dpkg-deb -x dict-gcide_*.deb .)
    python experiments/dictionary_text.py data/usr/share/dictd/gcide.dict.dz data/english.jsonl
    python prepare_fineweb.py --files data/english.jsonl --tokenizer byte --out data/english

One document an entry, in an order that mixes the alphabet.
"""
import gzip
import hashlib
import json
import re
import sys

if len(sys.argv) != 3:
    sys.exit(f"usage: {sys.argv[0]} gcide.dict.dz out.jsonl")
with gzip.open(sys.argv[1], "rt", encoding="latin-1") as text:
    entries = [entry.strip() for entry in re.split(r"\n\n(?=\S)", text.read())]  # a headword begins at the margin
with open(sys.argv[2], "w") as out:
    for entry in sorted(entries, key=lambda entry: hashlib.sha256(entry.encode()).digest()):
        out.write(json.dumps({"text": entry}) + "\n")
print(f"{len(entries)} entries, {sum(len(entry) for entry in entries) / 1e6:.1f} MB")
