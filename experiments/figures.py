"""The figures of compare.py, a function each: it takes a Comparison and the color of every row and
returns a figure, or None if the runs are not there."""
import colorsys
import math
import time
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from tqdm import tqdm

from baselines import OPTIMIZERS
from checkpoint import MAY_CHANGE
from data import write_atomically
from runs import best, read_run, welch

COLORS = ["#d1495b", "#2e86ab", "#c97b14", "#3f9b5f", "#8e5bb5", "#9c6b4e", "#c05fa0", "#17a2a2"]
GREY = "#76808a"  # reads on white and on black; the background is transparent
LOSS = "validation loss (nats)"
BESIDE = {*MAY_CHANGE, "seed"}  # what may differ between runs of one row

plt.rcParams.update({
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "axes.titlecolor": GREY, "legend.labelcolor": GREY, "grid.color": GREY,
    "grid.alpha": 0.25, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "savefig.transparent": True, "svg.hashsalt": "", "font.size": 11,
    "svg.fonttype": "none", "font.family": "sans-serif", "lines.linewidth": 1.8,
    "lines.markersize": 5})


def palette(n: int) -> list[str]:
    """As many colors, no two alike, that read on white and on black."""
    if n <= len(COLORS):
        return COLORS[:n]
    hues = [colorsys.hls_to_rgb(i / n, (0.40, 0.55)[i % 2], 0.6) for i in range(n)]
    return [to_hex(color) for color in hues]


