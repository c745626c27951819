"""Continual learning: what was trained to its end on one corpus goes on with another. One seed.

    python experiments/continual.py     105M tokens; after an interruption the same command goes on

The kernel's C files to 16x, then 4x of Webster's dictionary, with the recommended configuration and
the AdamW that settled.py chose at 4x. The anytime run just goes on (--change_data) and is read at
1x, 2x and 4x, or its average starts over (`restart`: --init_from). AdamW has to know its length:
for each of the three a run of its own starts from the weights of the one that ended, warmed up
again, with a cosine or with WSD. `fresh` starts from random weights. Written:
results/continual.jsonl (as of a study; an evaluation also has old_loss, on the kernel's text) and
results/continual.svg.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import matplotlib.pyplot as plt

from figures import panels, palette
from plan import read_study
from runs import Unreadable, read_log, read_results, write_results
from sweep import machine

OLD, NEW = "data/linux", "data/english"
BEFORE, AFTER = 16, (1, 2, 4)  # times 20 tokens for each parameter
LABELS = {"anytime": "SF-NorMuon, recommended, goes on",
          "restart": "the same, its average starts over",
          "cosine": "AdamW, cosine, warmed up again", "wsd": "AdamW, WSD, warmed up again",
          "fresh": "SF-NorMuon, from random weights"}
FILE = ROOT / "experiments/results/continual.jsonl"
settled = read_study(str(ROOT / "experiments/studies/settled.py"))


def train_py(out: Path, **knobs) -> str:
    command = [sys.executable, "train.py"]
    for key, value in {"out_dir": out, **knobs}.items():
        if isinstance(value, Path):  # the results name no path of this machine
            value = os.path.relpath(value, ROOT)
        command.append(f"--{key}={value}")
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"continual.py: {out}: {done.stderr.strip()}")
    return done.stdout


def chosen(study: str, prefix: str) -> dict:
    """The knobs of the first run of that name."""
    file = settled.file.with_stem(study)
    for name, run in read_results(file).items():
        if name.startswith(prefix):
            own = ("out_dir", "data_dir", "max_tokens", "seed", "init_from", "resume",
                   "change_data", "eval_only")  # of each run here
            return {k: v for k, v in run["config"].items() if k not in own}
    sys.exit(f"continual.py: {file.name} has no run {prefix}* yet: sweep.py makes it")


def keep(results: dict, name: str, out: Path, tokens: int, knobs: dict, data: str) -> None:
    """The losses on both corpora of a run that has ended on `data`, as a line of the results."""
    last = read_log(out)[-1]
    knobs = {**knobs, "schedule": "constant"}  # the others are refused without max_tokens
    other = train_py(out, **knobs, eval_only=True, data_dir=OLD if data == NEW else NEW)
    losses = [last["val_loss"], float(re.search(r"validation loss +([\d.]+)", other)[1])]
    new, old = losses if data == NEW else losses[::-1]
    results[name] = dict(
        name=name, config=json.loads((out / "config.json").read_text()), train=[],
        evals=[dict(step=last["step"], tokens=tokens, val_loss=new, old_loss=old)],
        machine=machine())
    write_results(FILE, results)
    print(f"{name}: {new:.4f} on the new text, {old:.4f} on the old", flush=True)


def run_all(results: dict) -> None:
    anytime, adamw = chosen("hindsight", "recommended_"), chosen("settled", "adamw_4x_")
    methods = {"anytime": anytime, "restart": anytime, "fresh": anytime,
               "cosine": {**adamw, "schedule": "cosine"}, "wsd": {**adamw, "schedule": "wsd"}}
    before, runs = BEFORE * settled.tokens, settled.runs.with_name("continual")
    for method, knobs in methods.items():
        for h in AFTER if method in ("restart", "fresh") else (0, *AFTER):
            name, tokens, data = f"{method}_{h}x", h * settled.tokens, NEW
            if name in results:
                continue
            out, first = runs / name, runs / f"{method}_0x"
            if h == 0:
                data = OLD
                train_py(out, **knobs, data_dir=data, max_tokens=before)
            elif method == "anytime":  # one run, in a copy of the folder
                out = runs / "anytime"
                if not out.exists():
                    copy = out.with_suffix(".tmp")  # else half a copy would start anew
                    shutil.copytree(first, copy, dirs_exist_ok=True)
                    copy.rename(out)
                train_py(out, **knobs, data_dir=data, change_data=True, max_tokens=before + tokens)
            elif method in ("restart", "fresh"):
                out, start = runs / method, runs / "anytime_0x/ckpt.pt"
                train_py(out, **knobs, data_dir=data, max_tokens=tokens,
                         init_from=start if method == "restart" else "")
            else:
                train_py(out, **knobs, data_dir=data, max_tokens=tokens,
                         init_from=first / "ckpt.pt")
            keep(results, name, out, tokens, knobs, data)


def draw(results: dict) -> None:
    figure, axes = panels(2)
    for axis, key, title in zip(axes, ("val_loss", "old_loss"),
                                ("on the new text (dictionary)", "on the old text (C)")):
        for method, color in zip(LABELS, palette(len(LABELS))):
            points = [run["evals"][0] for name, run in results.items()
                      if name.startswith(method + "_")]
            if method == "restart":
                points.insert(0, results["anytime_0x"]["evals"][0])
            axis.plot([e["tokens"] / 1e6 for e in points], [e[key] for e in points],
                      "o--" if method in ("cosine", "wsd") else "o-", color=color,
                      label=LABELS[method])
        axis.set(title=title, xlabel="tokens of the new text (millions)",
                 ylabel="validation loss (nats)")
    after = [run["evals"][0]["val_loss"] for name, run in results.items() if "_0x" not in name]
    axes[0].set_ylim(min(after) - 0.02, max(after) + 0.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(FILE.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        results = read_results(FILE)
        run_all(results)
        draw(results)
    except (OSError, Unreadable) as e:
        sys.exit(f"continual.py: {e}")
