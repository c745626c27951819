"""Tables and figures from run folders, and nothing else.

    python experiments/compare.py runs/*                                   your own runs: a table, and figures/
    python experiments/compare.py runs/* --target=3.28                     steps, tokens and seconds to a loss
    python experiments/compare.py experiments/results/small --readme README.md             rewrites its tables there
    python experiments/compare.py experiments/results/small --readme README.md --check     exits 1 if they differ

Runs that differ only in rate, seed and length are one method. A method's rate is the one with the lowest mean loss over
its runs named tune_* (experiments/sweep.py), which are then left out of every mean; without such runs it is the best one,
and a note says so. Notes under a table name every claim that its data does not carry.
"""
import argparse
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch
from scipy.stats import ttest_rel

from data import write_atomically
from model import GPT, GPTConfig
from sweep import read_log
from config import FREE, SCHEDULE_FREE, Config

NAMES = {"sf_normuon": "SF-NorMuon", "sf_adamw": "SF-AdamW", "adamw": "AdamW", "normuon": "NorMuon", "muon": "Muon",
         "amuse": "AMUSE", "schedulefree_plus": "ScheduleFree+"}
SETTING = ("data_dir", "vocab_size", "n_layer", "n_head", "n_embd", "block_size", "total_batch_tokens", "dtype")
NOT_THE_METHOD = {*SETTING, *FREE, "lr", "seed", "eval_tokens", "device"}


@dataclass
class Run:
    name: str
    config: dict
    evals: list[dict]

    @property
    def tuning(self) -> bool:
        return self.name.startswith("tune_")

    @property
    def planned(self) -> int:  # tokens
        return self.config["max_tokens"] // self.config["total_batch_tokens"] * self.config["total_batch_tokens"]

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

    def tokens_to(self, target: float) -> dict | None:
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
    rates: dict[int, float] = field(default_factory=dict)  # by horizon
    runs: dict[int, dict[int, Run]] = field(default_factory=dict)  # by horizon and seed

    @property
    def scheduled(self) -> bool:
        return self.members[0].scheduled

    @property
    def optimizer(self) -> str:
        return self.members[0].config["optimizer"]

    def losses(self, h: int) -> dict[int, float]:
        return {seed: run.at(h)["val_loss"] for seed, run in sorted(self.runs.get(h, {}).items())}

    def mean(self, h: int) -> float:
        return mean(self.losses(h).values()) if self.runs.get(h) else math.inf


# ---- reading

def read_runs(paths: list[str]) -> list[Run]:
    folders = [log.parent for path in paths for log in sorted(Path(path).glob("**/log.jsonl"))]
    runs = []
    for folder in dict.fromkeys(folders):
        try:
            config = {**asdict(Config()), **json.loads((folder / "config.json").read_text())}
            lines = read_log(folder)
        except (OSError, ValueError) as e:
            raise SystemExit(f"compare.py: {folder} is not a run's folder: {e}")
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        runs.append(Run(folder.name, config, [line for line in lines if "val_loss" in line]))
    if not runs:
        raise SystemExit(f"compare.py: no runs in {' '.join(paths)}: a run's folder holds config.json and log.jsonl")
    return runs


def labels(methods: list[tuple]) -> dict[tuple, str]:
    """A name for each method: its optimizer, and the knobs in which it differs from the default and from its like."""
    names, default = {}, asdict(Config())
    alike = defaultdict(list)
    for method in methods:
        alike[dict(method)["optimizer"], dict(method)["schedule"]].append(dict(method))
    for method in methods:
        knobs = dict(method)
        like = alike[knobs["optimizer"], knobs["schedule"]]
        schedule = "" if knobs["optimizer"] in SCHEDULE_FREE else f" {knobs['schedule']}"
        differing = [k for k in knobs if any(other[k] != knobs[k] for other in like) and
                     (knobs[k] != default[k] or all(other[k] != default[k] for other in like))]
        names[method] = NAMES[knobs["optimizer"]] + schedule + "".join(f", {k} {show(knobs[k])}" for k in differing)
    return names


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    methods = defaultdict(list)
    for run in runs:
        methods[run.method()].append(run)
    return {label: methods[method] for method, label in labels(list(methods)).items()}


