"""What must stay true of studies: a real one in a copy of the repository, and the plan of one whose
losses are known. test_reports.py is about what compare.py makes of the results."""
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from config import Config
from conftest import wait_for
from data import write_shard

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "experiments"))
plan, runs = map(importlib.import_module, ("plan", "runs"))

TINY = '''
base = dict(data_dir="data", n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2,
            total_batch_tokens=32, vocab_size=320, warmup_steps=2, eval_interval=2, eval_tokens=64,
            log_interval=1, device="cpu", compile=False)
tokens, horizons, seeds, tuning_seeds = 4 * 32, (1, 2), (0, 1), (100, 101)
tuning, rungs, draws = dict(eval_offset=64), (1, 2), 3
margin, claims, headline = 0.01, [("sf", "adamw", 2)], {"sf": "ours", "adamw": "AdamW, tuned"}
optimizers = {
    "adamw": dict(optimizer="adamw", schedule="linear", lr=0.01, horizons=(2,)),
    "wild": dict(optimizer="adamw", lr=1e30, seeds=(0,), horizons=(1,)),
    "sf": dict(optimizer="sf_normuon", space=dict(lr=(0.001, 0.1), decay_at=["z", "y"])),
}
'''
ONE = TINY + '''
seeds, tuning_seeds, claims = (5,), (), []
optimizers = {"sf": dict(optimizer="sf_normuon", lr=0.01)}
'''
DRAWN = '''
base = dict(total_batch_tokens=32, eval_tokens=64, eval_interval=4)
tokens, horizons, seeds, tuning_seeds = 128, (1, 4, 16), (0, 1), (100, 101)
tuning, rungs, draws, draw_seed = dict(eval_offset=64), (1, 4), 12, 2605
optimizers = {
    "anytime": dict(optimizer="sf_normuon", space=dict(lr=(0.006, 0.1), decay_at=["z", "y"])),
    "adamw": dict(optimizer="adamw", warmup_steps=9,
                  space=dict(lr=(0.003, 0.05), schedule=["cosine", "linear", "wsd"])),
    "grid": dict(optimizer="normuon", schedule="linear", lr=[0.01, 0.02], horizons=(1, 4),
                 weight_decay=lambda lr: 0.001 / lr),
}
'''


def start(cwd, *arguments):
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(cwd, *arguments, status=0):
    process = start(cwd, *arguments)
    process.out, process.err = process.communicate(timeout=600)
    assert process.returncode == status, process.err[-3000:]
    assert "Traceback" not in process.err, process.err[-3000:]
    return process


def complaint(cwd, *arguments, words, status=2):
    err = run(cwd, *arguments, status=status).err
    assert err.count("\n") == 1 and words in err, err


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without its results, with data that can be learned and a tiny study."""
    root = tmp_path_factory.mktemp("repository")
    (root / "experiments/studies").mkdir(parents=True)
    for file in [*REPO.glob("*.py"), *REPO.glob("experiments/*.py")]:
        shutil.copy(file, root / file.relative_to(REPO))
    (root / "data").mkdir()
    tokens = np.arange(4000) * 7 % 64
    write_shard(root / "data/x_train_000000.bin", tokens)
    write_shard(root / "data/x_val_000000.bin", tokens[:400])
    (root / "data/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return root


def cells(text, label, title="Validation loss"):
    """Of the row with this label in the first table after the title."""
    found = re.search(rf"^\| {re.escape(label)} \| (.*) \|$", text.partition(title)[2], re.M)
    return [cell.strip() for cell in found[1].split("|")]


def mean_cell(losses):
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    return f"{np.mean(losses):.4f} ± {error:.4f} ({len(losses)})"


def sweep(copy, name, text=None):
    """The arguments that run this study."""
    if text is not None:
        (copy / f"experiments/studies/{name}.py").write_text(text)
    return "experiments/sweep.py", f"experiments/studies/{name}.py"


def trainings(root):
    """Processes of train.py that run in the copy."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(entry / "cwd") == str(root)
            found += [entry.name] * (here and b"train.py" in (entry / "cmdline").read_bytes())
        except OSError:
            pass
    return found


