"""Tables and figures from the logs of runs, and nothing else.

    python experiments/compare.py runs/*                     your own runs: tables, and figures/
    python experiments/compare.py runs/* --target=3.28       steps, tokens and seconds to a loss
    python experiments/compare.py --follow runs/mine         a running job: runs/mine/curve.svg
    python experiments/compare.py experiments/results/settled.jsonl --readme README.md
    python experiments/compare.py experiments/results/settled.jsonl --readme README.md --check

A row is what the study calls it: the name of the run without tune_, horizon, rate and seed. Your
own runs are named by their optimizer and folder. Runs named tune_* are in no mean. --readme
rewrites the text between <!-- results: name --> (all tables), <!-- results: name headline --> (the
rows that the study's `headline` names) or <!-- results: name claims --> and <!-- /results -->.
--check exits 1 if that text differs.
"""
import argparse
import contextlib
import re
import runpy
import signal
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np

NEEDS = "pip install -r requirements-dev.txt"
try:
    import figures
    import rates
except ImportError as e:
    sys.exit(f"compare.py: {e}: {NEEDS}")
from data import write_atomically
from runs import (SETTING, Comparison, Refused, Row, Unreadable, best, fraction, holm, markdown,
                  read_result_runs, read_runs, welch)


# ---- cells

def loss_cell(row: Row, h: int) -> str:
    losses = row.losses(h)
    error = f" ± {stdev(losses) / len(losses)**0.5:.4f}" if len(losses) > 1 else ""
    return f"{mean(losses):.4f}{error} ({len(losses)})" if losses else ""


def difference_cell(row: Row, other: Row, h: int) -> str:
    if h not in row.runs or h not in other.runs:
        return ""
    difference, low, high, _ = welch(row.losses(h), other.losses(h))
    return f"{difference:+.4f}" + ("" if np.isnan(low) else f" [{low:+.4f}, {high:+.4f}]")


def fraction_cell(row: Row, other: Row, h: int) -> str:
    if h not in other.runs or max(row.runs) < h:
        return ""
    at, *interval = fraction(row, other, h)
    return at + (f" [{', '.join(interval)}]" if interval else "")


def target_cells(row: Row, target: float) -> list[str]:
    by_seed = defaultdict(list)
    for runs in row.runs.values():
        for seed, run in runs.items():
            by_seed[seed].append(run.reach(target))
    seeds = f" of {len(by_seed)}"
    there = [min(filter(None, found), key=lambda e: e["tokens"])
             for found in by_seed.values() if any(found)]
    if not there:
        return ["not reached", "", "", "0" + seeds]
    means = [mean(e[key] for e in there) for key in ("step", "tokens", "train_time_s")]
    return [*(f"{value:,.0f}" for value in means), f"{len(there)}{seeds}"]


# ---- tables