def show(value) -> str:
    return ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def horizons_of(runs: list[Run]) -> list[int]:
    """Where methods are compared: the planned lengths of what has a schedule, else of all."""
    return sorted({run.planned for run in runs if run.scheduled and run.planned} or
                  {run.planned or run.evals[-1]["tokens"] for run in runs if run.evals})


def by_rate(runs: list[Run], horizons: list[int]) -> dict[float, float]:
    """Mean over seeds and horizons of the loss, for every rate, inf for one that diverged."""
    losses = defaultdict(list)
    for run in runs:
        for h in horizons:
            if not run.scheduled or run.planned == h:
                losses[run.config["lr"]].append(run.at(h)["val_loss"] if run.at(h) else math.inf)
    return {rate: mean(ls) for rate, ls in sorted(losses.items())}


def tuned_over(runs: list[Run], horizons: list[int]) -> list[list[int]]:
    """For which horizons together a rate is chosen: one by one for what has a schedule, all at once for the others."""
    reached = [h for h in horizons if any(run.at(h) for run in runs)]
    return [[h] for h in reached] if runs[0].scheduled else [reached]


def make_rows(runs: list[Run], horizons: list[int], notes: list[str]) -> list[Row]:
    rows = []
    for label, members in by_method(runs).items():
        tuning, reported = [r for r in members if r.tuning], [r for r in members if not r.tuning]
        main = Row(label, True, members)
        others = {}
        for together in tuned_over(members, horizons):
            at = f"{label} at {show_tokens(together[0])}" if main.scheduled else label
            losses = by_rate(tuning or reported, together)
            rate = min(losses, key=losses.get) if losses else None
            if len(losses) < 2:
                notes.append(f"{at}: the rate is not tuned")
            elif rate in (min(losses), max(losses)):
                notes.append(f"{at}: the best rate, {rate:g}, is at the edge of those tried")
            if len(losses) > 1 and not tuning:
                notes.append(f"{at}: the rate was chosen on the seeds that are reported")
            for run in reported:
                row = main
                if run.config["lr"] != rate:
                    if not tuning:
                        continue
                    row = others.setdefault(run.config["lr"], Row(f"{label}, lr {run.config['lr']:g}", False, members))
                for h in together:
                    if run.at(h):
                        row.rates[h] = run.config["lr"]
                        row.runs.setdefault(h, {})[run.config["seed"]] = run
        rows += [row for row in (main, *others.values()) if row.runs]
    return rows


# ---- tables

PARAMETERS = {}  # tokens of 1x, for show_tokens


def show_tokens(tokens: int) -> str:
    number = f"{tokens / 1e9:.3g}B" if tokens >= 1e9 else f"{tokens / 1e6:.3g}M"
    times = tokens / PARAMETERS["1x"] if PARAMETERS.get("1x") else 0
    return f"{number} ({round(times)}x)" if times and abs(times / max(1, round(times)) - 1) < 0.01 else number


