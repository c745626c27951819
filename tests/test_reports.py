"""What must stay true of reports: tables and figures over runs whose losses are known, with every
number computed here from its formula, and the smaller tools of experiments/."""
import gzip
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import t as student

from config import Config
from conftest import BATCH, REPO, Run, wait_for
from model import GPT, GPTConfig
from test_experiments import cells, complaint, mean_cell, run, start

compare, figures, runs = map(importlib.import_module, ("compare", "figures", "runs"))
FREE = dict(optimizer="sf_normuon", schedule="constant")
SCHEDULED = dict(optimizer="adamw", schedule="cosine")
SPREAD = np.array([-0.03117, 0.04923, 0.00231, -0.01178])  # of four seeds


def a_run(name, losses, seconds=1.0, **knobs):
    """A line of a study's results. losses: by step, 1,000 tokens each."""
    config = asdict(Config(total_batch_tokens=1000, max_tokens=max(losses) * 1000, **knobs))
    evals = [dict(step=s, tokens=1000 * s, val_loss=loss, train_time_s=seconds * s)
             for s, loss in losses.items()]
    return dict(name=name, config=config, evals=evals, train=[], machine={})


def free_runs(name, losses, spread=SPREAD, **knobs):
    return [a_run(f"{name}_lr0.01_seed{seed}", {s: loss + d for s, loss in losses.items()},
                  seed=seed, **{**FREE, **knobs}) for seed, d in enumerate(spread)]


def scheduled_runs(name, losses, spread=SPREAD, **knobs):
    return [a_run(f"{name}_{step}x_lr0.01_seed{seed}", {step: loss + d}, seed=seed,
                  **{**SCHEDULED, **knobs})
            for step, loss in losses.items() for seed, d in enumerate(spread)]


def save(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def comparison(tmp_path, lines, study={}):
    return compare.Comparison(runs.read_runs([save(tmp_path / "known.jsonl", lines)]), study)


def as_folder(folder, line):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(line["config"]))
    save(folder / "log.jsonl", line["evals"])


