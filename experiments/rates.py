"""The best rate, and how it moves with the size: tables and figures of a study of tuning runs in
which one knob of size changes at a time. It declares

    center     {knob: its value while another one changes}: n_embd, n_layer, ..., or steps
    law_from   {knob: the smallest size that the power law is fitted to}
    predict    {knob: sizes that it is extended to}
    methods    {label: ...}; the rows are named <label>_...
"""
import math
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t as student_t

from figures import palette, panels
from runs import Refused, markdown

DIVERGED = math.inf  # results hold ended runs: what stopped before its planned end diverged


def losses_by_rate(runs: list, study: dict, knob: str) -> dict[str, dict]:
    """label: size: rate: seed: the loss at the end, for labels with two sizes or more."""
    found = {label: defaultdict(lambda: defaultdict(dict)) for label in study["methods"]}
    others = {key: value for key, value in study["center"].items() if key != knob}
    for run in runs:
        labels = [label for label in found if run.row.startswith(f"{label}_")]
        size = {**run.config, "steps": run.planned // run.config["total_batch_tokens"]}
        if labels and all(size[key] == value for key, value in others.items()):
            rates = found[max(labels, key=len)][size[knob]]
            rates[run.config["lr"]][run.config["seed"]] = run.loss(run.planned) or DIVERGED
    return {label: sizes for label, sizes in found.items() if len(sizes) > 1}


def fit(rates: dict[float, dict[int, float]]) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Least squares of loss = mean of the rate + shift of the seed, from rate: seed: loss (two-way
    analysis of variance). A seed draws the first weights and the batches of every rate, so its
    shift says nothing about the rates, and a seed that is missing at one must not move its mean.

    Returns the means by ascending rate (infinite where a seed diverged), their covariance for noise
    of variance 1, the sum of the squared residuals and its degrees of freedom."""
    order = sorted(rates)
    whole = [i for i, rate in enumerate(order) if DIVERGED not in rates[rate].values()]
    means = np.full(len(order), DIVERGED)
    if not whole:
        return means, np.zeros((len(order), len(order))), 0.0, 0
    cells = [(i, seed, loss) for i in whole for seed, loss in rates[order[i]].items()]
    seeds = sorted({seed for _, seed, _ in cells})
    shift = np.eye(len(seeds))[:, :-1]
    shift[-1] = -1  # the shifts of all seeds add up to 0
    X = np.array([[*np.eye(len(order))[i], *shift[seeds.index(seed)]] for i, seed, _ in cells])
    y = np.array([loss for *_, loss in cells])
    covariance = np.linalg.pinv(X.T @ X)
    p = covariance @ X.T @ y
    means[whole] = p[whole]
    freedom = len(y) - np.linalg.matrix_rank(X)
    return means, covariance[:len(order), :len(order)], np.sum((y - X @ p) ** 2), int(freedom)


def noise(runs: list) -> tuple[float, float]:
    """The standard deviation of a loss around its rate's mean and its seed's shift, pooled over all
    rates that train well, and the standard errors of a 95% interval by it (Student's t)."""
    rows = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        rows[run.row][run.config["lr"]][run.config["seed"]] = run.loss(run.planned) or DIVERGED
    squares = freedom = 0
    for rates in rows.values():
        means = fit(rates)[0]
        good = [rate for rate, loss in zip(sorted(rates), means) if loss < min(means) + 0.1]
        _, _, residual, n = fit({rate: rates[rate] for rate in good})
        squares, freedom = squares + residual, freedom + n
    if not freedom:
        raise Refused("no two rates of this study have ended with the same two seeds")
    return math.sqrt(squares / freedom), float(student_t.ppf(0.975, freedom))


def optimum(rates: dict[float, dict[int, float]], sd: float) -> tuple[float, float] | None:
    """log2 of the best rate, by the parabola through the best rate and its neighbors, and its
    standard error; None while the best rate is at the edge of the grid, or beside a divergence."""
    means, covariance, *_ = fit(rates)
    best = int(np.argmin(means))
    three = slice(max(0, best - 1), best + 2)
    x, y = np.log2(sorted(rates))[three], means[three]
    if len(y) < 3 or DIVERGED in y:
        return None
    vertex = lambda y: -np.polyfit(x, y, 2)[1] / (2 * np.polyfit(x, y, 2)[0])
    # to first order, from the errors of the three means
    slopes = np.array([(vertex(y + step) - vertex(y)) / 1e-6 for step in 1e-6 * np.eye(3)])
    return vertex(y), sd * math.sqrt(slopes @ covariance[three, three] @ slopes)


def power_law(optima: dict[int, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """log2 rate = p0 log2 size + p1: p and its covariance, each optimum weighted by its error.
    Optima farther from the line than their errors explain widen it: chi² / degrees of freedom."""
    x = np.log2(list(optima))
    y, errors = np.array(list(optima.values())).T
    A = np.stack([x, np.ones_like(x)], axis=1) / errors[:, None]
    covariance = np.linalg.inv(A.T @ A)
    p = covariance @ A.T @ (y / errors)
    misfit = np.sum((A @ p - y / errors) ** 2) / (len(y) - 2)
    return p, covariance * max(1.0, misfit)


def extend(law: tuple, size: int) -> tuple[float, float]:
    """log2 of the rate that the power law has at this size, and its standard error."""
    (p, covariance), a = law, np.array([math.log2(size), 1])
    return a @ p, math.sqrt(a @ covariance @ a)


def interval(value: float, error: float, within_95: float) -> tuple[float, float, float]:
    """The rate and the ends of its 95% interval, from log2 of the rate and its standard error."""
    return tuple(2 ** (value + k * within_95 * error) for k in (0, -1, 1))


def followed(runs: list, study: dict) -> tuple[dict, float, float]:
    """knob: label: (losses by rate, optima, power law or None), of the knobs that have changed; and
    `noise`. Two optima make no power law: nothing would show whether it holds."""
    (sd, within_95), found = noise(runs), {}
    for knob in study["center"]:
        for label, sizes in losses_by_rate(runs, study, knob).items():
            optima = {size: best for size, rates in sorted(sizes.items())
                      if (best := optimum(rates, sd))}
            fitted = {size: best for size, best in optima.items()
                      if size >= study["law_from"].get(knob, 0)}
            law = power_law(fitted) if len(fitted) > 2 else None
            found.setdefault(knob, {})[label] = sizes, optima, law
    return found, sd, within_95


def table(runs: list, study: dict) -> str:
    found, sd, within_95 = followed(runs, study)
    show = lambda value, error: "{:.3g} [{:.3g}, {:.3g}]".format(*interval(value, error, within_95))
    parts = []
    for knob, labels in found.items():
        sizes = sorted({size for by_size, _, _ in labels.values() for size in by_size})
        predict = study["predict"].get(knob, ())
        header = [f"best rate at {knob}", *(f"{size:,}" for size in sizes), "power",
                  *(f"{size:,} (power law)" for size in predict)]
        lines = []
        for label, (_, optima, law) in labels.items():
            cells = [show(*optima[size]) if size in optima else "" for size in sizes]
            if law:
                p, covariance = law
                cells.append(f"{p[0]:+.2f} ± {within_95 * math.sqrt(covariance[0, 0]):.2f}")
                cells += [show(*extend(law, size)) for size in predict]
            else:
                cells += [""] * (1 + len(predict))
            lines.append([label, *cells])
        losses = [[label, *(f"{min(fit(by_size[size])[0]):.4f}" if size in by_size else ""
                            for size in sizes)] for label, (by_size, *_) in labels.items()]
        parts += [markdown(header, lines) + "\n",
                  markdown(["lowest mean loss", *header[1:len(sizes) + 1]], losses) + "\n"]
    since = "".join(f", {knob} from {size}" for knob, size in study["law_from"].items())
    return "".join(parts) + (
        "The best rate is the vertex of the parabola through the best rate that ran and its "
        f"neighbors. Its 95% interval comes from the noise, {sd:.4f}: the standard deviation of a "
        "loss from the sum of its rate's mean and its seed's shift. That of a power law (three "
        f"optima or more{since}) is wider where they lie off the line.\n")


def draw(runs: list, study: dict, prefix: str) -> None:
    """Writes <prefix>rates.svg, the losses over the rate, and <prefix>optimum.svg, the best rate
    over the size."""
    found, _, within_95 = followed(runs, study)
    curves = [(knob, label) for knob in found for label in found[knob]]
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                                figsize=(3.6 * columns, 3.4 * lines))
    for axis in axes.flat[len(curves):]:
        axis.set_axis_off()
    for axis, (knob, label) in zip(axes.flat, curves):
        by_size, optima, _ = found[knob][label]
        for (size, rates), color in zip(sorted(by_size.items()), palette(len(by_size))):
            means = fit(rates)[0]
            axis.plot(sorted(rates), means - min(means), "o-", color=color, label=f"{size:,}")
            if size in optima:
                axis.axvline(2 ** optima[size][0], color=color, linestyle=":")
        axis.set_xscale("log", base=4)  # with base 2 the numbers would overlap
        axis.xaxis.set_major_formatter("{x:.2g}")
        axis.set(title=label, xlabel="rate", ylabel="loss above the lowest", ylim=(-0.002, 0.05))
        axis.legend(title=knob)
    figure.savefig(f"{prefix}rates.svg", metadata={"Date": None})
    plt.close(figure)

    figure, axes = panels(len(found))
    color = dict(zip(study["methods"], palette(len(study["methods"]))))
    for axis, (knob, labels) in zip(axes, found.items()):
        for label, (_, optima, law) in labels.items():
            extended = {}
            if law:
                extended = {size: extend(law, size) for size in study["predict"].get(knob, ())}
                far = {size: 2 ** extend(law, size)[0] for size in sorted([*optima, *extended])
                       if size >= study["law_from"].get(knob, 0)}
                axis.plot([*far], [*far.values()], "--", color=color[label])
            for points, face in ((optima, color[label]), (extended, "none")):  # hollow: not run
                best, low, high = interval(*np.reshape([*points.values()], (-1, 2)).T, within_95)
                axis.errorbar([*points], best, [best - low, high - best], fmt="o", capsize=3,
                              color=color[label], markerfacecolor=face,
                              label=label if points is optima else None)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:.2g}")
        axis.set(xlabel=knob, ylabel="best rate")
        axis.legend()
    low, high = zip(*(axis.get_ylim() for axis in axes))
    plt.setp(axes, ylim=(min(low), max(high)))  # a distance is the same factor in all
    figure.savefig(f"{prefix}optimum.svg", metadata={"Date": None})
    plt.close(figure)
