"""Tables and figures from run folders, and nothing else.

    python experiments/compare.py runs/*                                   your own runs: a table, and figures/
    python experiments/compare.py runs/* --target=3.28                     steps, tokens and seconds to a loss
    python experiments/compare.py --follow runs/mine runs/other            their curves while they run, runs/mine/curve.svg
    python experiments/compare.py experiments/results/small --readme README.md             rewrites its tables there
    python experiments/compare.py experiments/results/small --readme README.md --check     exits 1 if they differ

Runs that differ only in rate, seed and length are one method. A method's rate is the one with the lowest mean loss over
its runs named tune_* (experiments/sweep.py), which are then left out of every mean; without such runs it is the best one,
and a note says so. Notes under a table name every claim that its data does not carry.
"""
import argparse
import contextlib
import json
import math
import re
import signal
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch

try:
    from scipy.stats import ttest_rel

    import figures
except ImportError as e:
    sys.exit(f"compare.py: {e}: pip install -r requirements-dev.txt")
from config import MAY_CHANGE, SCHEDULE_FREE, Config
from data import write_atomically
from model import GPT, GPTConfig
from sweep import read_log

NAMES = {"sf_normuon": "SF-NorMuon", "sf_adamw": "SF-AdamW", "adamw": "AdamW", "normuon": "NorMuon", "muon": "Muon",
         "amuse": "AMUSE", "schedulefree_plus": "ScheduleFree+"}
DEFAULT = asdict(Config())
SETTING = ("data_dir", "vocab_size", "n_layer", "n_head", "n_embd", "block_size", "total_batch_tokens", "dtype")
NOT_THE_METHOD = {*SETTING, *MAY_CHANGE, "lr", "seed", "eval_tokens", "device"}


# ---- runs, and rows of a table

@dataclass
class Run:
    name: str
    config: dict
    evals: list[dict]
    train: list[dict]

    @property
    def tuning(self) -> bool:
        return self.name.startswith("tune_")

    @property
    def planned(self) -> int:  # tokens
        return self.config["max_tokens"] // self.config["total_batch_tokens"] * self.config["total_batch_tokens"]

    @property
    def ended(self) -> int:  # tokens
        return self.evals[-1]["tokens"] if self.evals else 0

    @property
    def scheduled(self) -> bool:
        return self.config["schedule"] != "constant"

    def method(self) -> tuple:
        return tuple((k, v) for k, v in sorted(self.config.items()) if k not in NOT_THE_METHOD)

    def at(self, tokens: int) -> dict | None:
        """The evaluation after so many tokens; what has a schedule is finished only at its end."""
        if self.scheduled and self.planned != tokens:
            return None
        return next((e for e in self.evals if e["tokens"] == tokens), None)

    def reach(self, target: float) -> dict | None:
        """Where the loss gets down to the target, linearly between evaluations."""
        previous = None
        for e in self.evals:
            if e["val_loss"] <= target:
                if previous is None:
                    return e
                part = (previous["val_loss"] - target) / (previous["val_loss"] - e["val_loss"])
                return {k: previous[k] + part * (e[k] - previous[k]) for k in ("step", "tokens", "train_time_s")}
            previous = e


@dataclass
class Row:
    """A method at its rate, or at another one that was asked for."""
    label: str
    main: bool  # at its chosen rate
    members: list[Run]  # all runs of the method
    runs: dict[int, dict[int, Run]] = field(default_factory=dict)  # by horizon and seed

    def __post_init__(self):
        self.config, self.scheduled = self.members[0].config, self.members[0].scheduled
        self.optimizer = NAMES[self.config["optimizer"]]

    @property
    def longest(self) -> list[Run]:
        return list(self.runs[max(self.runs)].values())

    def losses(self, h: int) -> dict[int, float]:
        return {seed: run.at(h)["val_loss"] for seed, run in sorted(self.runs.get(h, {}).items())}

    def mean(self, h: int) -> float:
        return mean(self.losses(h).values()) if self.runs.get(h) else math.inf

    def reach(self, target: float) -> list[dict | None]:
        """For each seed, where the first of its runs gets down to the target."""
        found = defaultdict(list)
        for by_seed in self.runs.values():
            for seed, run in by_seed.items():
                found[seed].append(run.reach(target))
        return [min(filter(None, reached), key=lambda e: e["tokens"], default=None) for reached in found.values()]