def count_parameters(config: dict) -> int | None:
    if not config["vocab_size"]:
        return None
    with torch.device("meta"):
        model = GPT(GPTConfig(*(config[k] for k in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"))))
    return sum(p.numel() for p in model.parameters())


def reference(rows: list[Row], optimizer: str) -> Row | None:
    """What others are compared with: its row with the most runs, the best one of those."""
    candidates = [row for row in rows if row.optimizer == optimizer and row.scheduled and row.main]
    return max(candidates, default=None, key=lambda row: (sum(map(len, row.runs.values())), -row.mean(max(row.runs))))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def loss_cell(row: Row, h: int) -> str:
    losses = list(row.losses(h).values())
    if not losses:
        return ""
    return f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else "") + f" ({len(losses)})"


def difference_cell(row: Row, other: Row, h: int) -> str:
    a, b = row.losses(h), other.losses(h)
    seeds = sorted(a.keys() & b.keys())
    if not seeds or row is other:
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
    target = other.mean(h)
    runs = {seed: [r for by_seed in row.runs.values() for s, r in by_seed.items() if s == seed]
            for by_seed in row.runs.values() for seed in by_seed}
    reached = [min((t["tokens"] for r in rs if (t := r.tokens_to(target))), default=math.inf) / h for rs in runs.values()]
    longest = max(row.runs) / h
    if any(map(math.isinf, reached)):
        return f"> {longest:.2f}" if longest >= 1 else ""
    return f"{mean(reached):.2f}"


def tables(rows: list[Row], horizons: list[int], target: float | None) -> str:
    rows = sorted(rows, key=lambda row: (max(row.runs) != max(horizons), row.mean(max(row.runs))))
    header = [show_tokens(h) for h in horizons]
    text = "Validation loss, mean ± standard deviation (number of seeds), lowest first:\n\n"
    rate = [" / ".join(dict.fromkeys(f"{row.rates[h]:g}" for h in horizons if h in row.rates)) for row in rows]
    text += markdown(["optimizer", *header, "lr"],
                     [[row.label, *(loss_cell(row, h) for h in horizons), r] for row, r in zip(rows, rate)])
    for optimizer in ("adamw", "normuon"):
        other = reference(rows, optimizer)
        if other and len(rows) > 1:
            text += f"\nDifference to {other.label} of the same length (p of the paired test over seeds):\n\n"
            text += markdown(["optimizer", *header], [
                [row.label, *(difference_cell(row, other, h) for h in horizons)] for row in rows if row is not other])
    other = reference(rows, "adamw")
    if other and len(rows) > 1:
        text += f"\nTokens to the loss of {other.label}, as a fraction of its tokens:\n\n"
        text += markdown(["optimizer", *header], [
            [row.label, *(fraction_cell(row, other, h) if h in other.runs else "" for h in horizons)]
            for row in rows if row is not other])
    text += "\nSeconds of training (the fastest run at any rate; without evaluation, checkpoints and start-up):\n\n"
    text += markdown(["optimizer", *header], [
        [row.label, *(f"{min(r.at(h)['train_time_s'] for r in row.members if r.at(h)):.0f}" if h in row.runs else ""
                      for h in horizons)] for row in rows if row.main])
    if target is not None:
        text += f"\nTo a validation loss of {target:g}:\n\n"
        lines = []
        for row in rows:
            best = {}
            for by_seed in row.runs.values():
                for seed, run in by_seed.items():
                    if (t := run.tokens_to(target)) and t["tokens"] < best.get(seed, {"tokens": math.inf})["tokens"]:
                        best[seed] = t
            cells = [f"{mean(t[k] for t in best.values()):.0f}" for k in ("step", "tokens", "train_time_s")] if best else \
                ["not reached", "", ""]
            seeds = {seed for by_seed in row.runs.values() for seed in by_seed}
            lines.append([row.label, *cells, f"{len(best)} of {len(seeds)}"])
        text += markdown(["optimizer", "steps", "tokens", "seconds", "seeds"], lines)
    return text


def check_claims(runs: list[Run], rows: list[Row], horizons: list[int], notes: list[str]) -> None:
    for row in rows:
        few = [h for h in horizons if len(row.runs.get(h, {})) == 1]
        if few:
            notes.append(f"{row.label}: one seed at {', '.join(map(show_tokens, few))}, so no claim")
    if len({run.config["eval_tokens"] for run in runs}) > 1:
        notes.append("the runs were evaluated on different numbers of tokens: their losses do not compare")
    for run in runs:
        last = run.evals[-1]["tokens"] if run.evals else 0
        if run.planned and last != run.planned:
            notes.append(f"{run.name}: ended after {show_tokens(last)} of {show_tokens(run.planned)}")


# ---- figures

COLORS = ["#d1495b", "#2e86ab", "#e0912f", "#3f9b5f", "#8e5bb5", "#9c6b4e", "#c05fa0", "#7a8288", "#17a2a2", "#a3a02c"]


def figures(rows: list[Row], runs: list[Run], horizons: list[int], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey = "#808890"  # reads on white and on black, and the background is transparent
    plt.rcParams.update({"text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey, "xtick.color": grey,
                         "ytick.color": grey, "axes.titlecolor": grey, "legend.labelcolor": grey, "grid.color": grey,
                         "grid.alpha": 0.25, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "savefig.transparent": True, "svg.hashsalt": "", "font.size": 10,
                         "axes.prop_cycle": plt.cycler(color=COLORS), "lines.linewidth": 1.8, "lines.markersize": 5})
    color = {row.label: COLORS[i % len(COLORS)] for i, row in enumerate(row for row in rows if row.main)}
    for row in rows:  # at another rate, in its method's color
        color.setdefault(row.label, color.get(row.label.rpartition(", lr ")[0], grey))
    loss = "validation loss (nats)"
    out.mkdir(parents=True, exist_ok=True)

    def panels(n=1):
        figure, axes = plt.subplots(1, n, figsize=(7.5 if n == 1 else 4.8 * n, 4.5), squeeze=False, layout="constrained")
        return figure, axes[0]

    def save(figure, name):
        for ending, more in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
            figure.savefig(out / f"{name}.{ending}", **more)
        plt.close(figure)

    def curve(axis, row, **style):
        """Mean over the seeds of the longest runs."""
        members = list(row.runs[max(row.runs)].values())
        points = [e["tokens"] for e in members[0].evals if all(any(f["tokens"] == e["tokens"] for f in m.evals) for m in members)]
        values = [mean(next(f["val_loss"] for f in m.evals if f["tokens"] == t) for m in members) for t in points]
        axis.plot(points, values, **{"label": row.label, "color": color[row.label], **style})
        return values

    def token_axis(axis):
        axis.set_xscale("log")
        axis.set_xticks(horizons, [show_tokens(h) for h in horizons])
        axis.minorticks_off()
        axis.set_xlabel("training tokens")

    def rate_axis(axis):
        rates = sorted({x for line in axis.lines for x in line.get_xdata()})
        doublings = [rates[0] * 2**k for k in range(round(math.log2(rates[-1] / rates[0])) + 1)]
        axis.set(xscale="log", xlabel="learning rate")
        axis.set_xticks(doublings, [f"{rate:g}" for rate in doublings])
        axis.minorticks_off()

    main = [row for row in rows if row.main]
    anytime = [row for row in rows if not row.scheduled]
    scheduled = [row for row in rows if row.scheduled and row.main]
    ablation = {"decay_at", "momentum", "normalize_rows"}
    default = asdict(Config())

    def variants(optimizer, knob):
        """Rows of an optimizer that differ in one knob from its default one."""
        found = {}
        for row in main:
            config = next(iter(row.runs[max(row.runs)].values())).config
            if row.optimizer == optimizer and all(config[k] == default[k] for k in ablation - {knob}):
                found[config[knob]] = row
        return found if len(found) > 1 else {}

    ablated = {id(row) for optimizer in ("sf_normuon", "sf_adamw") for knob in ablation
               for value, row in variants(optimizer, knob).items() if value != default[knob]}

    if anytime and scheduled:  # Fig. 1
        figure, (axis,) = panels()
        low = []
        most = max(len(by_seed) for row in rows for by_seed in row.runs.values())
        shown = [row for row in rows if len(row.runs[max(row.runs)]) > 1 or most == 1]  # the others are in Fig. 7
        for row in anytime:
            if row in shown and id(row) not in ablated:
                low += curve(axis, row, linestyle="-" if row.main else ":")[1:]
        for row in scheduled:
            if row not in shown:
                continue
            points = sorted(row.runs)
            axis.plot(points, [row.mean(h) for h in points], "o--", color=color[row.label], label=f"{row.label}, one run each")
            low += [row.mean(h) for h in points]
        token_axis(axis)
        axis.set(ylabel=loss, xlim=(horizons[0] / 4.4, horizons[-1] * 1.1), ylim=(min(low) * 0.98, sorted(low)[int(len(low) * 0.97)] * 1.02))
        axis.legend()
        save(figure, "fig1_loss_over_tokens")

    pairs = [(o, v) for o in ("sf_normuon", "sf_adamw") if (v := variants(o, "decay_at"))]
    if pairs:  # Fig. 2
        figure, axes = panels(len(pairs))
        for axis, (optimizer, found) in zip(axes, pairs):
            values = [v for value, row in found.items() for v in curve(axis, row, label=f"decay at {value}")[1:]]
            token_axis(axis)
            axis.set(ylabel=loss, title=NAMES[optimizer], ylim=(min(values) * 0.99, sorted(values)[int(len(values) * 0.95)] * 1.02))
            axis.legend()
        save(figure, "fig2_decay")

    pairs = [(k, v) for k in ("momentum", "normalize_rows") if (v := variants("sf_normuon", k))]
    if pairs:  # Fig. 3
        figure, axes = panels(len(pairs))
        for axis, (knob, found) in zip(axes, pairs):
            values = [v for value, row in found.items() for v in curve(axis, row, label=f"{knob} {value}")[2:]]
            token_axis(axis)
            axis.set(ylabel=loss, title=f"SF-NorMuon, {knob}", ylim=(min(values) * 0.99, max(values) * 1.01))
            axis.legend()
        save(figure, "fig3_momentum_and_rows")

    steady = [row for row in anytime if row.optimizer == "sf_normuon" and id(row) not in ablated]
    if steady:  # Fig. 4
        figure, axes = panels(3)
        for row in steady:
            run = next(iter(row.runs[max(row.runs)].values()))
            lines = [e for e in run.evals if "rho" in e]
            t, style = [e["tokens"] for e in lines], {"color": color[row.label]}
            axes[0].plot(t, [e["lambda_rho"] for e in lines], label=f"{row.label}: λρ", **style)
            axes[0].plot(t, [e["lambda_rho_predicted"] for e in lines], "--", label="predicted", **style)
            axes[1].plot(t, [e["alpha"] for e in lines], label=row.label, **style)
            axes[2].plot(t[1:], [100 * abs(b["rho"] / a["rho"] - 1) / (b["step"] - a["step"]) for a, b in zip(lines, lines[1:])], **style)
        for axis, name in zip(axes, ("λρ = λ RMS(z), and its prediction", "α, cosine of z and P̂", "change of ρ in a step (%)")):
            token_axis(axis)
            axis.set_title(name)
        axes[0].legend()
        axes[2].set_yscale("log")
        save(figure, "fig4_steady_state")

    sweeps = {}  # label: {horizon: {rate: loss}}
    for label, members in by_method(runs).items():
        members = [r for r in members if r.tuning] or members
        sweeps[label] = {h: ls for h in horizons if len(ls := {
            rate: l for rate, l in by_rate(members, [h]).items() if math.isfinite(l)}) > 1}
    if any(sweeps.values()):  # Fig. 5
        h = max((h for s in sweeps.values() for h in s), key=lambda h: (sum(h in s for s in sweeps.values()), h))
        figure, (axis,) = panels()
        values = []
        for label, s in sweeps.items():
            if h in s:
                axis.plot(list(s[h]), list(s[h].values()), "o-", label=label, color=color.get(label))
                values += s[h].values()
        rate_axis(axis)
        axis.set(ylabel=loss, title=f"after {show_tokens(h)}",
                 ylim=(min(values) * 0.98, min(max(values), min(values) * 1.35)))
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save(figure, "fig5_learning_rate")

    adamw = reference(rows, "adamw")
    if adamw and sweeps.get(adamw.label):  # Fig. 6
        figure, (axis,) = panels()
        for h, losses in sweeps[adamw.label].items():
            axis.plot(list(losses), list(losses.values()), "o-", label=show_tokens(h))
            best = min(losses, key=losses.get)
            axis.plot(best, losses[best], "o", color=axis.lines[-1].get_color(), markersize=10)
        rate_axis(axis)
        axis.set(ylabel=loss, title=f"{adamw.label}: the best rate of each length is marked")
        axis.legend()
        save(figure, "fig6_adamw_sweep")

    if len(rows) > 2:  # Fig. 7
        h = max(horizons, key=lambda h: (sum(h in row.runs for row in rows), h))
        there = sorted((row for row in rows if h in row.runs), key=lambda row: -row.mean(h))
        figure, (axis,) = panels()
        for i, row in enumerate(there):
            losses = list(row.losses(h).values())
            axis.plot(losses, [i] * len(losses), ".", color=color[row.label], alpha=0.6)
            axis.plot(mean(losses), i, "|", color=color[row.label], markersize=18, markeredgewidth=2.5)
        axis.set_yticks(range(len(there)), [row.label for row in there])
        axis.set(xlabel=loss, title=f"after {show_tokens(h)}: seeds and their mean")
        save(figure, "fig7_all_optimizers")


# ---- the report

def report(paths: list[str], target: float | None, out: Path | None) -> str:
    settings = defaultdict(list)
    for run in read_runs(paths):
        settings[tuple(run.config[k] for k in SETTING)].append(run)
    text = []
    for i, (setting, runs) in enumerate(settings.items()):
        parameters = count_parameters(runs[0].config)
        PARAMETERS["1x"] = 20 * parameters if parameters else None
        notes, horizons = [], horizons_of(runs)
        rows = make_rows(runs, horizons, notes)
        knobs = dict(zip(SETTING, setting))
        size = f"{parameters:,} parameters, " if parameters else ""
        part = (f"{size}{knobs['n_layer']} layers of width {knobs['n_embd']}, {knobs['total_batch_tokens']:,} tokens a step, "
                f"data {knobs['data_dir']}.\n\n") if len(settings) > 1 or parameters else ""
        if not rows:
            text.append(part + "No run has got to a planned length yet.\n")
            continue
        check_claims(runs, rows, horizons, notes)
        part += tables(rows, horizons, target)
        if notes:
            part += "\nNotes:\n\n" + "".join(f"- {note}\n" for note in dict.fromkeys(notes))
        text.append(part)
        if out:
            figures(rows, runs, horizons, out if len(settings) == 1 else out / str(i))
    return "\n".join(text)


def rewrite(readme: Path, study: str, text: str, check: bool) -> None:
    content = readme.read_text(encoding="utf-8")
    pattern = rf"(<!-- results: {re.escape(study)} -->\n).*?(<!-- /results -->)"
    if not re.search(pattern, content, re.S):
        return print(f"{readme} has no <!-- results: {study} --> … <!-- /results -->")
    new = re.sub(pattern, lambda m: m[1] + text + m[2], content, flags=re.S)
    if check and new != content:
        raise SystemExit(f"compare.py: the tables of {study} in {readme} are not what its runs say: "
                         f"run it without --check")
    if new != content:
        write_atomically(readme, lambda file: file.write(new.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="folders of runs, or folders that hold some")
    parser.add_argument("--target", type=float, help="a loss: steps, tokens and seconds until it is reached")
    parser.add_argument("--out", type=Path, help="folder of the figures; default: the study's, else figures")
    parser.add_argument("--readme", type=Path, help="file in which the tables stand between markers")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if --readme differs")
    args = parser.parse_args()
    study = Path(args.paths[0]) if len(args.paths) == 1 and (Path(args.paths[0]) / "runs").is_dir() else None
    if args.check and not (args.readme and study):
        parser.error("--check wants --readme and one study, experiments/results/<study>")
    out = None if args.check else args.out or (study or Path(".")) / "figures"
    text = report(args.paths, args.target, out)
    if args.readme and study:
        rewrite(args.readme, study.resolve().name, text, args.check)
    if not args.check:
        print(text)
        print(f"figures: {out}")


if __name__ == "__main__":
    main()