def welch(a, b):
    """Difference, ends of the 95% interval, p: Welch (1947), Satterthwaite's degrees of freedom."""
    va, vb = (np.var(x, ddof=1) / len(x) for x in (a, b))
    df = (va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    difference, error = np.mean(a) - np.mean(b), math.sqrt(va + vb)
    half = student.ppf(0.975, df) * error
    p = 2 * student.sf(abs(difference) / error, df)
    return difference, difference - half, difference + half, p


def fraction(curve, other, h):
    """Where the difference and the two ends of its interval cross 0, on a logarithmic axis."""
    ends = np.array([welch(losses, other)[:3] for losses in curve.values()])
    steps = np.log([*curve])
    at = [math.exp(np.interp(0, column[::-1], steps[::-1])) / h for column in ends.T]
    return "{:.2f} [{:.2f}, {:.2f}]".format(*at)


# ---- tables

def test_tables_are_what_the_runs_say(tmp_path):
    adamw, sf = {10: 3.0, 20: 2.5}, {5: 3.2, 10: 2.8, 20: 2.4}
    normuon, narrow = {10: 3.1, 20: 2.6}, SPREAD / 2
    tuned = a_run("tune_adamw_10x_c1_lr0.02_seed100", {10: 1.0}, **SCHEDULED)  # in no mean
    text = compare.tables(comparison(tmp_path, [
        *scheduled_runs("adamw", adamw), tuned, *free_runs("sf", sf, narrow, eval_tokens=99),
        *scheduled_runs("normuon", normuon, optimizer="normuon"),
        *free_runs("fast", {5: 2.5, 10: 2.45, 20: 2.41}, narrow)]), target=2.6)
    of = {"adamw": {h: adamw[h] + SPREAD for h in adamw}, "sf": {s: sf[s] + narrow for s in sf},
          "normuon": {h: normuon[h] + SPREAD for h in normuon}}
    for label, losses in of.items():
        assert cells(text, label) == [mean_cell(losses[h]) for h in (10, 20)]
    assert [line.split(" | ")[0] for line in text.splitlines()[4:8]] == [
        "| sf", "| fast", "| adamw", "| normuon"]  # best first
    for label, rival in ("sf", "adamw"), ("normuon", "adamw"), ("sf", "normuon"):
        assert cells(text, label, f"Minus {rival}") == ["{:+.4f} [{:+.4f}, {:+.4f}]".format(
            *welch(of[label][h], of[rival][h])) for h in (10, 20)]
    tokens = "Tokens to the loss of adamw"
    assert cells(text, "sf", tokens) == [fraction(of["sf"], of["adamw"][h], h) for h in (10, 20)]
    assert cells(text, "normuon", tokens) == [
        fraction(of["normuon"], of["adamw"][10], 10), "> 1.00"]
    assert cells(text, "fast", tokens)[0] == "< 0.50"  # ahead at its first evaluation already
    steps = [10 + 10 * (2.8 + d - 2.6) / (2.8 - 2.4) for d in narrow]
    target = "To a validation loss of 2.6"
    assert cells(text, "sf", target) == [
        f"{np.mean(steps):.0f}", f"{1000 * np.mean(steps):,.0f}", f"{np.mean(steps):.0f}", "4 of 4"]
    there = [20 for d in SPREAD if 2.6 + d <= 2.6]
    assert cells(text, "normuon", target) == ["20", "20,000", "20", f"{len(there)} of 4"]
    assert "different text: these losses do not compare" in text


def test_claims_are_corrected_by_holm_and_judged_by_the_margin(tmp_path):
    spread = SPREAD / 10
    losses = {"base": 3 + spread, "lower": 2.8 + spread, "higher": 3.3 + SPREAD,
              "equal": 3.002 + spread[::-1], "undecided": 2.95 + 8 * SPREAD,
              "almost": 2.93 + 1.2 * SPREAD, "two": [2.0, 2.1023]}
    lines = [line for name, values in losses.items()
             for line in free_runs(name, {10: 0.0}, values)]
    study = dict(tokens=5000, margin=0.02,
                 claims=[(name, "base", 2) for name in (*list(losses)[1:], "missing")])
    study["claims"].append(("base", "almost", 2))  # the same p again: Holm's never fall
    text = compare.claims(comparison(tmp_path, lines, study))
    raw = {name: welch(losses[name], losses["base"]) for name in list(losses)[1:6]}
    ps = {**{name: values[3] for name, values in raw.items()}, "two": 1.0, "missing": 1.0}
    ps["again"] = ps["almost"]
    adjusted = {name: max(min(1.0, p * sum(q >= p for q in ps.values()))
                          for p in ps.values() if p <= ps[name]) for name in ps}
    assert ps["almost"] < 0.05 < adjusted["almost"]
    for name, values in raw.items():
        verdict = {"almost": "undecided"}.get(name, name)
        assert cells(text, f"{name} minus base, 2x", "±") == [
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*values), f"{adjusted[name]:.2g}", verdict]
    assert cells(text, "base minus almost, 2x", "±")[1] == f"{adjusted['almost']:.2g}"
    difference = np.mean(losses["two"]) - np.mean(losses["base"])
    assert cells(text, "two minus base, 2x", "±") == [f"{difference:+.4f}", "", "fewer than 3 seeds"]
    assert cells(text, "missing minus base, 2x", "±") == ["", "", "fewer than 3 seeds"]
    assert "± 0.02" in text and "*" not in text  # no stars
    lines[-1]["evals"], lines[-1]["config"]["seed"] = [], 9  # a third seed of `two` diverged
    text = compare.claims(comparison(tmp_path, lines, study))
    assert cells(text, "two minus base, 2x (1 diverged)", "±")[2] == "fewer than 3 seeds"


def test_notes_name_what_the_data_does_not_carry_a_line_each(tmp_path):
    lines = [*scheduled_runs("adamw", {10: 3.0}), a_run("lonely_lr0.1_seed0", {5: 2.9}, **FREE),
             *(a_run(f"more{i}_lr0.1_seed0", {10: 3.0}, **FREE) for i in range(5))]
    lines[4]["config"]["max_tokens"] = 10_000
    text = compare.tables(comparison(tmp_path, lines), None)
    assert sorted(text.partition("Notes:\n\n")[2].splitlines()) == [
        "- ended early: lonely_lr0.1_seed0 after 0.005M",
        "- not tuned here: adamw, more0, more1, more2 and 2 more",
        "- one seed, so no interval: more0, more1, more2, more3 and 1 more"]
    assert cells(text, "more0", "Minus adamw") == [f"{3 - np.mean(3 + SPREAD):+.4f}"]  # no interval