def claims(c: Comparison) -> str:
    """The declared claims, p by Holm over all of them; none with fewer than 3 seeds on a side."""
    margin, found, words = c.study["margin"], [], c.study.get("headline", {})
    for label, rival, times in c.study["claims"]:
        h = times * c.study["tokens"]
        a, b = ([*c.losses(name, h)] for name in (label, rival))
        values = welch(a, b) if a and b else None
        title = f"{words.get(label, label)} minus {words.get(rival, rival)}, {times}x"
        lost = sum(run.ended < h <= run.planned for run in c.reported
                   if run.row in (label, rival) and (not run.scheduled or run.planned == h))
        title += f" ({lost} diverged)" * (lost > 0)
        found.append((title, values, min(len(a), len(b)) > 2))
    ps = holm([values[3] if values and enough else 1.0 for _, values, enough in found])
    lines = []
    for (title, values, enough), p in zip(found, ps):
        if not enough:
            lines.append([title, f"{values[0]:+.4f}" if values else "", "", "fewer than 3 seeds"])
            continue
        difference, low, high, _ = values
        verdict = "equal" if -margin < low and high < margin else (
            "undecided" if p >= 0.05 else "lower" if difference < 0 else "higher")
        lines.append([title, f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]", f"{p:.2g}", verdict])
    return (f"Declared claims: difference with its 95% interval (Welch), p by Holm; equal: the "
            f"interval lies within ± {margin:g}:\n\n"
            + markdown(["", "difference", "p", "verdict"], lines))


def tables(c: Comparison, target: float | None) -> str:
    rows = sorted(c.rows.values(), key=lambda row: (
        max(row.runs) != max(c.horizons), mean(row.losses(max(row.runs)))))
    header, found = ["", *map(c.show, c.horizons)], []

    def table(title, cell, rows):  # a column for each horizon
        lines = [[row.label, *(cell(row, h) for h in c.horizons)] for row in rows]
        found.append(f"{title}:\n\n" + markdown(header, lines))

    table("Validation loss, mean ± standard error (number of seeds)", loss_cell, rows)
    adamw = c.reference("adamw")
    for other in filter(None, (adamw, c.reference("normuon"))):
        others = [row for row in rows if row is not other]
        if others:
            table(f"Minus {other.label} of the same length, with the 95% interval (Welch)",
                  lambda row, h: difference_cell(row, other, h), others)
        if others and other is adamw:
            table(f"Tokens to the loss of {adamw.label}, as a fraction of its tokens",
                  lambda row, h: fraction_cell(row, adamw, h), others)
    if c.study.get("claims"):
        found.append(claims(c))
    if target is not None:
        lines = [[row.label, *target_cells(row, target)] for row in rows]
        found.append(f"To a validation loss of {target:g}:\n\n" + markdown(
            ["", "steps", "tokens", "seconds", "seeds"], lines))
    if c.notes:
        found.append("Notes:\n\n" + "".join(map(note_line, c.notes.items())))
    return "\n".join(found)


def note_line(note: tuple[str, list[str]]) -> str:
    what, subjects = note
    shown = list(dict.fromkeys(subjects))
    more = f" and {len(shown) - 4} more" * (len(shown) > 4)
    return f"- {what}{': ' * bool(shown)}{', '.join(shown[:4])}{more}\n"


def headline(c: Comparison) -> str:
    """The rows that the study puts on the front page, and what the first of them gains over the
    best AdamW and the best NorMuon of each length."""
    words = c.study["headline"]
    rows = {label: c.rows[label] for label in words if label in c.rows}
    lines = [[words[label], *(loss_cell(row, h) for h in c.horizons)]
             for label, row in rows.items()]
    found = [*rows.values()]
    for optimizer, title, cell in (
            ("adamw", "fraction of AdamW's tokens that {} needs to reach its loss", fraction_cell),
            ("normuon", "{} minus NorMuon", difference_cell)):
        rivals = [row for row in found[1:] if row.config["optimizer"] == optimizer]
        if rivals:
            lines.append([title.format(words[found[0].label]),
                          *(cell(found[0], best(rivals, h), h) for h in c.horizons)])
    return markdown(["validation loss ± standard error (seeds)", *map(c.show, c.horizons)], lines)


# ---- the report

def declared(path: Path) -> dict:
    """What the study of a results file declares: tokens, claims, headline, panels, center, ..."""
    file = ROOT / "experiments/studies" / f"{path.stem}.py"
    if not file.exists():
        return {}
    try:
        return runpy.run_path(str(file))
    except Exception as e:
        raise Refused(f"{file} is not a study: {type(e).__name__}: {e}")


def results(name: str) -> Path:
    return ROOT / "experiments/results" / f"{name}.jsonl"


def with_others(study: dict, runs: list) -> list:
    """The headline may name rows of another study in the same setting, as study.row."""
    wanted = [name for name in study.get("headline", {}) if "." in name]
    for other in dict.fromkeys(name.partition(".")[0] for name in wanted):  # in a fixed order
        for run in read_result_runs(results(other)):  # [] without one
            run.row = f"{other}.{run.row}"
            if run.row in wanted:
                runs.append(run)
    return runs


def compare(paths: list[Path], study: dict) -> list[Comparison]:
    """One comparison for each setting."""
    settings = defaultdict(list)
    for run in with_others(study, read_runs(paths)):
        settings[tuple(run.config[key] for key in SETTING)].append(run)
    return [Comparison(runs, study) for runs in settings.values()]


def draw(found: list[Comparison], out: str) -> None:
    for i, c in enumerate(found):
        names = c.study.get("panels", {}).items()
        c.panels = {title: compare([results(name)], declared(results(name)))[0]
                    for title, name in names if results(name).exists()} or c.panels
        if c.rows:
            figures.draw(c, out if len(found) == 1 else f"{out}{i}_")


def report(found: list[Comparison], target: float | None) -> str:
    parts = []
    for c in found:
        knobs = c.runs[0].config
        size = f"{c.parameters:,} parameters, " if c.parameters else ""
        part = (f"{size}{knobs['n_layer']} layers of width {knobs['n_embd']}, contexts of "
                f"{knobs['block_size']}, {knobs['total_batch_tokens']:,} tokens a step, data "
                f"{knobs['data_dir']}.\n\n")
        missing = "No run has got to a planned length yet.\n"
        parts.append(part + (tables(c, target) if c.rows else missing))
    return "\n".join(parts)


def rewrite(page: Path, texts: dict[str, str], check: bool) -> None:
    """texts: by what stands in the marker."""
    old = new = page.read_text(encoding="utf-8")
    for title, text in texts.items():
        pattern = rf"(<!-- results: {re.escape(title)} -->\n).*?(<!-- /results -->)"
        new = re.sub(pattern, lambda m: m[1] + text + m[2], new, flags=re.S)
    if not any(f"<!-- results: {title} -->" in old for title in texts):
        missing = f"{page} has no <!-- results: {next(iter(texts))} --> … <!-- /results -->"
        sys.exit(f"compare.py: {missing}") if check else print(missing)
    if check and new != old:
        sys.exit(f"compare.py: {page}: its tables of {next(iter(texts))} are not what the runs "
                 "say: run this without --check")
    if new != old:
        write_atomically(page, lambda file: file.write(new.encode()))


def follow(args) -> None:
    if args.target is not None or args.readme or args.check:
        raise Refused("--follow draws <first run>/curve.svg and takes no other flag")
    for path in args.paths:
        if not (path / "log.jsonl").exists():
            raise Refused(f"{path} has no log.jsonl: --follow needs folders of runs")
    with contextlib.suppress(KeyboardInterrupt):
        figures.follow(args.paths)


def fail(message: str, status: int = 2) -> None:
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="results of a study, or folders that hold runs")
    add("--follow", action="store_true", help="draw the curves of running jobs until they end")
    add("--target", type=float, help="a loss: steps, tokens and seconds until it is reached")
    add("--readme", type=Path, help="page in which the tables stand between markers")
    add("--check", action="store_true", help="write nothing, exit 1 if --readme differs")
    parser.error = fail
    args = parser.parse_args()
    if args.follow:
        return follow(args)
    file = args.paths[0] if len(args.paths) == 1 and args.paths[0].suffix == ".jsonl" else None
    if args.check and not args.readme:
        raise Refused("--check needs --readme")
    if args.readme and not file:
        raise Refused("--readme needs one study, experiments/results/<study>.jsonl")
    out = f"{file.with_suffix('')}_" if file else "figures/"
    study = declared(file) if file else {}
    if "center" in study:
        runs = read_runs(args.paths)
        text, texts = rates.table(runs, study), {}
        if not args.check:
            rates.draw(runs, study, out)
    else:
        found = compare(args.paths, study)
        text, texts = report(found, args.target), {}
        if not args.check:
            draw(found, out)
        if study.get("headline"):
            texts[f"{file.stem} headline"] = headline(found[0])
        if study.get("claims"):
            texts[f"{file.stem} claims"] = claims(found[0])
    if args.readme:
        rewrite(args.readme, {file.stem: text, **texts}, args.check)
    if not args.check:
        print(f"{text}\nfigures: {out}*.svg")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows. `| head` ends it as it ends any command
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main()
    except Refused as e:
        fail(str(e))
    except (OSError, Unreadable) as e:
        fail(str(e), 1)
    except ImportError as e:  # scipy, in runs.py
        fail(f"{e}: {NEEDS}", 1)
