"""The best rate over sizes: tables and figures over runs whose optimum is known."""
import importlib
import math
import re

import numpy as np
import pytest
from scipy.stats import t as student_t

from test_experiments import REPO, run
from test_reports import a_run, save

rates, runs = map(importlib.import_module, ("rates", "runs"))
SIZES, GRID = (32, 64, 128), [0.01 * 2.0**k for k in range(-2, 3)]
# Two seeds are 0.1 apart, which says nothing of the rates, and 0.006 more or less at every other.
SHIFTS = [0.053, -0.053, 0.047, -0.047]
STUDY = dict(center=dict(n_embd=64, n_layer=4), methods=dict(a={}, b={}, a_x={}),
             law_from=dict(n_layer=2), predict=dict(n_embd=(512,)))


def known(size):
    """log2 of the best rate: it falls with the square root of the size."""
    return math.log2(0.012) - 0.5 * math.log2(size / 64)


def tuning_runs(label, best, noise=lambda: 0.0, sizes=SIZES, knob="n_embd", **others):
    knobs = dict(n_embd=64, n_layer=4) | others
    return [a_run(f"tune_{label}_{size}{knob}{len(others)}_lr{lr:g}_seed{seed}",
                  {5: 4.0, 10: 3 + 0.12 * (math.log2(lr) - best(size)) ** 2 + noise()},
                  lr=lr, seed=seed, **knobs | {knob: size})
            for size in sizes for lr in GRID for seed in (0, 1)]


def read(tmp_path, lines):
    return runs.read_runs([save(tmp_path / "known.jsonl", lines)])


def test_a_parabola_and_a_power_law_are_found(tmp_path):
    """b has its best rate at the edge of the grid at one size, and there no optimum."""
    edge = lambda size: 9 if size == 128 else math.log2(0.02)
    shift = iter(SHIFTS * 1000)
    lines = tuning_runs("a", known, lambda: next(shift)) + tuning_runs("b", edge)
    lines.append(a_run("tune_a_32_lr0.16_seed0", {5: 0.1}, lr=0.16, n_embd=32))
    lines[-1]["config"]["max_tokens"] = 10000  # it ended early, as a run does that diverges
    table = rates.table(read(tmp_path, lines), STUDY).splitlines()
    assert table[0].startswith("| best rate at n_embd | 32 | 64 | 128 | power | 512 (power law) |")
    a, b = ([cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:4])
    assert not table[4]
    # Within 0.1 of the best, a has two rates a size, and so a degree of freedom, and b one. The
    # error of the vertex, (l- - l+) / (2 (l- - 2 l + l+)), is that of its derivatives, by hand.
    sd = math.sqrt(4 * 0.003**2 / 1)
    assert f"{sd:.4f}:" in table[-1]
    for size, cell in zip(SIZES, a):
        k = min(range(len(GRID)), key=lambda i: abs(math.log2(GRID[i]) - known(size)))
        off = known(size) - math.log2(GRID[k])
        slopes = np.array([(1 + 2 * off) / 2, -2 * off, (2 * off - 1) / 2]) / 0.24
        error = sd / math.sqrt(2) * np.linalg.norm(slopes)
        expected = [2 ** (known(size) + k * student_t.ppf(0.975, 3) * error) for k in (0, -1, 1)]
        found = [*map(float, re.findall(r"[\d.]+", cell))]
        np.testing.assert_allclose(found, expected, rtol=0.006)
    assert a[3].startswith("-0.50 ± ") and b[2] == ""
    assert float(a[4].split()[0]) == pytest.approx(2 ** known(512), rel=0.006)
    assert b[1] and not b[3] and not b[4]  # two optima make no power law