def test_two_runs_of_one_row_and_seed_are_refused(tmp_path):
    lines = [*free_runs("sf", {10: 2.8}), a_run("sf_lr0.02_seed0", {10: 2.7}, **FREE)]
    with pytest.raises(compare.Refused, match="sf_lr0.01_seed0 and sf_lr0.02_seed0 are both sf"):
        comparison(tmp_path, lines)


def test_a_run_without_a_schedule_is_read_at_the_lengths_that_its_study_declares(tmp_path):
    lines = [*free_runs("sf", {5: 3.2, 10: 2.9, 20: 2.8}), *scheduled_runs("adamw", {20: 3.0})]
    study = dict(tokens=5000, horizons=(1, 4, 8), headline={"sf": "ours", "adamw": "AdamW"})
    text = "\n" + compare.headline(comparison(tmp_path, lines, study))
    assert cells(text, "ours", "\n") == [mean_cell(loss + SPREAD) for loss in (3.2, 2.8)]
    assert cells(text, "AdamW", "\n") == ["", mean_cell(3.0 + SPREAD)]


def test_headline_names_rows_as_the_study_does_and_its_gain_over_the_best(tmp_path):
    sf, adamw, normuon, late = {5: 3.2, 10: 2.8}, {10: 3.0}, {5: 3.1, 10: 2.79}, {10: 2.7}
    words = {"sf": "ours", "adamw": "AdamW, tuned", "normuon": "NorMuon, tuned", "late": "again",
             "once": "one seed, so no rival"}
    lines = [*free_runs("sf", sf), *scheduled_runs("adamw", adamw),
             *scheduled_runs("normuon", normuon, optimizer="normuon"),
             *scheduled_runs("late", late, optimizer="normuon"),
             *scheduled_runs("once", {10: 2.5}, SPREAD[:1], optimizer="normuon")]
    c = comparison(tmp_path, lines, dict(headline=words))
    text = "\n" + compare.headline(c)
    assert cells(text, "ours", "\n") == [mean_cell(3.2 + SPREAD), mean_cell(2.8 + SPREAD)]
    assert cells(text, "again", "\n") == ["", mean_cell(2.7 + SPREAD)]
    assert cells(text, "fraction of AdamW's tokens that ours needs to reach its loss", "\n") == [
        "", fraction({s: loss + SPREAD for s, loss in sf.items()}, 3.0 + SPREAD, 10)]
    gains = [welch(ours + SPREAD, other + SPREAD) for ours, other in ((3.2, 3.1), (2.8, 2.7))]
    assert cells(text, "ours minus NorMuon", "\n") == [
        "{:+.4f} [{:+.4f}, {:+.4f}]".format(*gain) for gain in gains]
    points = figures.differences(c)  # to the same rivals
    assert [*points] == ["ours", "AdamW, tuned"]
    np.testing.assert_allclose([values for _, values in points["ours"]], gains)
    none_yet = comparison(tmp_path, lines, dict(headline={"later": "not run yet"}))
    assert compare.headline(none_yet).count("\n") == 2


def test_only_the_text_between_markers_is_rewritten(tmp_path, capsys):
    page, texts = tmp_path / "page.md", {"a": "1\n", "a headline": "2\n"}
    block = "<!-- results: {} -->\n{}\n<!-- /results -->\n"
    page.write_text(block.format("a headline", "old") + "x\n" + block.format("b", "stays"))
    compare.rewrite(page, texts, check=False)
    new = block.format("a headline", "2") + "x\n" + block.format("b", "stays")
    assert page.read_text() == new and not capsys.readouterr().out
    compare.rewrite(page, texts, check=True)
    with pytest.raises(SystemExit, match="its tables of a are not what the runs say"):
        compare.rewrite(page, {"a": "", "a headline": "3\n"}, check=True)
    assert page.read_text() == new
    page.write_text("no markers\n")
    compare.rewrite(page, texts, check=False)
    assert "page.md has no <!-- results: a -->" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="page.md has no <!-- results: a -->"):
        compare.rewrite(page, texts, check=True)
    assert page.read_text() == "no markers\n"