def draw(c, prefix: str) -> None:
    """Writes <prefix><name>.svg for each figure that the runs allow."""
    color = dict(zip(c.rows, palette(len(c.rows))))
    Path(f"{prefix}x").parent.mkdir(parents=True, exist_ok=True)
    for make in (headline, loss, difference, decay, steady_state, tuning, seeds):
        figure = make(c, color)
        if figure:
            figure.savefig(f"{prefix}{make.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


# ---- what they share

def panels(n=1, width=7.0):
    figure, axes = plt.subplots(1, n, figsize=(width if n == 1 else 4.8 * n, 4.4), squeeze=False,
                                layout="constrained")
    return figure, axes[0]


def curve(axis, row, after: float, **style) -> dict[int, float]:
    """The mean over the seeds, from a number of tokens on."""
    points = {tokens: mean(losses) for tokens, losses in row.curve().items() if tokens >= after}
    kind = {"marker": "o", "linestyle": "--"} if row.scheduled else {}
    axis.plot(list(points), list(points.values()), **{"label": row.label, **kind, **style})
    return points


def token_axis(c, axis) -> None:
    axis.set_xscale("log")
    axis.set_xticks(c.horizons, [c.show(h) for h in c.horizons])
    axis.minorticks_off()
    axis.set_xlabel("training tokens")


def label_ends(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, words, color) beside the ends of curves, moved apart where they overlap."""
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    places = [(y - low) / (high - low) for _, y, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + 0.075)
    right = max(x for x, *_ in ends)
    for (_, y, words, color), place in zip(ends, places):
        axis.annotate(words, (right, low + place * (high - low)), xytext=(8, 0), color=color,
                      textcoords="offset points", va="center", annotation_clip=False)


# ---- the figures

def headline(c, color):
    """For the front page: the few rows that the study names, labelled at their ends."""
    words = c.study.get("headline", {})
    rows = [c.rows[label] for label in words if label in c.rows]
    if not rows:
        return None
    figure, (axis,) = panels(width=7.6)
    ends = []
    for row, shade in zip(rows, palette(len(rows))):
        points = curve(axis, row, c.horizons[0] / 2, color=shade)
        ends.append((max(points), points[max(points)], words[row.label], shade))
    token_axis(c, axis)
    axis.set_ylabel(LOSS)
    label_ends(axis, ends)
    return figure


def loss(c, color):
    if len(c.rows) < 2:
        return None
    figure, (axis,) = panels(width=9.0)
    values = []
    for row in c.rows.values():
        values += curve(axis, row, c.horizons[0] / 4, color=color[row.label]).values()
    values.sort()
    token_axis(c, axis)
    axis.set(ylabel=LOSS, ylim=(values[0] * 0.98, values[int(len(values) * 0.97)] * 1.02))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def differences(c) -> dict[str, list[tuple]]:
    """To the best tuned NorMuon of each length: {row: [(tokens, welch)]}, of the rows that the
    study names."""
    words = c.study.get("headline", {})
    ours = next(iter(words), None)
    rivals = [row for row in c.rows.values() if row.label != ours
              and row.config["optimizer"] == "normuon" and row.scheduled]
    normuon = {h: best(rivals, h) for h in c.horizons if any(h in row.runs for row in rivals)}
    found = {}
    for label in words or c.rows:
        row = c.rows.get(label)
        if row and row not in normuon.values():
            found[words.get(label, label)] = [
                (h, welch(row.losses(h), other.losses(h))) for h, other in normuon.items()
                if len(row.runs.get(h, ())) > 1]
    return {words: points for words, points in found.items() if points}


def difference(c, color):
    """The differences with their 95% bands, the margin of the study shaded; a panel for each of
    the studies that it names in `panels`."""
    drawn = [(title, each, found) for title, each in c.panels.items()
             if (found := differences(each))]
    if not drawn:
        return None
    figure, axes = panels(len(drawn), width=9.0)
    rows = dict.fromkeys(words for *_, found in drawn for words in found)
    shades, middle = dict(zip(rows, palette(len(rows)))), []
    for axis, (title, each, found) in zip(axes, drawn):
        if "margin" in c.study:
            axis.axhspan(-c.study["margin"], c.study["margin"], color=GREY, alpha=0.15, linewidth=0)
        axis.axhline(0, color=GREY, linewidth=1)
        for words, points in found.items():
            at, ends = zip(*points)
            d, low, high, _ = zip(*ends)
            middle += d
            axis.plot(at, d, "o-", color=shades[words], label=words)
            axis.fill_between(at, low, high, color=shades[words], alpha=0.12, linewidth=0)
        token_axis(each, axis)
        axis.set_title(title)
    middle.sort()
    plt.setp(axes, ylim=(min(-0.02, middle[0] - 0.02),
                         middle[int(0.9 * (len(middle) - 1))] + 0.05))
    axes[0].set_ylabel("loss minus that of tuned NorMuon (nats)")
    lines = {line.get_label(): line for axis in axes for line in axis.lines}  # of any panel
    axes[-1].legend([lines[words] for words in rows], rows, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def decay(c, color):
    """Fig. 2 of the paper: a panel for each set of rows that differ in the place of decay only."""
    alike = {}
    for row in c.rows.values():
        rest = {k: v for k, v in row.config.items() if k != "decay_at" and k not in BESIDE}
        alike.setdefault(str(rest), []).append(row)
    found = [rows for rows in alike.values() if len(rows) > 1]
    if not found:
        return None
    figure, axes = panels(len(found))
    for axis, rows in zip(axes, found):
        values, longest = [], max(max(row.runs) for row in rows)
        for row in rows:
            values += curve(axis, row, longest / 50, color=color[row.label],
                            label=f"decay_at {row.config['decay_at']}").values()
        values.sort()
        token_axis(c, axis)
        optimizer, lr = (rows[0].config[key] for key in ("optimizer", "lr"))
        axis.set(ylabel=LOSS, title=f"{OPTIMIZERS[optimizer].label}, rate {lr:g}",
                 ylim=(values[0] * 0.99, values[int(len(values) * 0.95)] * 1.02))
        axis.legend()
    return figure


def steady_state(c, color):
    """Fig. 4 of the paper."""
    lines_of = {}
    for row in c.rows.values():
        longest = next(iter(row.runs[max(row.runs)].values()))
        lines_of[row.label] = [e for e in longest.evals if "rho" in e]
    rows = {label: lines for label, lines in lines_of.items() if len(lines) > 1}
    if not rows:
        return None
    figure, axes = panels(3)
    for label, lines in rows.items():
        t, style = [e["tokens"] for e in lines], {"color": color[label]}
        axes[0].plot(t, [e["lambda_rho"] for e in lines], **style)
        axes[0].plot(t, [e["lambda_rho_predicted"] for e in lines], "--", **style)
        axes[1].plot(t, [e["alpha"] for e in lines], label=label, **style)
        change = [100 * abs(b["rho"] / a["rho"] - 1) / (b["step"] - a["step"])
                  for a, b in zip(lines, lines[1:])]
        axes[2].plot(t[1:], change, **style)
    for axis, name in zip(axes, ("λρ = λ RMS(z); dashed: predicted", "α, cosine of z and P̂",
                                 "change of ρ in a step (%)")):
        token_axis(c, axis)
        axis.set_title(name)
    axes[2].set_yscale("log")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center",
                  ncols=min(4, len(rows)))
    return figure


def tuning(c, color):
    """Tuning runs at the longest length that most methods were tuned at (Fig. 5 of the paper)."""
    points = {}  # horizon: label: [(rate, loss)]
    for row in c.rows.values():
        for run in row.tuning:
            for h in c.horizons:
                if run.loss(h) is not None:
                    points.setdefault(h, {}).setdefault(row.label, []).append(
                        (run.config["lr"], run.loss(h)))
    if not points:
        return None
    h = max(points, key=lambda h: (len(points[h]), h))
    figure, (axis,) = panels(width=9.0)
    for label, found in points[h].items():
        axis.plot(*zip(*sorted(found)), "o", color=color[label], label=label, alpha=0.8)
        means = {}
        for rate, value in found:
            means.setdefault(rate, []).append(value)
        if not c.study.get("rungs"):  # a grid of rates; drawn configurations differ in more
            axis.plot(sorted(means), [mean(means[rate]) for rate in sorted(means)],
                      color=color[label])
    values = [value for found in points[h].values() for _, value in found]
    rates = sorted({rate for found in points[h].values() for rate, _ in found})
    powers = range(math.floor(math.log2(rates[0])), math.ceil(math.log2(rates[-1])) + 1)
    axis.set(xscale="log", xlabel="learning rate", ylabel=LOSS, title=f"after {c.show(h)}",
             ylim=(min(values) * 0.98, min(max(values) * 1.01, min(values) * 1.35)))
    axis.set_xticks([2.0**k for k in powers], [f"{2.0**k:.2g}" for k in powers])
    axis.minorticks_off()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def seeds(c, color):
    """Every seed and the mean (Fig. 7 of the paper)."""
    if len(c.rows) < 3:
        return None
    h = max(c.horizons, key=lambda h: (sum(h in row.runs for row in c.rows.values()), h))
    there = sorted((row for row in c.rows.values() if h in row.runs),
                   key=lambda row: -mean(row.losses(h)))
    figure, (axis,) = panels(width=8.0)
    for i, row in enumerate(there):
        losses = row.losses(h)
        axis.plot(losses, [i] * len(losses), ".", color=color[row.label], alpha=0.6)
        axis.plot(mean(losses), i, "|", color=color[row.label], markersize=18, markeredgewidth=2.5)
    axis.set_yticks(range(len(there)), [row.label for row in there])
    axis.set(xlabel=LOSS, title=f"after {c.show(h)}: seeds and their mean")
    return figure


# ---- while runs go on

STATUS = {"step": "step {:,}", "tokens": "{:,} tokens", "loss": "loss at y {:.4f}",
          "val_loss": "validation loss at x {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}


def follow(folders: list[Path]) -> None:
    """Draws runs again as their logs grow, until all have ended or Ctrl-C."""
    print(f"the curve is in {folders[0] / 'curve.svg'}; Ctrl-C ends this command only", flush=True)
    lines = [tqdm(bar_format="{desc}", position=i, dynamic_ncols=True) for i in range(len(folders))]
    runs, sizes = [], []
    while not runs or any(not run.planned or run.ended < run.planned for run in runs):
        before, sizes = sizes, [(folder / "log.jsonl").stat().st_size for folder in folders]
        if sizes == before:
            time.sleep(2)
            continue
        runs = [read_run(folder) for folder in folders]
        running(runs, folders[0] / "curve.svg")
        for run, line in zip(runs, lines):
            last = {}
            for e in sorted(run.train + run.evals, key=lambda e: e["step"]):
                last.update(e)
            words = [s.format(last[key]) for key, s in STATUS.items() if key in last]
            line.set_description_str(", ".join([run.name, *words]))


def running(runs: list, file: Path) -> None:
    figure, (axis,) = panels()
    for run, color in zip(runs, palette(len(runs))):
        axis.plot([e["tokens"] for e in run.train], [e["loss"] for e in run.train], color=color,
                  linewidth=0.8, alpha=0.5)
        axis.plot([e["tokens"] for e in run.evals], [e["val_loss"] for e in run.evals], "o-",
                  color=color, label=run.name)
    axis.set(xscale="log", xlabel="training tokens", ylabel="loss (nats)")
    axis.legend(title="validation loss at x; thin: training loss at y")
    write_atomically(file, lambda f: figure.savefig(f, format="svg"))
    plt.close(figure)
