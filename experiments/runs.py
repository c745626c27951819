"""What runs say: their logs, their rows, statistics over independent seeds, and tables."""
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from baselines import OPTIMIZERS
from config import Config
from data import write_atomically
from model import GPT, GPTConfig

DEFAULT = asdict(Config())
SETTING = ("data_dir", "vocab_size", "n_layer", "n_head", "n_embd", "block_size",
           "total_batch_tokens", "dtype")
# what a run's name adds to its method: the horizon, the draw, the rate and the seed
SUFFIXES = re.compile(r"^tune_|(_[\d.]+x)?(_c\d+)?(_lr[^_]+)?(_seed\d+)?$")


class Unreadable(Exception):
    """A file is not what it should be: exit status 1."""


class Refused(Exception):
    """The user asks for something impossible: exit status 2."""


# ---- runs, and rows of a table

def read_results(file: Path) -> dict[str, dict]:
    """Ended runs by name, from the one file of a study: name, config, evals, train, machine."""
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        return {run["name"]: run for run in map(json.loads, lines)}
    except (ValueError, TypeError, KeyError) as e:
        raise Unreadable(f"{file} does not hold a study's results: {type(e).__name__}: {e}")


def write_results(file: Path, results: dict[str, dict]) -> None:
    text = "".join(json.dumps(run) + "\n" for run in results.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: opened.write(text.encode()))


