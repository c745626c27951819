"""What must stay true of experiments/: a real study in a copy of the repository, and reports on runs with known figures."""
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import write_shard

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "experiments"))
compare, sweep = importlib.import_module("compare"), importlib.import_module("sweep")

STUDY = '''
base = dict(data_dir="data", n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, total_batch_tokens=32, vocab_size=320,
            warmup_steps=2, eval_interval=2, eval_tokens=64, log_interval=1, device="cpu", compile=False, checkpoint_interval=5)
tokens, horizons, seeds, tuning_seeds = 4 * 32, (1, 2), (0, 1), (100,)
optimizers = {
    "adamw": dict(optimizer="adamw", schedule="linear", lr=[0.01, 0.02]),
    "sf": dict(optimizer="sf_normuon", lr=0.01),
}
'''


def python(cwd, *arguments):
    return [sys.executable, *map(str, arguments)], dict(cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                                        env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(cwd, *arguments, timeout=240):
    command, options = python(cwd, *arguments)
    return subprocess.run(command, timeout=timeout, **options)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without its results, with data that can be learnt and a tiny study."""
    root = tmp_path_factory.mktemp("repository")
    for file in REPO.glob("*.py"):
        shutil.copy(file, root)
    (root / "experiments/studies").mkdir(parents=True)
    for file in (REPO / "experiments").glob("*.py"):
        shutil.copy(file, root / "experiments")
    (root / "data").mkdir()
    tokens = np.arange(4000) * 7 % 64
    write_shard(root / "data/x_train_000000.bin", tokens)
    write_shard(root / "data/x_val_000000.bin", tokens[:400])
    (root / "data/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    (root / "experiments/studies/tiny.py").write_text(STUDY)
    return root


def alive(root):
    """Processes of train.py that write below the copy."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"train.py" in (entry / "cmdline").read_bytes() and os.readlink(entry / "cwd") == str(root):
                found.append(entry.name)
        except OSError:
            pass
    return found


def test_a_study_from_start_to_report(copy):
    """Killed with -9 in the middle; goes on, tunes, widens, ends; a second start has nothing to do; the report agrees."""
    results, readme = copy / "experiments/results/tiny", copy / "README.md"
    command, options = python(copy, "experiments/sweep.py", "experiments/studies/tiny.py", "--jobs=2")
    first = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 120
    while len(list(results.glob("runs/*/config.json"))) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    first.kill()
    first.communicate()
    ended = [p.parent for p in results.glob("runs/*/config.json")]  # written last: the kill may come between two files
    early = {p: (p / "log.jsonl").stat().st_mtime_ns for p in ended}
    assert early
    if sys.platform == "linux":  # its runs do not outlive it
        deadline = time.monotonic() + 20
        while alive(copy) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not alive(copy)

    second = run(copy, "experiments/sweep.py", "experiments/studies/tiny.py", "--jobs=2")
    assert second.returncode == 0, second.stderr
    assert "complete" in second.stdout
    assert {p: (p / "log.jsonl").stat().st_mtime_ns for p in early} == early  # not run again
    names = sorted(p.name for p in results.glob("runs/*"))
    rates = [float(n.split("_lr")[1].split("_")[0]) for n in names if n.startswith("tune_adamw_1x")]
    losses = {rate: final_loss(results / f"runs/tune_adamw_1x_lr{rate:g}_seed100") for rate in rates}
    best = min(losses, key=losses.get)
    assert len(rates) > 3 and min(rates) < best < max(rates)  # widened from 0.01, 0.02 until the best is inside
    assert all(math.isclose(b, 2 * a) for a, b in zip(sorted(rates), sorted(rates)[1:]))
    for seed in (0, 1):
        assert f"adamw_1x_lr{best:g}_seed{seed}" in names
        assert f"sf_lr0.01_seed{seed}" in names  # one run for both horizons
        config = json.loads((results / f"runs/sf_lr0.01_seed{seed}/config.json").read_text())
        assert config["max_tokens"] == 2 * 4 * 32 and config["seed"] == seed and config["n_embd"] == 16
    assert not [n for n in names if "seed0" in n and n.startswith("tune_")]
    assert {"cpu", "cores", "gpus", "torch"} <= json.loads((results / "machine.json").read_text()).keys()
    assert str(copy) not in "".join(p.read_text() for p in results.glob("**/*.json*"))

    third = run(copy, "experiments/sweep.py", "experiments/studies/tiny.py", "--list")
    assert third.returncode == 0 and third.stdout == ""

    readme.write_text("# T\n<!-- results: tiny -->\nold\n<!-- /results -->\nend\n")
    report = run(copy, "experiments/compare.py", "experiments/results/tiny", "--readme", "README.md")
    assert report.returncode == 0, report.stderr
    text = readme.read_text()
    assert "old" not in text and text.startswith("# T\n") and text.endswith("end\n")
    values = [final_loss(results / f"runs/adamw_1x_lr{best:g}_seed{seed}") for seed in (0, 1)]
    assert f"| AdamW linear | {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} (2) |" in text
    figures = {p.name for p in (results / "figures").glob("*")}
    assert {"fig1_loss_over_tokens.png", "fig1_loss_over_tokens.svg", "fig5_learning_rate.png", "fig6_adamw_sweep.svg",
            "fig4_steady_state.svg"} <= figures
    check = ["experiments/compare.py", "experiments/results/tiny", "--readme", "README.md", "--check"]
    assert run(copy, *check).returncode == 0
    readme.write_text(re.sub(r"\d\.\d{4} ±", "0.0001 ±", text, count=1))
    wrong = run(copy, *check)
    assert wrong.returncode == 1 and "tiny" in wrong.stderr and "Traceback" not in wrong.stderr
    readme.write_text("no markers\n")
    assert run(copy, *check).returncode == 0
    assert readme.read_text() == "no markers\n"


def final_line(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def final_loss(folder):
    return final_line(folder)["val_loss"]


def test_extending_an_anytime_run_goes_on_from_its_checkpoint(copy):
    study = STUDY.replace("horizons, seeds", "horizons, _").replace("(1, 2), (0, 1)", "(1,), 0") \
        + "optimizers = {'sf': dict(optimizers['sf'], seeds=(5,))}\nseeds = (5,)\n"
    path = copy / "experiments/studies/extended.py"
    path.write_text(study)
    assert run(copy, "experiments/sweep.py", path).returncode == 0
    log = copy / "experiments/results/extended/runs/sf_lr0.01_seed5/log.jsonl"
    before = log.read_text().splitlines()
    assert json.loads(before[-1])["step"] == 4
    path.write_text(study.replace("(1,)", "(1, 3)"))
    listed = run(copy, "experiments/sweep.py", path, "--list").stdout
    assert listed == "sf_lr0.01_seed5\n"
    assert run(copy, "experiments/sweep.py", path).returncode == 0
    after = log.read_text().splitlines()
    assert json.loads(after[-1])["step"] == 12
    assert "going on from" in (copy / "runs/extended/sf_lr0.01_seed5/output.txt").read_text()
    assert json.loads(before[0]) == json.loads(after[0])  # the same run, with times and all


@pytest.mark.parametrize("study, words", [
    (None, "no such study"), ("x = (", "not a study"), ("base = {}", "not a study"),
    (STUDY.replace("(100,)", "(1, 100)"), "other seeds")])
def test_a_study_that_cannot_be_run_is_one_line(copy, study, words):
    path = copy / "experiments/studies/wrong.py"
    path.unlink(missing_ok=True)
    if study is not None:
        path.write_text(study)
    result = run(copy, "experiments/sweep.py", path)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_run_that_fails_stops_the_study_with_its_line(copy):
    path = copy / "experiments/studies/failing.py"
    path.write_text(STUDY.replace('"data"', '"nowhere"'))
    result = run(copy, "experiments/sweep.py", path, "--jobs=2")
    assert result.returncode == 1 and "no such data folder" in result.stderr and "Traceback" not in result.stderr
    assert not list((copy / "experiments/results/failing/runs").glob("*"))


def test_sigterm_leaves_checkpoints_and_goes_on(copy):
    path = copy / "experiments/studies/stopped.py"
    path.write_text(STUDY.replace("4 * 32, (1, 2), (0, 1)", "20_000 * 32, (1,), (0,)").replace("eval_interval=2", "eval_interval=10_000")
                    .replace("log_interval=1", "log_interval=5") + "optimizers = {'sf': optimizers['sf']}\n")
    command, options = python(copy, "experiments/sweep.py", path)
    process = subprocess.Popen(command, **options)
    log, deadline = copy / "runs/stopped/sf_lr0.01_seed0/log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "goes on" in out, err
    assert (log.parent / "ckpt.pt").exists() and not alive(copy)
    assert run(copy, "experiments/sweep.py", path, "--list").stdout == "sf_lr0.01_seed0\n"


# ---- choosing rates

@pytest.mark.parametrize("loss, best, tried", [
    (lambda r: abs(math.log2(r)), 1, {0.5, 1, 2}),
    (lambda r: abs(math.log2(r) - 3), 8, {0.5, 1, 2, 4, 8, 16}),
    (lambda r: abs(math.log2(r) + 2), 0.25, {2, 1, 0.5, 0.25, 0.125}),
    (lambda r: abs(math.log2(r)) if r < 2 else math.inf, 1, {0.5, 1, 2}),
    (lambda r: math.inf, 0.5, {0.5, 1, 2}),
    (lambda r: -r, 128, {0.5 * 2**k for k in range(9)})])
def test_choose_widens_until_the_best_is_inside(loss, best, tried):
    asked = set()

    def losses_of(rate):
        asked.add(rate)
        return [loss(rate), loss(rate)]

    assert sweep.choose([0.5, 1, 2], losses_of) == best
    assert asked == tried


def test_choose_waits_for_all_losses():
    assert sweep.choose([1, 2, 4], lambda rate: [0.0, None if rate == 4 else 1.0]) is None


# ---- the report, on runs with known figures

def write_run(folder, losses, config=None, seconds=1.0):
    """losses: {step: validation loss}, 1000 tokens a step."""
    folder.mkdir(parents=True)
    knobs = dict(optimizer="adamw", schedule="cosine", lr=0.01, seed=0, total_batch_tokens=1000,
                 max_tokens=max(losses) * 1000, eval_tokens=4096, out_dir=str(folder)) | (config or {})
    (folder / "config.json").write_text(json.dumps(knobs))
    (folder / "log.jsonl").write_text("".join(json.dumps(dict(
        step=s, tokens=1000 * s, val_loss=v, train_time_s=seconds * s)) + "\n" for s, v in losses.items()))


def paired_p(a, b):
    """Of three pairs: Student's t with two degrees of freedom has a closed form."""
    d = np.array(a) - np.array(b)
    t = abs(d.mean() / (d.std(ddof=1) / math.sqrt(len(d))))
    return 1 - t / math.sqrt(2 + t * t)


def test_table_and_tests_are_what_the_runs_say(tmp_path):
    adamw = {10: [3.0, 3.1, 2.9], 20: [2.5, 2.52, 2.45]}
    sf = {5: [3.2, 3.25, 3.15], 10: [2.8, 2.75, 2.82], 20: [2.4, 2.5, 2.44]}
    for seed in range(3):
        for h in (10, 20):
            write_run(tmp_path / f"adamw_{h}_{seed}", {h: adamw[h][seed]}, dict(seed=seed))
        write_run(tmp_path / f"sf_{seed}", {h: losses[seed] for h, losses in sf.items()},
                  dict(optimizer="sf_normuon", schedule="constant", seed=seed), seconds=2.0)
    for rate, loss in ((0.005, 3.3), (0.01, 3.0), (0.02, 3.1)):  # tuning runs: never in a mean
        for h in (10, 20):
            write_run(tmp_path / f"tune_adamw_{h}_{rate}", {h: loss}, dict(seed=100, lr=rate))
        write_run(tmp_path / f"tune_sf_{rate}", {10: loss, 20: loss - 1},
                  dict(optimizer="sf_normuon", schedule="constant", seed=100, lr=rate))
    text = compare.report([str(tmp_path)], target=2.6, out=None)
    assert f"| AdamW cosine | 3.0000 ± 0.1000 (3) | {np.mean(adamw[20]):.4f} ± {np.std(adamw[20], ddof=1):.4f} (3) | 0.01 |" in text
    assert f"| SF-NorMuon | {np.mean(sf[10]):.4f} ± {np.std(sf[10], ddof=1):.4f} (3) |" in text
    cells = []
    for h in (10, 20):
        p = paired_p(sf[h], adamw[h])
        cells.append(f"{np.mean(sf[h]) - np.mean(adamw[h]):+.4f} " + (f"(p {p:.1g})" if p < 0.1 else f"(p {p:.2f})"))
    assert f"| SF-NorMuon | {cells[0]} | {cells[1]} |" in text
    fractions = []
    for h in (10, 20):
        target = np.mean(adamw[h])
        steps = [np.interp(-target, [-sf[5][s], -sf[10][s], -sf[20][s]], [5, 10, 20]) for s in range(3)]
        fractions.append(f"{np.mean(steps) / h:.2f}" if all(sf[20][s] <= target for s in range(3)) else "> 1.00")
    assert f"| SF-NorMuon | {fractions[0]} | {fractions[1]} |" in text
    assert fractions[1] == "> 1.00"
    assert "| SF-NorMuon | 10 | 20 |" in text  # seconds of the fastest run, here a tuning run
    steps = [np.interp(-2.6, [-sf[10][s], -sf[20][s]], [10, 20]) for s in range(3)]
    assert f"| SF-NorMuon | {np.mean(steps):.0f} | {1000 * np.mean(steps):.0f} | {2 * np.mean(steps):.0f} | 3 of 3 |" in text
    assert "| AdamW cosine | 20 | 20000 | 20 | 3 of 3 |" in text
    assert "Notes" not in text


def test_claims_that_the_data_does_not_carry_are_named(tmp_path):
    write_run(tmp_path / "a", {10: 3.0})
    write_run(tmp_path / "b", {5: 2.9}, dict(optimizer="sf_normuon", schedule="constant", max_tokens=10_000, eval_tokens=8192))
    for rate, loss in ((0.01, 3.0), (0.02, 2.9)):
        write_run(tmp_path / f"tune_a{rate}", {10: loss}, dict(lr=rate, seed=100))
    notes = compare.report([str(tmp_path)], None, None).partition("Notes")[2]
    assert "the best rate is at the edge of those tried: AdamW cosine at 0.01M, 0.02" in notes
    assert "one seed, so no claim: AdamW cosine, lr 0.01" in notes
    assert "different numbers of tokens" in notes
    assert "ended early: b after 0.005M of 0.01M" in notes
    steady = {key: 0.1 for key in ("rho", "alpha", "lambda_rho", "lambda_rho_predicted")}  # one point makes no figure 4
    (tmp_path / "b/log.jsonl").write_text(json.dumps({**final_line(tmp_path / "b"), **steady}) + "\n")
    assert "SF-NorMuon" in compare.report([str(tmp_path)], None, tmp_path / "figures")
    assert not (tmp_path / "figures/fig4_steady_state.svg").exists()
    write_run(tmp_path / "c0", {10: 3.0}, dict(optimizer="normuon", lr=0.01))
    write_run(tmp_path / "c1", {10: 2.0}, dict(optimizer="normuon", lr=0.02))
    write_run(tmp_path / "c2", {10: 4.0}, dict(optimizer="normuon", lr=0.04))
    text = compare.report([str(tmp_path)], None, None)
    assert "| NorMuon cosine | 2.0000 (1) | 0.02 |" in text
    assert "the rate was chosen on the seeds that are reported: NorMuon cosine at 0.01M" in text


def test_a_diverged_rate_is_never_chosen_and_ablations_are_named(tmp_path):
    free = dict(optimizer="sf_normuon", schedule="constant")
    for rate, losses in ((0.01, {5: 3.0, 10: 2.9}), (0.02, {5: 2.8, 10: 2.7}), (0.04, {5: 1.0})):  # the last one ended early
        write_run(tmp_path / f"tune_{rate}", losses, dict(free, lr=rate, seed=100, max_tokens=10_000))
    write_run(tmp_path / "x", {5: 2.8, 10: 2.75}, dict(free, lr=0.02))
    write_run(tmp_path / "y", {5: 2.8, 10: 2.85}, dict(free, lr=0.02, decay_at="y"))
    text = compare.report([str(tmp_path)], None, None)
    assert "| SF-NorMuon | 2.7500 (1) | 0.02 |" in text.replace("2.8000 (1) | ", "")
    assert "SF-NorMuon, decay_at y" in text


def test_runs_of_different_sizes_get_tables_of_their_own(tmp_path):
    write_run(tmp_path / "a", {10: 3.0})
    write_run(tmp_path / "b", {10: 2.0}, dict(n_layer=2))
    assert compare.report([str(tmp_path)], None, None).count("Validation loss") == 2


def test_reports_on_nothing_are_one_line(tmp_path):
    result = run(REPO, "experiments/compare.py", "--folow", tmp_path)
    assert result.returncode == 2 and "--folow" in result.stderr and result.stderr.count("\n") == 1
    result = run(REPO, "experiments/compare.py", tmp_path)
    assert result.returncode == 2 and "no runs" in result.stderr and "Traceback" not in result.stderr
    write_run(tmp_path / "a", {10: 3.0})
    (tmp_path / "a/log.jsonl").write_text("noise\n")
    result = run(REPO, "experiments/compare.py", tmp_path)
    assert result.returncode == 1 and "a is not a run's folder" in result.stderr and "Traceback" not in result.stderr


def test_the_report_ends_with_its_reader(tmp_path):
    write_run(tmp_path / "a", {10: 3.0})
    command, options = python(tmp_path, REPO / "experiments/compare.py", tmp_path, "--out", tmp_path / "figures")
    process = subprocess.Popen(command, **options)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == -signal.SIGPIPE


# ---- watching runs

def test_follow_draws_a_run_until_it_ends(copy):
    """Beside one that has ended. The training is real."""
    knobs = ["train.py", "--data_dir=data", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2",
             "--total_batch_tokens=32", "--vocab_size=320", "--device=cpu", "--compile=False", "--eval_tokens=64", "--log_interval=1"]
    ended = run(copy, *knobs, "--out_dir=runs/ended", f"--max_tokens={32 * 10}", "--eval_interval=5")
    assert ended.returncode == 0, ended.stderr
    command, options = python(copy, *knobs, "--out_dir=runs/going", f"--max_tokens={32 * 1500}", "--eval_interval=100")
    going = subprocess.Popen(command, **options)
    log, deadline = copy / "runs/going/log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    going.send_signal(signal.SIGSTOP)  # until it is drawn
    command, options = python(copy, "experiments/compare.py", "--follow", "runs/going", "runs/ended")
    follow, drawn, svg = subprocess.Popen(command, **options), set(), copy / "runs/going/curve.svg"
    while follow.poll() is None:
        if svg.exists():
            going.send_signal(signal.SIGCONT)
            drawn.add(svg.read_bytes())
        time.sleep(0.2)
    out, err = follow.communicate()
    assert going.wait(60) == 0 and follow.returncode == 0, err
    assert len(drawn) > 1 and all(d.rstrip().endswith(b"</svg>") for d in drawn) and "curve.svg" in out
    line = next(e for e in map(json.loads, reversed(log.read_text().splitlines())) if "loss" in e)
    assert (f"going, step 1,500, 48,000 tokens, loss at y {line['loss']:.4f}, validation loss at x "
            f"{final_loss(log.parent):.4f}, {line['tokens_per_second']:,.0f} tokens/s") in err
    assert "ended, step 10, 320 tokens" in err and not (copy / "runs/ended/curve.svg").exists()


def test_follow_ends_at_ctrl_c(tmp_path):
    write_run(tmp_path / "a", {5: 3.0}, dict(max_tokens=10_000))
    command, options = python(REPO, "experiments/compare.py", "--follow", tmp_path / "a")
    follow = subprocess.Popen(command, **options)
    while not (tmp_path / "a/curve.svg").exists() and follow.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    follow.send_signal(signal.SIGINT)
    _, err = follow.communicate(timeout=30)
    assert follow.returncode == 0 and "Traceback" not in err and "validation loss at x 3.0000" in err


def test_follow_without_a_run_is_one_line(tmp_path):
    result = run(REPO, "experiments/compare.py", "--follow", tmp_path)
    assert result.returncode == 2 and "no log.jsonl" in result.stderr and result.stderr.count("\n") == 1
    result = run(REPO, "experiments/compare.py", "--follow", tmp_path, "--target=3")
    assert result.returncode == 2 and "--follow draws" in result.stderr