def test_folders_of_runs_are_read_and_named(tmp_path):
    for seed, loss in enumerate((3.0, 3.2)):
        as_folder(tmp_path / f"runs/mine_seed{seed}", a_run("", {10: loss}, seed=seed, **SCHEDULED))
    as_folder(tmp_path / "runs/wider", a_run("", {10: 2.0}, n_embd=1024, **SCHEDULED))
    found = compare.compare([tmp_path / "runs"], {})
    text = compare.report(found, None)
    assert cells(text, "AdamW, mine") == [mean_cell([3.0, 3.2])]
    assert text.count("Validation loss") == 2 and "width 1024" in text  # a table for each size
    out = run(tmp_path, REPO / "experiments/compare.py", "runs", "--target=2.5").out
    assert cells(out, "AdamW, mine", "of 2.5") == ["not reached", "", "", "0 of 2"]
    wide = out.partition("width 1024")[2]
    assert cells(wide, "AdamW, wider", "of 2.5") == ["10", "10,000", "10", "1 of 1"]


def test_runs_of_ones_own_that_differ_in_their_rate_are_rows_of_their_own(tmp_path):
    for lr in 0.01, 0.02:
        as_folder(tmp_path / f"runs/mine_lr{lr}", a_run("", {10: 3 + lr}, lr=lr, **FREE))
    as_folder(tmp_path / "runs/short", a_run("", {4: 3.0}, **SCHEDULED))
    text = compare.report(compare.compare([tmp_path / "runs"], {}), None)
    assert "- in no table: not evaluated at these lengths: mine_lr0.01, mine_lr0.02" in text
    shutil.rmtree(tmp_path / "runs/short")
    text = compare.report(compare.compare([tmp_path / "runs"], {}), None)
    for lr in 0.01, 0.02:
        assert cells(text, f"SF-NorMuon, mine_lr{lr}") == [f"{3 + lr:.4f} (1)"]


def test_the_committed_results_are_read(tmp_path):
    for file in (REPO / "experiments/results").glob("*.jsonl"):
        assert len(runs.read_runs([file])) == len(file.read_text().splitlines())


@pytest.mark.parametrize("arguments, words", [
    ("runs", "no runs in runs"), ("gone.jsonl", "no runs in gone.jsonl"),
    ("runs --check", "--check needs --readme"), ("runs --readme page.md", "--readme needs one"),
    ("--follow runs", "no log.jsonl"), ("--follow runs --target=3", "--follow draws"),
    ("noise", "noise is not a run's folder"), ("noise.jsonl", "noise.jsonl does not hold"),
    ("odd.jsonl", "odd.jsonl is not a run: KeyError: 'mine'"),
    ("good.jsonl --readme gone.md --check", "No such file or directory: 'gone.md'")])
def test_reports_on_nothing_are_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    as_folder(tmp_path / "noise", a_run("", {10: 3.0}))
    for name in "noise/log.jsonl", "noise.jsonl":
        (tmp_path / name).write_text("noise\n")
    save(tmp_path / "odd.jsonl", [a_run("a", {10: 3.0}, optimizer="mine")])
    save(tmp_path / "good.jsonl", [a_run("a", {10: 3.0})])
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments.split()])
    status_1 = any(name in arguments for name in ("noise", "odd", "gone.md"))
    with pytest.raises((OSError, runs.Unreadable) if status_1 else runs.Refused) as e:
        compare.main()
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "figures").exists()


def test_refusals_of_compare_and_bench_are_one_line(tmp_path):
    complaint(tmp_path, REPO / "experiments/compare.py", "--folow", ".", words="--folow")
    complaint(tmp_path, REPO / "experiments/bench.py", "steps", words="invalid choice: 'steps'")
    complaint(tmp_path, REPO / "experiments/bench.py", "step", "--rounds=0", words="--rounds must")


def test_the_report_ends_with_its_reader(tmp_path):
    as_folder(tmp_path / "runs/a", a_run("", {10: 3.0}, **SCHEDULED))
    process = start(tmp_path, REPO / "experiments/compare.py", "runs")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == -signal.SIGPIPE


# ---- figures