def read_log(folder: Path) -> list[dict]:
    try:
        text = (folder / "log.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


@dataclass
class Run:
    name: str
    row: str  # the label of its row
    config: dict
    evals: list[dict]
    train: list[dict]

    @property
    def planned(self) -> int:  # tokens
        step = self.config["total_batch_tokens"]
        return self.config["max_tokens"] // step * step

    @property
    def ended(self) -> int:  # tokens
        return self.evals[-1]["tokens"] if self.evals else 0

    @property
    def scheduled(self) -> bool:
        return self.config["schedule"] != "constant"

    def loss(self, tokens: int) -> float | None:
        """After this many tokens; a run with a schedule is finished only at its end."""
        if self.scheduled and self.planned != tokens:
            return None
        return next((e["val_loss"] for e in self.evals if e["tokens"] == tokens), None)

    def reach(self, target: float) -> dict | None:
        """Where the loss gets down to the target, linearly between evaluations."""
        previous = None
        for e in self.evals:
            if e["val_loss"] <= target:
                if previous is None:
                    return e
                part = (previous["val_loss"] - target) / (previous["val_loss"] - e["val_loss"])
                return {key: previous[key] + part * (e[key] - previous[key])
                        for key in ("step", "tokens", "train_time_s")}
            previous = e


def make_run(path: Path, name: str, row: str, config: dict, log: list[dict]) -> Run:
    try:
        config = {**DEFAULT, **config}
        label = OPTIMIZERS[config["optimizer"]].label
        if not all({"step", "tokens"} <= line.keys() for line in log):
            raise ValueError("its log has a line without step and tokens")
    except (ValueError, AttributeError, TypeError, KeyError) as e:
        raise Unreadable(f"{path} is not a run: {type(e).__name__}: {e}")
    return Run(name, row or f"{label}, {re.sub(r'_seed[0-9]+$', '', name)}", config,
               [e for e in log if "val_loss" in e], [e for e in log if "loss" in e])


def read_run(folder: Path) -> Run:
    try:
        config, log = json.loads((folder / "config.json").read_text()), read_log(folder)
    except (OSError, ValueError) as e:
        raise Unreadable(f"{folder} is not a run's folder: {e}")
    return make_run(folder, folder.name, "", config, log)


def read_result_runs(file: Path) -> list[Run]:
    try:
        return [make_run(file, name, SUFFIXES.sub("", name), run["config"],
                         run["evals"] + run["train"]) for name, run in read_results(file).items()]
    except (ValueError, AttributeError, TypeError, KeyError) as e:
        raise Unreadable(f"{file} does not hold a study's results: {type(e).__name__}: {e}")


def read_runs(paths: list[Path]) -> list[Run]:
    runs = []
    for path in paths:
        if path.suffix == ".jsonl" and path.name != "log.jsonl":
            runs += read_result_runs(path)
        else:
            runs += [read_run(log.parent) for log in sorted(path.glob("**/log.jsonl"))]
    if not runs:
        where = " ".join(map(str, paths))
        raise Refused(f"no runs in {where}: a run's folder holds config.json and log.jsonl")
    return runs


@dataclass
class Row:
    label: str
    config: dict
    runs: dict[int, dict[int, Run]] = field(default_factory=dict)  # by horizon and seed
    tuning: list[Run] = field(default_factory=list)

    @property
    def scheduled(self) -> bool:
        return self.config["schedule"] != "constant"

    def losses(self, h: int) -> list[float]:
        return [run.loss(h) for _, run in sorted(self.runs.get(h, {}).items())]

    def curve(self) -> dict[int, list[float]]:
        """Losses of all seeds, by tokens: of the longest runs, or at the ends of scheduled runs."""
        if self.scheduled:
            return {h: self.losses(h) for h in sorted(self.runs)}
        longest, points = self.runs[max(self.runs)].values(), defaultdict(list)
        for run in longest:
            for e in run.evals:
                points[e["tokens"]].append(e["val_loss"])
        return {tokens: losses for tokens, losses in points.items() if len(losses) == len(longest)}


class Comparison:
    """Runs of the same model on the same data, and what their study declares."""

    def __init__(self, runs: list[Run], study: dict):
        self.runs, self.study, self.notes = runs, study, defaultdict(list)
        self.panels = {"": self}  # of the figure of differences
        self.parameters = count_parameters(runs[0].config)
        reported = self.reported = [run for run in runs if not run.name.startswith("tune_")]
        lengths = ({run.planned for run in reported if run.scheduled and run.planned} or
                   {run.planned or run.ended for run in reported if run.evals})
        lengths |= {times * study["tokens"] for times in study.get("horizons", ())}
        self.horizons = sorted(h for h in lengths
                               if any(run.loss(h) is not None for run in reported))
        self.rows = {}
        for run in runs:
            row = self.rows.setdefault(run.row, Row(run.row, run.config))
            if run.name.startswith("tune_"):
                row.tuning.append(run)
            else:
                row.config = run.config
                for h in self.horizons:
                    if run.loss(h) is not None:
                        kept = row.runs.setdefault(h, {}).setdefault(run.config["seed"], run)
                        if kept is not run:  # of another rate, or in another folder of that name
                            raise Refused(f"{kept.name} and {run.name} are both {run.row}, seed "
                                          f"{run.config['seed']}: rename one or leave it out")
        self.rows = {label: row for label, row in self.rows.items() if row.runs}
        self.take_notes(reported)

    def show(self, tokens: int) -> str:
        number = f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"
        times = tokens / (20 * self.parameters) if self.parameters else 0
        close = times and abs(times / max(1, round(times)) - 1) < 0.01
        return f"{number} ({round(times)}x)" if close else number

    def take_notes(self, reported: list[Run]) -> None:
        for row in self.rows.values():
            if any(len(seeds) == 1 for seeds in row.runs.values()):
                self.notes["one seed, so no interval"].append(row.label)
            if not row.tuning:
                self.notes["not tuned here"].append(row.label)
        if len({(run.config["eval_tokens"], run.config["eval_offset"]) for run in reported}) > 1:
            self.notes["evaluated on different text: these losses do not compare"] = []
        for run in reported:
            if run.planned and run.ended != run.planned:
                self.notes["ended early"].append(f"{run.name} after {self.show(run.ended)}")
            elif run.row not in self.rows:
                self.notes["in no table: not evaluated at these lengths"].append(run.name)

    def losses(self, label: str, h: int) -> list[float]:
        return self.rows[label].losses(h) if label in self.rows else []

    def reference(self, optimizer: str) -> Row | None:
        """What others are compared with: the scheduled row with most runs, the best of those."""
        rows = [row for row in self.rows.values()
                if row.config["optimizer"] == optimizer and row.scheduled]
        return max(rows, default=None, key=lambda row: (
            sum(map(len, row.runs.values())), -mean(row.losses(max(row.runs)))))


def best(rows: list[Row], h: int) -> Row:
    """The row of the lowest mean loss at h, of those with most seeds there."""
    return min(rows, key=lambda row: (-len(row.losses(h)), mean(row.losses(h) or [math.inf])))


def count_parameters(config: dict) -> int | None:
    if not config["vocab_size"]:
        return None
    keys = "vocab_size", "block_size", "n_layer", "n_head", "n_embd"
    with torch.device("meta"):
        model = GPT(GPTConfig(*(config[key] for key in keys)))
    return sum(p.numel() for p in model.parameters())


# ---- statistics

def welch(a: list[float], b: list[float]) -> tuple[float, float, float, float]:
    """The difference of the means, the ends of its 95% interval, and p: of independent samples with
    their own variances. The last three are nan with a single value on a side."""
    from scipy.stats import ttest_ind  # here, since sweep.py does without it
    if min(len(a), len(b)) < 2:
        return mean(a) - mean(b), np.nan, np.nan, np.nan
    test = ttest_ind(a, b, equal_var=False)
    return mean(a) - mean(b), *map(float, test.confidence_interval(0.95)), float(test.pvalue)


def holm(ps: list[float]) -> list[float]:
    adjusted, largest = [1.0] * len(ps), 0.0
    for i, k in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = adjusted[k] = max(largest, min(1.0, (len(ps) - i) * ps[k]))
    return adjusted


def first_crossing(tokens: list[int], values: list[float]) -> float | None:
    """Where the values first get down to 0, linearly in the logarithm of the tokens."""
    for i, value in enumerate(values):
        if value <= 0:
            if i == 0:
                return float(tokens[0])
            part = values[i - 1] / (values[i - 1] - value)
            return tokens[i - 1] * (tokens[i] / tokens[i - 1]) ** part
    return None


def fraction(row: Row, other: Row, h: int) -> list[str]:
    """Tokens at which a row reaches the other's loss at h, as a fraction of h, and its interval:
    the token counts at which the 95% interval of the difference contains 0."""
    curve = row.curve()
    found = [welch(losses, other.losses(h)) for losses in curve.values()]
    cells = []
    for part in (0, 1, 2):  # the difference, the lower and the upper end of its interval
        values = [values[part] for values in found]
        if np.isnan(values).any():
            continue
        at = first_crossing(list(curve), values)
        if at is None:
            cells.append(f"> {max(curve) / h:.2f}")
        else:
            cells.append("< " * (at == min(curve)) + f"{at / h:.2f}")
    return cells[:1] if cells[0][0] in "<>" else cells


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"