def test_a_seed_that_is_missing_at_a_rate_does_not_move_its_mean():
    """Seed 1 is 0.2 above seed 0 where both ended: at 4 it would have made 3.1 + 0.2 / 2 the mean,
    from losses a, b and c as c + (b - a) / 2."""
    means, covariance, squares, freedom = rates.fit(
        {4.0: {0: 3.1}, 1.0: {0: 3.0, 1: 3.2}, 2.0: {0: 2.9, 1: rates.DIVERGED}})
    np.testing.assert_allclose(means, [3.1, rates.DIVERGED, 3.2])
    np.testing.assert_allclose(covariance[::2, ::2], [[0.5, 0], [0, 1.5]], atol=1e-12)
    assert freedom == 0 and squares == pytest.approx(0)


@pytest.mark.parametrize("bend", [0, 0.05, 1])
def test_a_power_law_that_does_not_fit_is_less_certain(bend):
    sizes, errors = np.array([32, 64, 128, 256]), np.array([0.1, 0.2, 0.1, 0.3])
    optima = [known(size) + bend * (k % 2) for k, size in enumerate(sizes)]
    p, covariance = rates.power_law(dict(zip(sizes, zip(optima, errors))))
    expected, exact = np.polyfit(np.log2(sizes), optima, 1, w=1 / errors, cov="unscaled")
    _, scaled = np.polyfit(np.log2(sizes), optima, 1, w=1 / errors, cov=True)  # by chi²
    np.testing.assert_allclose(p, expected)
    np.testing.assert_allclose(covariance, scaled if bend == 1 else exact)


def test_one_knob_changes_at_a_time(tmp_path):
    """A run is in the table of a knob if every other one has its central value; the center is in
    all of them, and a label that begins like another is not taken for it."""
    noise = iter(SHIFTS * 1000)
    deep = lambda layers: math.log2(0.012) + (0.5 * math.log2(layers / 4) if layers > 1 else 0.5)
    make = lambda label, best, **more: tuning_runs(label, best, lambda: next(noise), **more)
    lines = (make("a", known) + make("a_x", lambda size: math.log2(0.02))
             + make("b", known, sizes=(64,))
             + make("a", deep, knob="n_layer", sizes=(1, 2, 8))
             + make("a", lambda size: math.log2(0.04), knob="n_layer", sizes=(2, 8), n_embd=32))
    widths, losses, depths, *_ = rates.table(read(tmp_path, lines), STUDY).split("\n\n")
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    assert [cells(line)[0] for line in widths.splitlines()[2:]] == ["a", "a_x"]
    # 0.12 times the square of the distance to the nearest rate that ran
    off = [abs(known(size) - math.log2(0.01) + 0.5) % 1 - 0.5 for size in SIZES]
    head, _, a, a_x = map(cells, losses.splitlines())
    assert head == ["lowest mean loss", "32", "64", "128"]
    assert a == ["a", *(f"{3 + 0.12 * x**2:.4f}" for x in off)]
    assert a_x == ["a_x", "3.0000", "3.0000", "3.0000"]
    head, _, a = map(cells, depths.splitlines())
    assert head == ["best rate at n_layer", "1", "2", "4", "8", "power"]  # nothing to predict
    assert [float(cell.split()[0]) for cell in a[1:5]] == pytest.approx(
        [2 ** deep(layers) for layers in (1, 2, 4, 8)], rel=0.006)
    assert a[0] == "a" and a[5].startswith("+0.50 ± ")  # of 2 layers and more


def test_batches_compare_at_equal_steps(tmp_path):
    """Half of the batch for 10 steps stands beside the center; for its 10,000 tokens it does not."""
    noise, lines = iter(SHIFTS * 1000), []
    for batch, steps, best in ((1000, 10, 0.01), (500, 10, 0.015), (500, 20, 0.02)):
        made = tuning_runs("a", lambda size: math.log2(best), lambda: next(noise), sizes=(64,))
        for line in made:
            line["name"] = line["name"].replace("a_", f"a_{batch}_{steps}_")
            line["config"] |= dict(total_batch_tokens=batch, max_tokens=batch * steps)
            line["evals"] = [dict(line["evals"][-1], step=steps, tokens=batch * steps)]
        lines += made
    study = STUDY | dict(center=dict(total_batch_tokens=1000, steps=10))
    table = rates.table(read(tmp_path, lines), study).splitlines()
    assert table[0].startswith("| best rate at total_batch_tokens | 500 | 1,000 | power |")
    assert [float(cell.split()[0]) for cell in table[2].split("|")[2:4]] == [0.015, 0.01]
    assert not any("steps" in line for line in table)  # at 1,000 tokens a step all have 10