# ---- real studies

def test_a_study_from_start_to_report(copy):
    """Killed with -9 in the middle. It goes on, thins its draws, ends; the report agrees."""
    results, page = copy / "experiments/results/tiny.jsonl", copy / "page.md"
    first = start(copy, *sweep(copy, "tiny", TINY), "--jobs=2")
    wait_for(lambda: results.exists() and len(results.read_text().splitlines()) > 1
             and trainings(copy) or first.poll() is not None, "two runs", 300)
    first.kill()
    first.communicate()
    early = runs.read_results(results)
    logs = {name: (copy / f"runs/tiny/{name}/log.jsonl").stat().st_mtime_ns for name in early}
    assert len(early) > 1
    if sys.platform == "linux":
        wait_for(lambda: not trainings(copy), "the end of the runs of a killed study", 20)
    listed = run(copy, *sweep(copy, "tiny"), "--list").out.splitlines()
    assert not {*early} & {*listed} and "sf, 256 tokens, seed 1: not chosen yet" in listed

    assert "the study is complete" in run(copy, *sweep(copy, "tiny"), "--jobs=2").out
    found = runs.read_results(results)
    assert {name: found[name] for name in early} == early
    for name, written in logs.items():  # not run again
        assert (copy / f"runs/tiny/{name}/log.jsonl").stat().st_mtime_ns == written
    assert len(results.read_text().splitlines()) == len(found)  # a line a run
    drawn = {f"c{i}": config for i, config in enumerate(
        plan.draw(dict(lr=(0.001, 0.1), decay_at=["z", "y"]), 3, "0 sf"))}
    name = lambda tag, seed: f"tune_sf_{tag}_lr{drawn[tag]['lr']:g}_seed{seed}"
    loss = lambda run, tokens: {e["tokens"]: e["val_loss"] for e in run["evals"]}[tokens]
    best = min(drawn, key=lambda tag: sum(loss(found[name(tag, s)], 128) for s in (100, 101)))
    reported = [f"sf_lr{drawn[best]['lr']:g}_seed{seed}" for seed in (0, 1)]
    assert {*found} == {*reported, "wild_lr1e+30_seed0", *map(name, drawn, [100] * 3),
                        *map(name, drawn, [101] * 3),
                        "adamw_2x_lr0.01_seed0", "adamw_2x_lr0.01_seed1"}
    for key, kept in found.items():
        tuned, tag = key.startswith("tune_"), key.split("_")[2]
        assert kept.keys() == {"name", "config", "evals", "train", "machine"} and kept["train"]
        assert kept["config"].keys() == asdict(Config()).keys() and kept["name"] == key
        assert kept["machine"].keys() == {"cpu", "cores", "gpus", "system", "python", "torch"}
        assert kept["config"]["eval_offset"] == 64 * tuned and kept["config"]["n_embd"] == 16
        if tuned:
            assert kept["config"]["decay_at"] == drawn[tag]["decay_at"]
            assert kept["evals"][-1]["tokens"] == (256 if tag == best else 128)  # the best third
            output = (copy / f"runs/tiny/{key}/output.txt").read_text()
            assert ("going on from" in output) == (tag == best)
    assert all(found[key]["config"]["decay_at"] == drawn[best]["decay_at"] for key in reported)
    assert found["wild_lr1e+30_seed0"]["evals"] == []  # it diverged, and the study went on
    assert str(copy) not in results.read_text()
    at_start = [found[key]["train"][0]["loss"] for key in (*reported, "adamw_2x_lr0.01_seed0")]
    assert at_start[0] == at_start[2] != at_start[1]  # the same weights and batch for each seed
    assert run(copy, *sweep(copy, "tiny"), "--list").out == ""

    marked = "<!-- results: tiny{} -->\nold\n<!-- /results -->\n"
    page.write_text(f"# T\n{marked.format('')}between\n{marked.format(' headline')}end\n")
    report = "experiments/compare.py", "experiments/results/tiny.jsonl", "--readme", "page.md"
    run(copy, *report)
    text = page.read_text()
    assert "old" not in text and text.startswith("# T\n") and text.endswith("end\n")
    assert "<!-- /results -->\nbetween\n<!-- results: tiny headline -->\n| validation loss" in text
    assert cells(text, "ours", "tiny headline") == cells(text, "sf")
    assert cells(text, "ours minus AdamW, tuned, 2x", "Declared claims")[2] == "fewer than 3 seeds"
    for row, keys in ("sf", reported), ("adamw", [f"adamw_2x_lr0.01_seed{s}" for s in (0, 1)]):
        assert cells(text, row)[-1] == mean_cell([loss(found[key], 256) for key in keys])
    assert "ended early: wild_lr1e+30_seed0 after" in text and "not tuned here: adamw\n" in text
    svgs = {file.name for file in (copy / "experiments/results").glob("*.svg")}
    assert svgs == {f"tiny_{name}.svg" for name in ("headline", "loss", "tuning", "steady_state")}
    run(copy, *report, "--check")
    wrong = re.sub(r"\d\.\d{4} ±", "0.0001 ±", text, count=1)
    page.write_text(wrong)
    complaint(copy, *report, "--check", words="tiny", status=1)
    assert page.read_text() == wrong