def test_rows_never_share_a_color(tmp_path):
    for n in range(1, 80):
        assert len({*figures.palette(n)}) == n
    for n in 3, 12:  # all are the same optimizer
        lines = [line for i in range(n) for line in free_runs(f"row{i}", {5: 3.0, 10: 2.9})]
        c = comparison(tmp_path, lines)
        [axis] = figures.loss(c, dict(zip(c.rows, figures.palette(n)))).axes
        assert len({line.get_color() for line in axis.lines}) == n
        assert {text.get_text() for text in axis.get_legend().get_texts()} == {*c.rows}


def test_the_figure_of_differences_shows_intervals_and_the_margin(tmp_path):
    lines = [*scheduled_runs("normuon", {10: 3.0, 20: 2.5}, optimizer="normuon"),
             *free_runs("sf", {10: 2.98, 20: 2.51}, SPREAD / 3)]
    c = comparison(tmp_path, lines, dict(margin=0.015))
    figure = figures.difference(c, dict(zip(c.rows, figures.palette(2))))
    [axis], h = figure.axes, [10_000, 20_000]
    found = [welch(a + SPREAD / 3, b + SPREAD) for a, b in ((2.98, 3.0), (2.51, 2.5))]
    [line] = [line for line in axis.lines if line.get_label() == "sf"]
    np.testing.assert_allclose(line.get_xydata(), [*zip(h, [f[0] for f in found])])
    band = axis.collections[0].get_paths()[0].vertices
    for x, (_, low, high, _) in zip(h, found):
        ends = [y for at, y in band if at == x]
        np.testing.assert_allclose([min(ends), max(ends)], [low, high])
    [margin] = axis.patches
    shaded = axis.transData.inverted().transform(margin.get_window_extent())
    np.testing.assert_allclose(shaded[:, 1], [-0.015, 0.015])
    # a panel for each study, a color for each of the rows by what the studies call them
    there = comparison(tmp_path, [*lines, *free_runs("new", {10: 3.1}), *free_runs("off", {10: 9})],
                       dict(headline={"new": "new", "normuon": "", "sf": "mine"}))
    c.study["headline"] = {"sf": "mine", "normuon": ""}
    c.panels = {"here": c, "there": there, "nothing": comparison(tmp_path, lines[:1])}
    here, there = figures.difference(c, {}).axes
    assert [axis.get_title() for axis in (here, there)] == ["here", "there"]
    shades = [{line.get_label(): line.get_color() for line in axis.lines[1:]}
              for axis in (here, there)]
    assert [*shades[0]] == ["mine"] and [*shades[1]] == ["new", "mine"]
    assert shades[1]["mine"] == shades[0]["mine"] != shades[1]["new"]
    c.panels = dict(reversed(c.panels.items()))  # the legend names what any panel shows
    legend = figures.difference(c, {}).axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["new", "mine"]


def test_variants_that_are_short_beside_other_runs_have_their_panel(tmp_path):
    lines = [*(a_run(f"{place}_seed0", {5: 3.1, 10: 3.0}, decay_at=place, **FREE)
               for place in "yz"), a_run("long_seed0", {1000: 2.0}, optimizer="sf_adamw")]
    c = comparison(tmp_path, lines)
    [axis] = figures.decay(c, dict(zip(c.rows, figures.palette(3)))).axes
    assert [[*line.get_ydata()] for line in axis.lines] == [[3.1, 3.0]] * 2


def test_figures_of_the_same_runs_are_the_same_files(tmp_path):
    lines = [line for at in "zy" for line in free_runs(f"decay_{at}", {5: 3, 10: 2.9}, decay_at=at)]
    lines += [*scheduled_runs("normuon", {10: 3.0}, optimizer="normuon", momentum=0.95),
              *free_runs("tune_decay_z", {10: 2.8}, SPREAD[:1])]
    for line in lines[:8]:
        for e in line["evals"]:
            e |= dict(rho=e["step"] / 9, alpha=0.1, lambda_rho=0.1, lambda_rho_predicted=0.2)
    c = comparison(tmp_path, lines, dict(headline={"decay_z": "ours"}))
    for prefix in "a/", "b/":
        figures.draw(c, f"{tmp_path}/{prefix}")
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / p).iterdir()} for p in "ab")
    assert a == b and all(text.rstrip().endswith(b"</svg>") for text in a.values())
    assert {*a} == {f"{name}.svg" for name in (
        "headline", "loss", "difference", "decay", "steady_state", "tuning", "seeds")}


