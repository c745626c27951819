"""The figures of compare.py, numbered as in the paper where it has the like. One function each: it takes a Comparison and
the color of every row, and returns a figure, or None if the runs are not there."""
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import Config
from data import write_atomically

COLORS = ["#d1495b", "#2e86ab", "#e0912f", "#3f9b5f", "#8e5bb5", "#9c6b4e", "#c05fa0", "#7a8288", "#17a2a2", "#a3a02c"]
GREY = "#808890"  # reads on white and on black, and the background is transparent
LOSS = "validation loss (nats)"
DEFAULT = asdict(Config())
ABLATED = ("decay_at", "momentum", "normalize_rows")

plt.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY,
                     "ytick.color": GREY, "axes.titlecolor": GREY, "legend.labelcolor": GREY, "grid.color": GREY,
                     "grid.alpha": 0.25, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False, "savefig.transparent": True, "svg.hashsalt": "", "font.size": 10,
                     "axes.prop_cycle": plt.cycler(color=COLORS), "lines.linewidth": 1.8, "lines.markersize": 5})


def draw(c, out: Path) -> None:
    color = {row.label: COLORS[i % len(COLORS)] for i, row in enumerate(row for row in c.rows if row.main)}
    for row in c.rows:  # at another rate, in its method's color
        color.setdefault(row.label, color.get(row.label.rpartition(", lr ")[0], GREY))
    out.mkdir(parents=True, exist_ok=True)
    for make in (fig1_loss_over_tokens, fig2_decay, fig3_momentum_and_rows, fig4_steady_state, fig5_learning_rate,
                 fig6_adamw_sweep, fig7_all_optimizers):
        figure = make(c, color)
        if figure:
            figure.savefig(out / f"{make.__name__}.png", dpi=160)
            figure.savefig(out / f"{make.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


# ---- what they share

def panels(n=1):
    figure, axes = plt.subplots(1, n, figsize=(7.5 if n == 1 else 4.8 * n, 4.5), squeeze=False, layout="constrained")
    return figure, axes[0]


def curve(axis, row, **style) -> list[float]:
    """Mean over the seeds of the longest runs, where all of them were evaluated."""
    losses = {}
    for run in row.longest:
        for e in run.evals:
            losses.setdefault(e["tokens"], []).append(e["val_loss"])
    points = {tokens: mean(ls) for tokens, ls in losses.items() if len(ls) == len(row.longest)}
    axis.plot(list(points), list(points.values()), **{"label": row.label, **style})
    return list(points.values())


def token_axis(c, axis) -> None:
    axis.set_xscale("log")
    axis.set_xticks(c.horizons, [c.show(h) for h in c.horizons])
    axis.minorticks_off()
    axis.set_xlabel("training tokens")


def rate_axis(axis) -> None:
    rates = sorted({x for line in axis.lines for x in line.get_xdata()})
    doublings = [rates[0] * 2**k for k in range(round(math.log2(rates[-1] / rates[0])) + 1)]
    axis.set(xscale="log", xlabel="learning rate")
    axis.set_xticks(doublings, [f"{rate:g}" for rate in doublings])
    axis.minorticks_off()


def variants(c, optimizer: str, knob: str) -> dict:
    """Rows of an optimizer that differ in one knob from its default one, by the knob's value."""
    found = {row.config[knob]: row for row in c.rows if row.main and row.config["optimizer"] == optimizer and
             all(row.config[k] == DEFAULT[k] for k in ABLATED if k != knob)}
    return found if len(found) > 1 else {}


def without_ablations(c) -> list:
    """Rows that have no schedule, and are in neither Fig. 2 nor Fig. 3 as the variant of another one."""
    ablated = {row.label for optimizer in ("sf_normuon", "sf_adamw") for knob in ABLATED
               for value, row in variants(c, optimizer, knob).items() if value != DEFAULT[knob]}
    return [row for row in c.rows if not row.scheduled and row.label not in ablated]


def sweep(c, label: str) -> dict[int, dict[float, float]]:
    """{horizon: {rate: loss}} of a method, where it has several rates that did not diverge."""
    members = [run for run in c.methods[label] if run.tuning] or c.methods[label]
    losses = {h: {rate: loss for rate, loss in c.by_rate(members, [h]).items() if math.isfinite(loss)} for h in c.horizons}
    return {h: ls for h, ls in losses.items() if len(ls) > 1}


# ---- the figures

def fig1_loss_over_tokens(c, color):
    most = max(len(by_seed) for row in c.rows for by_seed in row.runs.values())
    shown = {row.label for row in c.rows if len(row.longest) > 1 or most == 1}  # the others are in Fig. 7
    anytime, scheduled = without_ablations(c), [row for row in c.rows if row.scheduled and row.main]
    if not (scheduled and any(not row.scheduled for row in c.rows)):
        return None
    figure, (axis,) = panels()
    low = []
    for row in anytime:
        if row.label in shown:
            low += curve(axis, row, color=color[row.label], linestyle="-" if row.main else ":")[1:]
    for row in scheduled:
        if row.label in shown:
            means = [row.mean(h) for h in sorted(row.runs)]
            axis.plot(sorted(row.runs), means, "o--", color=color[row.label], label=f"{row.label}, one run each")
            low += means
    token_axis(c, axis)
    axis.set(ylabel=LOSS, xlim=(c.horizons[0] / 4.4, c.horizons[-1] * 1.1),
             ylim=(min(low) * 0.98, sorted(low)[int(len(low) * 0.97)] * 1.02))
    axis.legend()
    return figure


def fig2_decay(c, color):
    pairs = [v for optimizer in ("sf_normuon", "sf_adamw") if (v := variants(c, optimizer, "decay_at"))]
    if not pairs:
        return None
    figure, axes = panels(len(pairs))
    for axis, found in zip(axes, pairs):
        values = []
        for value, row in found.items():
            values += curve(axis, row, color=color[row.label], label=f"decay at {value}")[1:]
        token_axis(c, axis)
        axis.set(ylabel=LOSS, title=row.optimizer,
                 ylim=(min(values) * 0.99, sorted(values)[int(len(values) * 0.95)] * 1.02))
        axis.legend()
    return figure


def fig3_momentum_and_rows(c, color):
    pairs = [(knob, v) for knob in ("momentum", "normalize_rows") if (v := variants(c, "sf_normuon", knob))]
    if not pairs:
        return None
    figure, axes = panels(len(pairs))
    for axis, (knob, found) in zip(axes, pairs):
        values = []
        for value, row in found.items():
            values += curve(axis, row, color=color[row.label], label=f"{knob} {value}")[2:]
        token_axis(c, axis)
        axis.set(ylabel=LOSS, title=f"{row.optimizer}, {knob}", ylim=(min(values) * 0.99, max(values) * 1.01))
        axis.legend()
    return figure


def fig4_steady_state(c, color):
    rows = [row for row in without_ablations(c) if row.config["optimizer"] == "sf_normuon"]
    lines_of = {row.label: [e for e in row.longest[0].evals if "rho" in e] for row in rows}
    rows = [row for row in rows if len(lines_of[row.label]) > 1]
    if not rows:
        return None
    figure, axes = panels(3)
    for row in rows:
        lines = lines_of[row.label]
        t, style = [e["tokens"] for e in lines], {"color": color[row.label]}
        axes[0].plot(t, [e["lambda_rho"] for e in lines], label=f"{row.label}: λρ", **style)
        axes[0].plot(t, [e["lambda_rho_predicted"] for e in lines], "--", label="predicted", **style)
        axes[1].plot(t, [e["alpha"] for e in lines], label=row.label, **style)
        change = [100 * abs(b["rho"] / a["rho"] - 1) / (b["step"] - a["step"]) for a, b in zip(lines, lines[1:])]
        axes[2].plot(t[1:], change, **style)
    for axis, name in zip(axes, ("λρ = λ RMS(z), and its prediction", "α, cosine of z and P̂", "change of ρ in a step (%)")):
        token_axis(c, axis)
        axis.set_title(name)
    axes[0].legend()
    axes[2].set_yscale("log")
    return figure


def fig5_learning_rate(c, color):
    sweeps = {label: sweep(c, label) for label in c.methods}
    swept = [h for losses in sweeps.values() for h in losses]
    if not swept:
        return None
    h = max(swept, key=lambda h: (swept.count(h), h))
    figure, (axis,) = panels()
    values = []
    for label, losses in sweeps.items():
        if h in losses:
            axis.plot(list(losses[h]), list(losses[h].values()), "o-", label=label, color=color.get(label))
            values += losses[h].values()
    rate_axis(axis)
    axis.set(ylabel=LOSS, title=f"after {c.show(h)}", ylim=(min(values) * 0.98, min(max(values), min(values) * 1.35)))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def fig6_adamw_sweep(c, color):
    adamw = c.reference("adamw")
    losses_by_length = adamw and sweep(c, adamw.label)
    if not losses_by_length:
        return None
    figure, (axis,) = panels()
    for h, losses in losses_by_length.items():
        axis.plot(list(losses), list(losses.values()), "o-", label=c.show(h))
        best = min(losses, key=losses.get)
        axis.plot(best, losses[best], "o", color=axis.lines[-1].get_color(), markersize=10)
    rate_axis(axis)
    axis.set(ylabel=LOSS, title=f"{adamw.label}: the best rate of each length is marked")
    axis.legend()
    return figure


def fig7_all_optimizers(c, color):
    if len(c.rows) < 3:
        return None
    h = max(c.horizons, key=lambda h: (sum(h in row.runs for row in c.rows), h))
    there = sorted((row for row in c.rows if h in row.runs), key=lambda row: -row.mean(h))
    figure, (axis,) = panels()
    for i, row in enumerate(there):
        losses = list(row.losses(h).values())
        axis.plot(losses, [i] * len(losses), ".", color=color[row.label], alpha=0.6)
        axis.plot(mean(losses), i, "|", color=color[row.label], markersize=18, markeredgewidth=2.5)
    axis.set_yticks(range(len(there)), [row.label for row in there])
    axis.set(xlabel=LOSS, title=f"after {c.show(h)}: seeds and their mean")
    return figure


# ---- while runs go on

STATUS = {"step": "step {:,}", "tokens": "{:,} tokens", "loss": "loss at y {:.4f}", "val_loss": "validation loss at x {:.4f}",
          "tokens_per_second": "{:,.0f} tokens/s"}


def follow(folders: list[Path], read) -> None:
    """Draws runs again as their logs grow, until all have got to their end or Ctrl-C. read(folder) gives a run."""
    print(f"the curve is in {folders[0] / 'curve.svg'}; Ctrl-C ends this command only", flush=True)
    lines = [tqdm(bar_format="{desc}", position=i, dynamic_ncols=True) for i in range(len(folders))]
    runs, sizes = [], []
    while not runs or any(not run.planned or run.ended < run.planned for run in runs):
        if sizes == (sizes := [(folder / "log.jsonl").stat().st_size for folder in folders]):
            time.sleep(2)
            continue
        runs = [read(folder) for folder in folders]
        running(runs, folders[0] / "curve.svg")
        for run, line in zip(runs, lines):
            last = {key: value for e in sorted(run.train + run.evals, key=lambda e: e["step"]) for key, value in e.items()}
            line.set_description_str(", ".join([run.name, *(s.format(last[k]) for k, s in STATUS.items() if k in last)]))


def running(runs: list, file: Path) -> None:
    figure, (axis,) = panels()
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        axis.plot([e["tokens"] for e in run.train], [e["loss"] for e in run.train], color=color, linewidth=0.8, alpha=0.5)
        axis.plot([e["tokens"] for e in run.evals], [e["val_loss"] for e in run.evals], "o-", color=color, label=run.name)
    axis.set(xscale="log", xlabel="training tokens", ylabel="loss (nats)")
    axis.legend(title="validation loss at x; thin: training loss at y")
    write_atomically(file, lambda f: figure.savefig(f, format="svg"))
    plt.close(figure)