def test_extending_an_anytime_run_goes_on_from_its_checkpoint(copy):
    results, log = (copy / name for name in (
        "experiments/results/longer.jsonl", "runs/longer/sf_lr0.01_seed5/log.jsonl"))
    run(copy, *sweep(copy, "longer", ONE + "horizons = 1,\n"))
    before = log.read_text().splitlines()
    sweep(copy, "longer", ONE + "horizons = 1, 3\n")
    assert run(copy, *sweep(copy, "longer"), "--list").out == "sf_lr0.01_seed5\n"
    run(copy, *sweep(copy, "longer"))
    after = log.read_text().splitlines()
    assert after[:len(before)] == before  # the same run, with times and all
    [kept] = map(json.loads, results.read_text().splitlines())
    assert [e["tokens"] for e in kept["evals"]] == [64 * k for k in range(1, 7)]


def test_sigterm_leaves_checkpoints_and_a_second_sweep_is_refused(copy):
    text = ONE + "tokens, horizons = 32 * 20_000, (1,)\nbase |= dict(eval_interval=10**4)\n"
    process = start(copy, *sweep(copy, "stopped", text))
    log = copy / "runs/stopped/sf_lr0.01_seed5/log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 2, "three steps")
    complaint(copy, *sweep(copy, "stopped"), words="another run uses", status=1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on" in out, err
    assert (log.parent / "ckpt.pt").exists() and not trainings(copy)
    assert run(copy, *sweep(copy, "stopped"), "--list").out == "sf_lr0.01_seed5\n"


def test_a_run_that_fails_stops_the_study_with_its_line(copy):
    text = ONE + 'base |= dict(data_dir="nowhere")\n'
    process = run(copy, *sweep(copy, "failing", text), "--jobs=2", status=1)
    assert "sweep.py: sf_lr0.01_seed5 ended with status 2: train.py: " in process.err
    assert "nowhere" in process.err
    assert not (copy / "experiments/results/failing.jsonl").exists()


def test_a_run_that_diverges_under_torchrun_ends_and_the_study_goes_on(copy):
    text = ONE + 'optimizers = {"wild": dict(optimizer="adamw", lr=1e30, batch_size=1)}\n'
    run(copy, *sweep(copy, "diverging", text), "--nproc_per_node=2")
    [kept] = runs.read_results(copy / "experiments/results/diverging.jsonl").values()
    assert kept["evals"] == []


def test_results_that_are_noise_are_one_line_and_stay(copy):
    results = copy / "experiments/results/noise.jsonl"
    results.parent.mkdir(exist_ok=True)
    results.write_text("noise\n")
    complaint(copy, *sweep(copy, "noise", ONE), words="noise.jsonl does not hold", status=1)
    assert results.read_text() == "noise\n"


# ---- the plan of a study

@pytest.mark.parametrize("text, words", [
    (None, "no such study"), ("x = (", "not a study: SyntaxError"), ("base = {}", "not a study"),
    (TINY + "tuning_seeds = (1, 100)", "tuning_seeds must be other seeds"),
    (TINY + "tuning_seeds = (100,)", "at least two tuning_seeds"),
    (TINY + "tuning = dict(eval_offset=63)", "eval_offset beyond the reported text"),
    (TINY + "tuning = {}", "eval_offset beyond the reported text"),
    (TINY + "rungs = (2,)", "its first horizon must be the first of the rungs"),
    (TINY + "rungs, horizons = (1, 2), (2,)", "its first horizon must be the first of the rungs"),
    (TINY + "base['eval_interval'] = 3", "a multiple of total_batch_tokens times eval_interval"),
    (TINY + "optimizers['sf']['space'].pop('lr')", "lr must be"),
    (TINY + "optimizers['sf']['space'].pop('lr'); optimizers['sf']['lr'] = [0.1]", "lr must be"),
    (TINY + "optimizers['adamw']['lr'] = '0.01'", "lr must be"),
    (TINY + "optimizers['sf']['space']['lr'] = (0.0, 1.0)", "ZeroDivisionError"),
    (TINY + "claims = [('sf', 'adam', 2)]", "the claim ('sf', 'adam', 2) must name two methods"),
    (TINY + "claims = [('sf', 'wild', 2)]", "a horizon of both"),
    (TINY + "del margin", "claims need a margin")])
def test_a_study_that_cannot_be_run_is_one_line(tmp_path, text, words):
    if text:
        (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(runs.Refused, match=re.escape(words)) as e:
        plan.read_study(str(tmp_path / "wrong.py"))
    assert "\n" not in str(e.value) and "wrong.py" in str(e.value)


def test_draws_stay_the_same_and_spread():
    """A study that has begun depends on these very values, and on these names of its runs."""
    space = dict(lr=(0.006, 0.1), decay_at=["z", "y"], betas=[(0.9, 0.95), (0.8, 0.95)],
                 warmup=[dict(warmup_steps=k, eval_interval=k) for k in (1, 2, 3)])
    drawn = plan.draw(space, 12, "2605 anytime")
    assert drawn[0] == dict(lr=0.0134, decay_at="z", betas=(0.8, 0.95), warmup_steps=2,
                            eval_interval=2)
    assert [config["lr"] for config in drawn[:5]] == [0.0134, 0.00705, 0.0159, 0.0342, 0.0829]
    assert drawn == plan.draw(space, 12, "2605 anytime") != plan.draw(space, 12, "2606 anytime")
    for i, lr in enumerate(sorted(config["lr"] for config in drawn)):  # one in each twelfth
        assert i - 0.05 < 12 * math.log(lr / 0.006) / math.log(0.1 / 0.006) < i + 1.05
    for knob, n in ("decay_at", 2), ("betas", 2), ("warmup_steps", 3):
        values = [config[knob] for config in drawn]
        assert sorted(map(values.count, {*values})) == [12 // n] * n
    assert all(config["warmup_steps"] == config["eval_interval"] for config in drawn)


@pytest.fixture
def drawn_study(tmp_path, monkeypatch):
    """A study in tmp_path, and a function that ends all its runs with the given loss."""
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    (tmp_path / "drawn.py").write_text(DRAWN)
    (tmp_path / "experiments/results").mkdir(parents=True)
    study = plan.read_study(str(tmp_path / "drawn.py"))

    def end_all(loss):
        while todo := plan.Plan(study).ready:
            order = [(knobs["max_tokens"], knobs["seed"]) for _, knobs in todo]
            assert order == sorted(order)  # short runs first, then seed by seed
            results = runs.read_results(study.file)
            for name, knobs in todo:
                horizons = [h for h in (1, 4, 16) if 128 * h <= knobs["max_tokens"]]
                evals = [dict(step=4 * h, tokens=128 * h, val_loss=loss(name, knobs, h))
                         for h in horizons if loss(name, knobs, h) < math.inf]
                results[name] = dict(name=name, config={**asdict(Config()), **knobs}, train=[],
                                     evals=evals, machine={})
            study.file.write_text("".join(json.dumps(r) + "\n" for r in results.values()))
        assert not plan.Plan(study).later
        return runs.read_results(study.file)

    return study, end_all


OPTIMUM = {("sf_normuon", 1): 0.02, ("sf_normuon", 4): 0.01, ("sf_normuon", 16): 0.1,
           ("adamw", 1): 0.01, ("adamw", 4): 0.005, ("adamw", 16): 0.4,
           ("normuon", 1): 0.09, ("normuon", 4): 0.3}


def known_loss(name, knobs, h):
    """The nearer the rate to the optimum of the horizon, the lower. One seed alone misleads."""
    lr, seed, optimizer = knobs["lr"], knobs["seed"], knobs["optimizer"]
    if optimizer == "sf_normuon" and h == 4 and 0.0194 < lr < 0.0245:
        return math.inf  # diverges where it would have been the best
    return abs(math.log2(lr / OPTIMUM[optimizer, h])) / h + (seed - 100.5) * (1e4 * lr % 3)


def test_halving_and_rates_for_each_horizon(drawn_study):
    study, end_all = drawn_study
    found = end_all(known_loss)
    expected, twice = {}, (100, 101)  # name: tokens

    def add(title, lr, seeds, h):
        expected.update({f"{title}_lr{lr:g}_seed{seed}": 128 * h for seed in seeds})

    def best(configs, optimizer, *horizons):  # the tags or rates in order, without the seeds' part
        distance = lambda lr, h: known_loss("", dict(lr=lr, seed=100.5, optimizer=optimizer), h)
        return sorted(configs, key=lambda tag: sum(distance(configs[tag], h) for h in horizons))

    rates = {name: {f"c{i}": config["lr"] for i, config in enumerate(plan.draw(
        study.optimizers[name]["space"], 12, f"2605 {name}"))} for name in ("anytime", "adamw")}
    for tag, lr in rates["anytime"].items():
        add(f"tune_anytime_{tag}", lr, twice, 1)
    third = {tag: rates["anytime"][tag] for tag in best(rates["anytime"], "sf_normuon", 1)[:4]}
    for tag, lr in third.items():
        add(f"tune_anytime_{tag}", lr, twice, 4)
    winner = best(third, "sf_normuon", 1, 4)[0]  # it never sees its loss at 16x
    add("anytime", rates["anytime"][winner], (0, 1), 16)
    assert any(0.0194 < lr < 0.0245 for lr in third.values())
    assert winner != best(third, "sf_normuon", 4)[0]  # both rungs count

    for tag, lr in rates["adamw"].items():
        add(f"tune_adamw_1x_{tag}", lr, twice, 1)
    order = best(rates["adamw"], "adamw", 1)
    third = {tag: rates["adamw"][tag] for tag in order[:4]}
    for tag, lr in third.items():
        add(f"tune_adamw_4x_{tag}", lr, twice, 4)
    winner = best(third, "adamw", 4)[0]
    add("adamw_1x", rates["adamw"][order[0]], (0, 1), 1)
    add("adamw_4x", third[winner], (0, 1), 4)
    grid = [third[winner] * 2.0**k for k in range(-1, 9)]
    until = next(i for i, lr in enumerate(grid) if lr > 0.4)  # the optimum has one on both sides
    for lr in grid[:until + (grid[until] / 0.4 < 0.4 / grid[until - 1]) + 1]:
        add(f"tune_adamw_16x_{winner}", lr, twice, 16)
    last = min(grid, key=lambda lr: abs(math.log2(lr / 0.4)))
    add("adamw_16x", last, (0, 1), 16)

    for lr in (0.01, 0.02, 0.04, 0.08, 0.16):
        add("tune_grid_1x", lr, twice, 1)
    for lr in (0.04, 0.08, 0.16, 0.32, 0.64):
        add("tune_grid_4x", lr, twice, 4)
    add("grid_1x", 0.08, (0, 1), 1)
    add("grid_4x", 0.32, (0, 1), 4)
    assert {name: kept["config"]["max_tokens"] for name, kept in found.items()} == expected
    assert {kept["config"]["eval_offset"] for name, kept in found.items()
            if name.startswith("tune_")} == {64}
    assert found["grid_4x_lr0.32_seed0"]["config"]["weight_decay"] == 0.001 / 0.32
    config = found[f"adamw_16x_lr{last:g}_seed1"]["config"]  # the rest stays that of the draw
    assert config["schedule"] == found[f"tune_adamw_4x_{winner}_lr{third[winner]:g}_seed100"][
        "config"]["schedule"] and config["warmup_steps"] == 9 and config["eval_offset"] == 0


@pytest.mark.parametrize("change, knob", [
    (("warmup_steps=9", "warmup_steps=8"), "warmup_steps"), (("warmup_steps=9,", ""), "warmup_st"),
    (("eval_tokens=64", "eval_tokens=32"), "eval_tokens"),
    (("eval_offset=64", "eval_offset=96"), "eval_offset"),
    (('["cosine", "linear", "wsd"]', '["wsd", "cosine"]'), "schedule"),
    (("interval=4)\ntokens, horizons, seeds, tuning_seeds = 128",
      "interval=2)\ntokens, horizons, seeds, tuning_seeds = 64"), "max_tokens")])
def test_a_study_that_changed_is_refused(drawn_study, tmp_path, change, knob):
    study, end_all = drawn_study
    end_all(known_loss)
    (tmp_path / "drawn.py").write_text(DRAWN.replace(*change))
    with pytest.raises(runs.Refused, match=f"drawn.jsonl: .* has {knob}.*rename the method"):
        plan.Plan(plan.read_study(str(tmp_path / "drawn.py")))
    (tmp_path / "drawn.py").write_text(DRAWN + "base |= dict(compile=True, batch_size=1)\n")
    assert not plan.Plan(plan.read_study(str(tmp_path / "drawn.py"))).ready  # may change


def test_a_run_from_before_a_knob_existed_has_its_default(drawn_study, tmp_path):
    study, end_all = drawn_study
    results = end_all(known_loss)
    for run in results.values():
        del run["config"]["step_norm"]
    runs.write_results(study.file, results)
    assert not plan.Plan(study).ready
    (tmp_path / "drawn.py").write_text(DRAWN + 'base |= dict(step_norm="spectral")\n')
    with pytest.raises(runs.Refused, match="has step_norm rms, the study says spectral"):
        plan.Plan(plan.read_study(str(tmp_path / "drawn.py")))


@pytest.mark.parametrize("loss, best, tried", [
    (lambda r: abs(math.log2(r)), 1, {0.5, 1, 2}),
    (lambda r: abs(math.log2(r) - 3), 8, {0.5, 1, 2, 4, 8, 16}),
    (lambda r: abs(math.log2(r) + 2), 0.25, {2, 1, 0.5, 0.25, 0.125}),
    (lambda r: abs(math.log2(r)) if r < 2 else math.inf, 1, {0.5, 1, 2}),
    (lambda r: math.inf, 0.5, {0.5, 1, 2}),
    (lambda r: -r, 128, {0.5 * 2**k for k in range(9)}),
    (lambda r: None if r == 2 else 0.0, None, {0.5, 1, 2}),  # waits for all losses
    (lambda r: None if r == 4 else -r, None, {0.5, 1, 2, 4})])
def test_choose_widens_until_the_best_is_inside(loss, best, tried):
    asked = set()

    def score(rate):
        asked.add(rate)
        return loss(rate)

    assert plan.choose([0.5, 1, 2], score) == best
    assert asked == tried