def test_a_rate_at_which_a_seed_diverges_is_no_neighbor_of_an_optimum(tmp_path):
    noise = iter(SHIFTS * 15)
    lines = tuning_runs("a", known, lambda: next(noise))
    best = lambda: [cell.split("[")[0].strip() for cell in rates.table(
        read(tmp_path, lines), STUDY).splitlines()[2].split("|")[2:5]]
    whole = best()
    [wild] = [line for line in lines if line["name"] == "tune_a_64n_embd0_lr0.02_seed1"]
    wild["evals"].pop()
    assert all(whole) and best() == [whole[0], "", whole[2]]
    for line in lines:  # at all rates of a size
        line["evals"][1:] = [] if "_128n" in line["name"] else line["evals"][1:]
    assert best() == [whole[0], "", ""]
    with pytest.raises(runs.Refused, match="the same two seeds"):
        rates.table(read(tmp_path, [line for line in lines if "seed0" in line["name"]]), STUDY)


def test_intervals_hold_the_truth_as_often_as_they_say(tmp_path):
    """Though seeds differ more than rates, and one has not run at the edges of the grid."""
    rng, inside, law = np.random.default_rng(0), [], []
    for _ in range(200):
        lines = tuning_runs("a", known, lambda: rng.normal(0, 0.01))
        for line in lines:
            line["evals"][-1]["val_loss"] += 0.3 * line["config"]["seed"]
        lines = [line for line in lines
                 if line["config"]["lr"] in GRID[1:-1] or not line["config"]["seed"]]
        found, _, within_95 = rates.followed(read(tmp_path, lines), STUDY)
        _, optima, (p, covariance) = found["n_embd"]["a"]
        inside += [abs(value - known(size)) < within_95 * error
                   for size, (value, error) in optima.items()]
        law.append(abs(p[0] + 0.5) < within_95 * math.sqrt(covariance[0, 0]))
    assert 0.91 < np.mean(inside) < 0.98
    assert 0.93 < np.mean(law) < 1  # chance misfits only widen it


def test_the_command_writes_table_and_figures(tmp_path):
    """Beside the results, as for every study, and with what its file declares."""
    page, noise = tmp_path / "page.md", iter(SHIFTS * 15)
    for folder in "experiments/studies", "experiments/results":
        (tmp_path / folder).mkdir(parents=True)
    for file in [*REPO.glob("*.py"), *REPO.glob("experiments/*.py")]:
        (tmp_path / file.relative_to(REPO)).symlink_to(file)
    (tmp_path / "experiments/compare.py").unlink()
    (tmp_path / "experiments/compare.py").write_text(
        (REPO / "experiments/compare.py").read_text())
    (tmp_path / "experiments/studies/known.py").write_text(f"globals().update({STUDY!r})")
    save(tmp_path / "experiments/results/known.jsonl",
         tuning_runs("a", known, lambda: next(noise)) + tuning_runs("b", known, sizes=(32,)))
    page.write_text("<!-- results: known -->\n<!-- /results -->\n")
    arguments = ("experiments/compare.py", "experiments/results/known.jsonl", "--readme", page)
    run(tmp_path, *arguments)
    assert "| a | " in page.read_text() and "-0.50" in page.read_text()
    run(tmp_path, *arguments, "--check")
    figures = {name: (tmp_path / f"experiments/results/known_{name}.svg").read_text()
               for name in ("rates", "optimum")}
    assert all(">n_embd<" in text for text in figures.values())
    assert all(">a<" in text and ">b<" not in text for text in figures.values())  # b has one size
    page.write_text(page.read_text().replace("-0.50", "-0.51"))
    assert "not what the runs say" in run(tmp_path, *arguments, "--check", status=1).err