# ---- watching runs

def test_follow_draws_a_run_until_it_ends(cwd):
    """Beside one that has ended. The training is real."""
    ended = Run(cwd, out_dir="ended").wait()
    going = Run(cwd, out_dir="going", max_tokens=150 * BATCH, eval_interval=50,
                checkpoint_interval=999)
    wait_for(lambda: going.step() > 2, "three steps", kill=going)
    os.kill(going.pid, signal.SIGSTOP)  # until it is drawn
    follow = start(cwd, REPO / "experiments/compare.py", "--follow", "going", "ended")
    svg = cwd / "going/curve.svg"
    wait_for(svg.exists, "a curve", kill=going)
    drawn = {svg.read_bytes()}
    os.kill(going.pid, signal.SIGCONT)
    while follow.poll() is None:
        drawn.add(svg.read_bytes())
        time.sleep(0.2)
    out, err = follow.communicate()
    going.wait()
    assert follow.returncode == 0 and "curve.svg" in out, err
    assert len(drawn) > 1 and all(d.rstrip().endswith(b"</svg>") for d in drawn)
    last = {k: v for e in going.log() for k, v in e.items()}
    assert (f"going, step 150, {150 * BATCH:,} tokens, loss at y {last['loss']:.4f}, validation "
            f"loss at x {last['val_loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s") in err
    assert f"ended, step 12, {12 * BATCH:,} tokens" in err
    assert not (ended.folder / "curve.svg").exists()


def test_follow_ends_at_ctrl_c(tmp_path):
    line = a_run("", {5: 3.0}, **FREE)
    line["config"]["max_tokens"] = 10_000
    as_folder(tmp_path / "a", line)
    follow = start(tmp_path, REPO / "experiments/compare.py", "--follow", "a")
    wait_for((tmp_path / "a/curve.svg").exists, "a curve")
    follow.send_signal(signal.SIGINT)
    _, err = follow.communicate(timeout=30)
    assert follow.returncode == 0 and "Traceback" not in err


# ---- the smaller tools

def test_peers_are_of_the_same_size_and_learn():
    import torch

    import peers
    c = GPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=64)
    idx = torch.arange(32).view(2, 16)
    size = sum(p.numel() for p in GPT(c).parameters())
    theirs, gpt2 = peers.hugging_face(c), peers.GPT2(c)
    assert sum(p.numel() for p in theirs.parameters()) == size
    assert abs(sum(p.numel() for p in gpt2.parameters()) / size - 1) < 0.1
    loss = gpt2(idx, idx)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in gpt2.parameters())


def test_scaling_counts_a_step(tmp_path):
    out = run(tmp_path, REPO / "experiments/scaling.py").out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| 125m", "| 7"))]
    assert [row[1] for row in rows] == ["1", "8", "64"] * 3
    flops = 6 * 123.6e6 + 12 * 12 * 768 * 1024 / 2  # a token's; half of the scores are masked
    milliseconds = 1e3 * 524288 * flops / (0.5 * 989e12)
    for row in rows[:3]:
        assert float(row[2]) == pytest.approx(milliseconds / int(row[1]), rel=0.1)


def test_corpora_take_the_documents_in_a_mixed_order(tmp_path):
    with tarfile.open(tmp_path / "linux.tar.xz", "w:xz") as tar:
        for name in "fs/a.c", "drivers/b.c", "mm/c.h", "mm/d.c", "net/e.c":
            member = tarfile.TarInfo(f"linux-6.1/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    entries = ["A\n one\n\n two", "B\n\u00e9"]
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress("\n\n".join(entries).encode("latin-1")))
    for name in "a.go", "b/c.go", "b/d.c":
        (tmp_path / "go" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "go" / name).write_text(name)
    (tmp_path / "go/folder.go").mkdir()  # Go's own tests have one
    sources = {"linux.tar.xz": ["fs/a.c", "mm/d.c", "net/e.c"], "gcide.dict.dz": entries,
               "go": ["a.go", "b/c.go"]}
    for source, texts in sources.items():
        command = [sys.executable, str(REPO / "experiments/corpora.py"), source, "out.jsonl"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        found = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").open()]
        assert sorted(found) == texts
    complaint(tmp_path, REPO / "experiments/corpora.py", "gone.dz", "x", words="gone.dz", status=1)
