"""The best rate of each size, and how it moves with the size: the table and the figures of a study
of tuning runs. It declares

    follow     the knob that is the size: n_embd, n_layer, total_batch_tokens, ...
    methods    {label: ...}; the rows are named <label>_<size>
    predict    sizes that the power law is extended to
"""
import math
from collections import defaultdict
from statistics import mean, variance

import matplotlib.pyplot as plt
import numpy as np

from figures import LOSS, palette, panels
from runs import Refused

WITHIN_95 = 1.96  # standard errors


def losses_by_rate(runs: list, study: dict) -> dict[str, dict[int, dict[float, list[float]]]]:
    """label: size: rate: the losses of the seeds at the end."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        label, _, size = run.row.rpartition("_")
        if label in study["methods"]:  # results hold ended runs: what stopped early diverged
            found[label][int(size)][run.config["lr"]].append(
                run.evals[-1]["val_loss"] if run.planned == run.ended else math.inf)
    return found


def noise(found: dict) -> float:
    """The standard deviation between seeds, pooled over all rates that train well."""
    pooled = []
    for sizes in found.values():
        for rates in sizes.values():
            good = min(map(mean, rates.values())) + 0.1
            pooled += [(variance(x), len(x) - 1) for x in rates.values()
                       if len(x) > 1 and mean(x) < good]
    freedom = sum(n for _, n in pooled)
    if not freedom:
        raise Refused("no rate of this study has ended with two seeds")
    return math.sqrt(sum(v * n for v, n in pooled) / freedom)


def optimum(rates: dict[float, list[float]], sd: float) -> tuple[float, float] | None:
    """log2 of the best rate, by the parabola through the best rate and its neighbors, and its
    standard error; None while the best rate is at the edge of the grid, or beside a divergence."""
    order = sorted(rates)
    best = min(range(len(order)), key=lambda i: mean(rates[order[i]]))
    y = [mean(rates[rate]) for rate in order[max(0, best - 1):best + 2]]
    if len(y) < 3 or math.inf in y:
        return None
    x = [math.log2(order[i]) for i in (best - 1, best, best + 1)]
    vertex = lambda y: -np.polyfit(x, y, 2)[1] / (2 * np.polyfit(x, y, 2)[0])
    # to first order, from the error of each of the three means
    slopes = [(vertex(np.add(y, 1e-6 * np.eye(3)[i])) - vertex(y)) / 1e-6 for i in range(3)]
    errors = [sd / math.sqrt(len(rates[order[i]])) for i in (best - 1, best, best + 1)]
    return vertex(y), math.hypot(*np.multiply(slopes, errors))


def power_law(optima: dict[int, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """log2 rate = p0 log2 size + p1: p and its covariance, each optimum weighted by its error."""
    x = np.log2(list(optima))
    y, errors = np.array(list(optima.values())).T
    A = np.stack([x, np.ones_like(x)], axis=1) / errors[:, None]
    covariance = np.linalg.inv(A.T @ A)
    return covariance @ A.T @ (y / errors), covariance


def interval(value: float, error: float) -> str:
    low, middle, high = (2 ** (value + k * WITHIN_95 * error) for k in (-1, 0, 1))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def rows(found: dict, study: dict):
    """For each label its optima, and its power law where two sizes or more have one."""
    sd = noise(found)
    for label in study["methods"]:
        optima = {size: best for size, rates in sorted(found.get(label, {}).items())
                  if (best := optimum(rates, sd))}
        yield label, optima, power_law(optima) if len(optima) > 1 else None


def table(runs: list, study: dict) -> str:
    found = losses_by_rate(runs, study)
    sizes = sorted({size for rates in found.values() for size in rates})
    predict = study.get("predict", ())
    header = [f"best rate at {study['follow']}", *map(str, sizes), "power",
              *(f"{size} (power law)" for size in predict)]
    lines = []
    for label, optima, law in rows(found, study):
        cells = [interval(*optima[size]) if size in optima else "" for size in sizes]
        cells += [""] * (1 + len(predict))
        if law:
            p, covariance = law
            error = WITHIN_95 * math.sqrt(covariance[0, 0])
            cells[len(sizes)] = f"{p[0]:+.2f} ± {error:.2f}"
            for i, size in enumerate(predict):
                a = np.array([math.log2(size), 1])
                cells[len(sizes) + 1 + i] = interval(a @ p, math.sqrt(a @ covariance @ a))
        lines.append([label, *cells])
    text = "\n".join("| " + " | ".join(line) + " |"
                     for line in (header, ["---"] * len(header), *lines))
    return (f"{text}\n\nThe vertex of the parabola through the best rate and its neighbors, with its "
            f"95% interval from the standard deviation between seeds, {noise(found):.4f}.\n")


def draw(runs: list, study: dict, prefix: str) -> None:
    """Writes <prefix>rates.svg, the losses over the rate, and <prefix>optimum.svg, the best rate
    over the size."""
    found = losses_by_rate(runs, study)
    labels = [label for label in study["methods"] if label in found]
    sizes = sorted({size for rates in found.values() for size in rates})
    color = dict(zip(sizes, palette(len(sizes))))
    columns = min(4, len(labels))
    figure, axes = plt.subplots(math.ceil(len(labels) / columns), columns, squeeze=False,
                                figsize=(3.6 * columns, 3.4 * math.ceil(len(labels) / columns)),
                                layout="constrained")
    for axis in axes.flat[len(labels):]:
        axis.set_axis_off()
    laws = {label: (optima, law) for label, optima, law in rows(found, study)}
    for axis, label in zip(axes.flat, labels):
        for size, rates in sorted(found[label].items()):
            order = sorted(rates)
            means = [mean(rates[rate]) for rate in order]
            axis.plot(order, means, "o-", color=color[size], label=size)
            if size in laws[label][0]:
                axis.axvline(2 ** laws[label][0][size][0], color=color[size], linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set(title=label, xlabel="rate", ylabel=LOSS)
    axes[0, 0].legend(title=study["follow"])
    figure.savefig(f"{prefix}rates.svg", metadata={"Date": None})
    plt.close(figure)

    figure, (axis,) = panels(width=8.0)
    for label, shade in zip(labels, palette(len(labels))):
        optima, law = laws[label]
        for size, (value, error) in optima.items():
            ends = [2 ** (value + k * WITHIN_95 * error) for k in (-1, 1)]
            axis.plot([size, size], ends, color=shade)
            axis.plot(size, 2**value, "o", color=shade)
        if law:
            far = [min(optima), max([*optima, *study.get("predict", ())])]
            axis.plot(far, [2 ** (law[0] @ [math.log2(size), 1]) for size in far], "--",
                      color=shade, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(xlabel=study["follow"], ylabel="best rate")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(f"{prefix}optimum.svg", metadata={"Date": None})
    plt.close(figure)