def read_runs(paths: list[str]) -> list[Run]:
    folders = [log.parent for path in paths for log in sorted(Path(path).glob("**/log.jsonl"))]
    if not folders:
        refuse(f"no runs in {' '.join(paths)}: a run's folder holds config.json and log.jsonl")
    return [read_run(folder) for folder in dict.fromkeys(folders)]


def read_run(folder: Path) -> Run:
    try:
        config = {**DEFAULT, **json.loads((folder / "config.json").read_text())}
        lines = read_log(folder)
        if not all({"step", "tokens"} <= line.keys() for line in lines):
            raise ValueError("log.jsonl has a line without step and tokens")
    except (OSError, ValueError, AttributeError, TypeError) as e:
        sys.exit(f"compare.py: {folder} is not a run's folder: {e}")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return Run(folder.name, config, [e for e in lines if "val_loss" in e], [e for e in lines if "loss" in e])


def refuse(message: str) -> None:
    print(f"compare.py: {message}", file=sys.stderr)
    sys.exit(2)


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Each named by its optimizer, and by the knobs, if they are few, in which it differs from the default and its like."""
    methods, alike, named = defaultdict(list), defaultdict(list), {}
    for run in runs:
        methods[run.method()].append(run)
    for method in map(dict, methods):
        alike[method["optimizer"], method["schedule"]].append(method)
    for method, members in methods.items():
        knobs = dict(method)
        like = alike[knobs["optimizer"], knobs["schedule"]]
        schedule = "" if knobs["optimizer"] in SCHEDULE_FREE else f" {knobs['schedule']}"
        differing = [k for k in knobs if any(other[k] != knobs[k] for other in like) and
                     (knobs[k] != DEFAULT[k] or all(other[k] != DEFAULT[k] for other in like))]
        details = "".join(f", {k} {show_value(knobs[k])}" for k in differing)
        if len(differing) > 2:  # too many for a table: the name that the study has for it
            details = f" ({re.sub(r'^tune_|(_[0-9]+x)?_lr[0-9.e-]+_seed[0-9]+$', '', members[0].name)})"
        named[NAMES[knobs["optimizer"]] + schedule + details] = members
    return named


def show_value(value) -> str:
    return ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


# ---- what is compared

class Comparison:
    """Of runs of the same model on the same data."""

    def __init__(self, runs: list[Run]):
        self.runs, self.notes, self.parameters = runs, defaultdict(list), count_parameters(runs[0].config)
        # the planned lengths of what has a schedule, else of all
        self.horizons = sorted({run.planned for run in runs if run.scheduled and run.planned} or
                               {run.planned or run.ended for run in runs if run.evals})
        self.methods = by_method(runs)
        self.rows = [row for label, members in self.methods.items() for row in self.make_rows(label, members)]
        self.check_claims()

    def show(self, tokens: int) -> str:
        number = f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"
        times = tokens / (20 * self.parameters) if self.parameters else 0
        return f"{number} ({round(times)}x)" if times and abs(times / max(1, round(times)) - 1) < 0.01 else number

    def make_rows(self, label: str, members: list[Run]) -> list[Row]:
        tuning, reported = [r for r in members if r.tuning], [r for r in members if not r.tuning]
        main, others = Row(label, True, members), {}
        reached = [h for h in self.horizons if any(run.at(h) for run in members)]
        # a rate is chosen for each horizon of what has a schedule, for all at once of the others
        for together in [[h] for h in reached] if main.scheduled else [reached]:
            rate = self.choose_rate(f"{label} at {self.show(together[0])}" if main.scheduled else label,
                                    self.by_rate(tuning or reported, together), bool(tuning))
            for run in reported:
                other = run.config["lr"]
                if other == rate:
                    row = main
                elif tuning:
                    row = others.setdefault(other, Row(f"{label}, lr {other:g}", False, members))
                else:
                    continue
                for h in filter(run.at, together):
                    row.runs.setdefault(h, {})[run.config["seed"]] = run
        return [row for row in (main, *others.values()) if row.runs]

    @staticmethod
    def by_rate(runs: list[Run], horizons: list[int]) -> dict[float, float]:
        """Mean over seeds and horizons of the loss, for every rate, inf for one that diverged."""
        losses = defaultdict(list)
        for run in runs:
            for h in horizons:
                if not run.scheduled or run.planned == h:
                    losses[run.config["lr"]].append(run.at(h)["val_loss"] if run.at(h) else math.inf)
        return {rate: mean(ls) for rate, ls in sorted(losses.items())}

    def choose_rate(self, title: str, losses: dict[float, float], tuning: bool) -> float | None:
        rate = min(losses, key=losses.get, default=None)
        if len(losses) < 2:
            self.notes["the rate is not tuned"].append(title)
        elif rate in (min(losses), max(losses)):
            self.notes["the best rate is at the edge of those tried"].append(f"{title}, {rate:g}")
        if len(losses) > 1 and not tuning:
            self.notes["the rate was chosen on the seeds that are reported"].append(title)
        return rate

    def check_claims(self) -> None:
        for row in self.rows:
            few = [h for h in self.horizons if len(row.runs.get(h, {})) == 1]
            if few:
                where = "" if few == sorted(row.runs) else f" at {', '.join(map(self.show, few))}"
                self.notes["one seed, so no claim"].append(row.label + where)
        if len({run.config["eval_tokens"] for run in self.runs}) > 1:
            self.notes["the runs were evaluated on different numbers of tokens: their losses do not compare"] = []
        for run in self.runs:
            if run.planned and run.ended != run.planned:
                self.notes["ended early"].append(f"{run.name} after {self.show(run.ended)} of {self.show(run.planned)}")

    def reference(self, optimizer: str) -> Row | None:
        """What others are compared with: its row with the most runs, the best one of those."""
        candidates = [row for row in self.rows if row.config["optimizer"] == optimizer and row.scheduled and row.main]
        return max(candidates, default=None, key=lambda row: (sum(map(len, row.runs.values())), -row.mean(max(row.runs))))


def count_parameters(config: dict) -> int | None:
    if not config["vocab_size"]:
        return None
    with torch.device("meta"):
        model = GPT(GPTConfig(*(config[k] for k in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"))))
    return sum(p.numel() for p in model.parameters())


# ---- tables

def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def loss_cell(row: Row, h: int) -> str:
    losses = list(row.losses(h).values())
    if not losses:
        return ""
    return f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else "") + f" ({len(losses)})"


def rate_cell(row: Row) -> str:
    return " / ".join(dict.fromkeys(f"{run.config['lr']:g}" for h in sorted(row.runs) for run in row.runs[h].values()))


def difference_cell(row: Row, other: Row, h: int) -> str:
    a, b = row.losses(h), other.losses(h)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return ""
    differences = [a[s] - b[s] for s in seeds]
    cell = f"{mean(differences):+.4f}"
    if len(seeds) > 1:
        p = ttest_rel([a[s] for s in seeds], [b[s] for s in seeds]).pvalue
        cell += f" (p {p:.1g})" if p < 0.1 else f" (p {p:.2f})"
    return cell


def fraction_cell(row: Row, other: Row, h: int) -> str:
    """Tokens to the other's loss at this horizon, as a fraction of the other's tokens; of what has no run of this length,
    of the runs it has."""
    if h not in other.runs:
        return ""
    reached, longest = row.reach(other.mean(h)), max(row.runs) / h
    if None in reached:
        return f"> {longest:.2f}" if longest >= 1 else ""
    return f"{mean(e['tokens'] for e in reached) / h:.2f}"


def target_cells(row: Row, target: float) -> list[str]:
    seeds = row.reach(target)
    reached = list(filter(None, seeds))
    cells = [f"{mean(e[k] for e in reached):.0f}" if reached else "" for k in ("step", "tokens", "train_time_s")]
    return [cells[0] or "not reached", *cells[1:], f"{len(reached)} of {len(seeds)}"]


def tables(c: Comparison, target: float | None) -> str:
    rows = sorted(c.rows, key=lambda row: (max(row.runs) != max(c.horizons), row.mean(max(row.runs))))
    header = ["optimizer", *map(c.show, c.horizons)]
    found = []

    def table(title, cell, rows):  # a column for each horizon
        found.append(f"{title}:\n\n" + markdown(header, [[r.label, *(cell(r, h) for h in c.horizons)] for r in rows]))

    found.append("Validation loss, mean ± standard deviation (number of seeds), lowest first:\n\n" + markdown(
        [*header, "lr"], [[row.label, *(loss_cell(row, h) for h in c.horizons), rate_cell(row)] for row in rows]))
    adamw, normuon = c.reference("adamw"), c.reference("normuon")
    for other in filter(None, (adamw, normuon)) if len(rows) > 1 else ():
        table(f"Difference to {other.label} of the same length (p of the paired test over seeds)",
              lambda row, h: difference_cell(row, other, h), [row for row in rows if row is not other])
    if adamw and len(rows) > 1:
        table(f"Tokens to the loss of {adamw.label}, as a fraction of its tokens",
              lambda row, h: fraction_cell(row, adamw, h), [row for row in rows if row is not adamw])
    table("Seconds of training (the fastest run at any rate; without evaluation, checkpoints and start-up)",
          lambda row, h: f"{min(r.at(h)['train_time_s'] for r in row.members if r.at(h)):.0f}" if h in row.runs else "",
          [row for row in rows if row.main])
    if target is not None:
        found.append(f"To a validation loss of {target:g}:\n\n" + markdown(
            ["optimizer", "steps", "tokens", "seconds", "seeds"], [[row.label, *target_cells(row, target)] for row in rows]))
    return "\n".join(found)


# ---- the report

def report(paths: list[str], target: float | None, out: Path | None) -> str:
    settings = defaultdict(list)
    for run in read_runs(paths):
        settings[tuple(run.config[k] for k in SETTING)].append(run)
    parts = []
    for i, runs in enumerate(settings.values()):
        c, knobs = Comparison(runs), runs[0].config
        part = (f"{c.parameters:,} parameters, " if c.parameters else "") + (
            f"{knobs['n_layer']} layers of width {knobs['n_embd']}, {knobs['total_batch_tokens']:,} tokens a step, "
            f"data {knobs['data_dir']}.\n\n")
        if not c.rows:
            parts.append(part + "No run has got to a planned length yet.\n")
            continue
        part += tables(c, target)
        if c.notes:
            part += "\nNotes:\n\n"
            for note, subjects in c.notes.items():
                part += f"- {note}{': ' * bool(subjects)}{'; '.join(dict.fromkeys(subjects))}\n"
        parts.append(part)
        if out:
            figures.draw(c, out if len(settings) == 1 else out / str(i))
    return "\n".join(parts)


def rewrite(readme: Path, study: str, text: str, check: bool) -> None:
    content = readme.read_text(encoding="utf-8")
    pattern = rf"(<!-- results: {re.escape(study)} -->\n).*?(<!-- /results -->)"
    if not re.search(pattern, content, re.S):
        return print(f"{readme} has no <!-- results: {study} --> … <!-- /results -->")
    new = re.sub(pattern, lambda m: m[1] + text + m[2], content, flags=re.S)
    if check and new != content:
        sys.exit(f"compare.py: the tables of {study} in {readme} are not what its runs say: run it without --check")
    if new != content:
        write_atomically(readme, lambda file: file.write(new.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="folders of runs, or folders that hold some")
    parser.add_argument("--follow", action="store_true", help="draw the curves of running jobs until they end")
    parser.add_argument("--target", type=float, help="a loss: steps, tokens and seconds until it is reached")
    parser.add_argument("--out", type=Path, help="folder of the figures; default: the study's, else figures")
    parser.add_argument("--readme", type=Path, help="file in which the tables stand between markers")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if --readme differs")
    parser.error = refuse
    args = parser.parse_args()
    if args.follow:
        if args.target is not None or args.out or args.readme or args.check:
            refuse("--follow draws <first run>/curve.svg and takes no other flag")
        for path in args.paths:
            if not (Path(path) / "log.jsonl").exists():
                refuse(f"{path} has no log.jsonl: --follow wants the folders of runs")
        with contextlib.suppress(KeyboardInterrupt):
            return figures.follow(list(map(Path, args.paths)), read_run)
    study = Path(args.paths[0]) if len(args.paths) == 1 and (Path(args.paths[0]) / "runs").is_dir() else None
    if args.check and not (args.readme and study):
        refuse("--check wants --readme and one study, experiments/results/<study>")
    out = None if args.check else args.out or (study or Path(".")) / "figures"
    text = report(args.paths, args.target, out)
    if args.readme and study:
        rewrite(args.readme, study.resolve().name, text, args.check)
    if not args.check:
        print(f"{text}\nfigures: {out}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any command
    try:
        main()
    except OSError as e:
        sys.exit(f"compare.py: {e}")
