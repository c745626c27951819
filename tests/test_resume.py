"""What must stay true of stopping and resuming: real processes, signals and files."""
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from conftest import (BATCH, LONG, SOAK, Run, alive, assert_same, assert_uninterrupted, children,
                      driver, torchrun, tree, wait_for, wait_for_end)


def test_resume_contract(cwd, reference):
    """What a finished run does when it is started again: says so, goes on, refuses, or starts anew
    and says so."""
    shutil.copytree(reference.folder, cwd / "run")
    before = tree(cwd)
    run = Run(cwd).wait()
    assert ("finished" in run.out and not run.err
            and {**tree(cwd), "run/.lock": b""} == {**before, "run/.lock": b""})
    for key, value in dict(n_layer=1, n_embd=64, optimizer="adamw", lr=0.01, seed=3,
                           total_batch_tokens=2 * BATCH, vocab_size=512,
                           betas=(0.8, 0.95), decay_at="y").items():
        Run(cwd, **{key: value}).wait(2).complaint(key, "ckpt.pt")
    assert {**tree(cwd), "run/.lock": b""} == {**before, "run/.lock": b""}
    shutil.move(cwd / "run", cwd / "moved")
    free = dict(out_dir="moved", max_tokens=14 * BATCH, eval_interval=7, log_interval=2,
                checkpoint_interval=5, batch_size=4, activation_checkpointing=True)
    run = Run(cwd, **free).wait()
    assert ("at step 12" in run.out and run.checkpoint()["step"] == 14
            and run.values("loss").keys() == {*range(1, 13), 14})
    longer = Run(cwd, max_tokens=14 * BATCH).wait()
    assert_same(run.checkpoint(), longer.checkpoint(), 1e-5)
    run = Run(cwd, max_tokens=2 * BATCH, resume=False).wait()
    assert re.search(r"replac.*run", run.out) and run.checkpoint()["step"] == 2 and run.step() == 2
    (run.folder / "ckpt.pt").unlink()
    (run.folder / "log.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    run = Run(cwd, max_tokens=2 * BATCH).wait()
    assert list(run.values("loss")) == [1, 2]


def test_log_is_cut(cwd, reference):
    """Lines after the checkpoint and a half-written one go, the others stay as they are."""
    run = Run(cwd, max_tokens=8 * BATCH).wait()
    log = run.folder / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{}\nnull\n{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    run = Run(cwd).wait()
    assert log.read_bytes().startswith(whole) and list(run.values("loss")) == list(range(1, 13))
    assert [e["step"] for e in run.log() if "loss" in e] == list(range(1, 13))
    assert_same(run.checkpoint(), reference.checkpoint())
    log.write_bytes(whole.rstrip(b"\n"))  # a line that lost its end of line is whole all the same
    run = Run(cwd, max_tokens=13 * BATCH).wait()
    assert run.step() == 13


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=SOAK)])
def test_kill(cwd, place, kills):
    """kill -9 at any moment, the same command again: in the end bitwise as if nothing had
    happened."""
    long = LONG | {"max_tokens": 30 * kills * BATCH}
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, whole = random.Random(seed), Run(place("whole"), **long)
    for _ in range(kills):
        run = Run(cwd, **long)
        target = run.step() + rng.randint(1, 28)
        wait_for(lambda: run.step() >= target or not run.running(), f"step {target}", kill=run)
        time.sleep(rng.random() * 0.1)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(-9)
    run = Run(cwd, **long).wait()
    assert_uninterrupted(run, whole.wait())


@pytest.mark.parametrize("processes, kills", [
    (1, 1), (2, 2), pytest.param(2, 20, marks=SOAK), pytest.param(3, 20, marks=SOAK)])
def test_kill_torchrun(cwd, place, processes, kills):
    """The same under torchrun, with one process or several: torchrun is killed first (its orphans
    end within 5 seconds) and then a worker."""
    long = LONG | {"max_tokens": 30 * kills * BATCH}
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, whole = random.Random(seed), Run(place("whole"), processes=processes, **long)
    for i in range(kills):
        run = Run(cwd, command=torchrun(processes), **long)
        target = run.step() + rng.randint(1, 28)
        wait_for(lambda: run.step() >= target or not run.running(), f"step {target}", kill=run)
        workers = children(run.pid)
        assert len(workers) == processes
        time.sleep(rng.random() * 0.1)
        os.kill(run.pid if i % 2 == 0 else rng.choice(workers), signal.SIGKILL)
        if i % 2 == 0:
            wait_for_end(workers, 5)
        run.wait((-9, 1))
        assert not any(map(alive, workers))
        assert 'train.py", line' not in run.err, run.err
    run = Run(cwd, command=torchrun(processes), **long).wait()
    assert_uninterrupted(run, whole.wait())


def test_early_end(cwd):
    """torchrun killed while its workers still import torch: they end too. Ctrl-C at that time: no
    traceback."""
    run = Run(cwd, command=torchrun(2), max_tokens=0)
    wait_for(lambda: len(children(run.pid)) == 2, "workers", kill=run)
    workers = children(run.pid)
    time.sleep(0.5)
    os.kill(run.pid, signal.SIGKILL)
    run.wait(-9)
    wait_for_end(workers, 30)
    assert not (cwd / "run").exists()
    run = Run(cwd, command=[sys.executable], max_tokens=0)
    wait_for(lambda: "torch" in Path(f"/proc/{run.pid}/maps").read_text(), "torch", kill=run)
    os.kill(run.pid, signal.SIGINT)
    run.wait(None)
    assert "Traceback" not in run.err and not (cwd / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_stop(cwd, place, number):
    """The step is finished and saved, exit status 0, and the same command goes on."""
    knobs = dict(max_tokens=0, checkpoint_interval=10**6)
    run = Run(cwd, command=[sys.executable], **knobs)
    wait_for(lambda: run.step() >= 5, "step 5", kill=run)
    os.kill(run.pid, number)
    if number != signal.SIGINT:  # a second one must not hurt
        os.kill(run.pid, number)
    step = run.wait().step()
    assert (run.checkpoint()["step"] == step and f"stopped after step {step}" in run.out
            and "goes on" in run.out)
    # saves an evaluated model
    short = Run(place("short"), **{**knobs, "max_tokens": step * BATCH}).wait()
    assert_same(run.checkpoint(), short.checkpoint(), 1e-5, ["model", "step"])
    end = dict(max_tokens=(step + 5) * BATCH, checkpoint_interval=10**6)
    run = Run(cwd, **end).wait()
    whole = Run(place("whole"), **end).wait()
    assert_same(run.checkpoint(), whole.checkpoint(), 1e-4, ["model", "step"])
    assert run.values("loss") == pytest.approx(whole.values("loss"), abs=2e-5)


def test_a_signal_to_the_group_spares_the_compilers(cwd):
    """torchrun and Ctrl-C send it to every process of the group, here in the first compilation."""
    run = Run(cwd, command=[sys.executable], env={"TORCHINDUCTOR_CACHE_DIR": str(cwd / "cache")},
              compile=True, max_tokens=0, checkpoint_interval=10**6)

    def compiling():
        with suppress(OSError):  # one has ended
            return any(b".main.cpp" in Path(f"/proc/{pid}/cmdline").read_bytes()
                       for pid in children(run.pid))

    wait_for(compiling, "a compiler", kill=run)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait().checkpoint()["step"] == 1


@pytest.mark.parametrize("what", ["terminal", "pipe"])
def test_output_that_has_gone_loses_no_work(cwd, what):
    """A closed window, which sends SIGHUP; and `| tee`, which the same Ctrl-C has ended."""
    window, inside = os.openpty()
    to = {"terminal": f"<> {os.ttyname(inside)} >&0", "pipe": "> >(head -c 1)"}[what]
    run = Run(cwd, command=["bash", "-c", f'exec "$0" "$@" {to} 2>&1', sys.executable],
              max_tokens=0, eval_interval=1, checkpoint_interval=10**6)
    wait_for(lambda: run.step() >= 5, "step 5", kill=run)
    os.close(inside)
    os.close(window)
    if what == "pipe":
        os.kill(run.pid, signal.SIGINT)
    step = run.wait().step()
    assert run.checkpoint()["step"] == step >= 5


def test_a_second_interrupt_ends_at_once(cwd):
    """Within an operation that takes minutes, where Python's own handlers would not be called; no
    checkpoint is harmed."""
    long = """
import torch
forward = torch.nn.Embedding.forward
def slow(self, idx):
    import ctypes
    if os.path.exists("slow"):
        print("sleeping", flush=True)
        for _ in range(100):  # a C function that is called again when a signal interrupts it, \
as a wait for a card
            ctypes.CDLL(None).usleep(10**6 - 1)
    return forward(self, idx)
torch.nn.Embedding.forward = slow
"""
    run = Run(cwd, command=[sys.executable, driver(cwd, long)], max_tokens=0, checkpoint_interval=2)
    wait_for(lambda: (cwd / "run/ckpt.pt").exists(), "a checkpoint", kill=run)
    (cwd / "slow").touch()
    wait_for(lambda: "sleeping" in (cwd / "stdout").read_text(), "the long step", kill=run)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.running()
    os.kill(run.pid, signal.SIGINT)
    wait_for(lambda: not run.running(), "the end", 5)
    run.wait(130)
    assert run.checkpoint()["step"] >= 2 and "Traceback" not in run.err


def test_a_run_under_nohup_stays_when_the_terminal_goes(cwd):
    run = Run(cwd, command=["nohup", sys.executable], max_tokens=0, checkpoint_interval=10**6)
    wait_for(lambda: run.step() >= 3, "step 3", kill=run)
    os.kill(run.pid, signal.SIGHUP)
    step = run.step()
    wait_for(lambda: run.step() >= step + 3, "steps after the signal", kill=run)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait().checkpoint()["step"] == run.step()


def test_data_is_known_by_its_shards(cwd, place, reference, data):
    """Another spelling and another place are the same data; other shards in the same place are
    not."""
    more = dict(max_tokens=16 * BATCH)
    whole = Run(place("whole"), **more)
    shutil.copytree(reference.folder, cwd / "run")
    shutil.copytree(data, cwd / "elsewhere")
    for data_dir, steps in (("./data/", 13), (cwd / "data", 14), ("elsewhere", 16)):
        run = Run(cwd, data_dir=data_dir, max_tokens=steps * BATCH).wait()
    assert "data_dir" not in str(run.log()[-1])
    assert_same(run.checkpoint(), whole.wait().checkpoint(), 1e-5)  # which was evaluated less often
    assert run.values("loss") == pytest.approx(whole.values("loss"), abs=1e-5)
    (cwd / "elsewhere/x_train_000001.bin").unlink()
    before = tree(cwd)
    Run(cwd, data_dir="elsewhere", max_tokens=20 * BATCH).wait(2).complaint(
        "elsewhere", "shards", "--change_data=True")
    assert tree(cwd) == before
    saved = run.checkpoint()
    del saved["shards"]  # an old checkpoint, whose data is known by the spelling of its place
    torch.save(saved, run.folder / "ckpt.pt")
    Run(cwd, max_tokens=17 * BATCH).wait(2).complaint("data", "--change_data=True")
    assert Run(cwd, data_dir="elsewhere", max_tokens=17 * BATCH).wait().checkpoint()["step"] == 17


def test_an_older_state_is_completed_or_refused(cwd, place, reference):
    """What was added to the groups since is filled in where its meaning is certain; another
    optimizer's state is refused."""
    more = dict(max_tokens=16 * BATCH)
    whole = Run(place("whole"), **more)
    shutil.copytree(reference.folder, cwd / "run")
    saved = reference.checkpoint()
    for group in saved["optimizer"]["param_groups"]:
        del group["averaging_power"], group["beta_power"], group["beta"]
    for key in ("eval_offset", "sf_beta"):
        del saved["config"][key]
    torch.save(saved, cwd / "run/ckpt.pt")
    Run(cwd, **more, eval_offset=64).wait(2).complaint("eval_offset is 64", "made with 0")
    del saved["train_time_s"]  # which no reader needs
    torch.save(saved, cwd / "run/ckpt.pt")
    assert_same(Run(cwd, **more).wait().checkpoint(), whole.wait().checkpoint())
    groups = saved["optimizer"]["param_groups"]
    adamw = [{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1,
              "params": g["params"]} for g in groups]
    for state in (dict(muon={}, adamw={}), dict(saved["optimizer"], param_groups=adamw)):
        torch.save({**saved, "optimizer": state}, cwd / "run/ckpt.pt")
        before = tree(cwd)
        Run(cwd, max_tokens=20 * BATCH).wait(1).complaint(
            "run/ckpt.pt", "optimizer", "--resume=False")
        assert tree(cwd) == before


def test_a_file_system_without_locks(cwd):
    """As cluster file systems are: said once, and the run goes on."""
    refuse = """
import errno, fcntl
def flock(file, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
"""
    run = Run(cwd, command=[sys.executable, driver(cwd, refuse)], max_tokens=2 * BATCH).wait()
    assert (run.out.count("No locks available") == 1 and "finished" in run.out
            and run.checkpoint()["step"] == 2)


def test_a_system_without_fcntl(cwd, reference):
    """Such as Windows: help and evaluation need no lock, and training says in one line what it
    needs."""
    command = [sys.executable, driver(cwd, "sys.modules['fcntl'] = None")]
    assert "n_layer" in Run(cwd, "--help", plain=True, command=command).wait().out
    shutil.copytree(reference.folder, cwd / "run")
    assert "validation loss" in Run(cwd, eval_only=True, command=command).wait().out
    Run(cwd, command=command).wait(1).complaint("Linux or macOS")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stop_torchrun_and_resume_on_other_numbers(cwd, place, reference, number):
    """SIGTERM or SIGHUP to torchrun: both workers save and end by themselves. 1 and 3 processes go
    on from there."""
    run = Run(cwd, command=torchrun(2), max_tokens=0, checkpoint_interval=10**6)
    wait_for(lambda: run.step() >= 3, "step 3", kill=run)
    workers = children(run.pid)
    os.kill(run.pid, number)
    run.wait(1)
    step = run.step()
    assert (run.checkpoint()["step"] == step and f"stopped after step {step}" in run.out
            and not any(map(alive, workers)))
    assert 'train.py", line' not in run.err, run.err
    if number == signal.SIGHUP:
        return
    end = dict(max_tokens=(step + 6) * BATCH)
    whole = Run(place("whole"), **end)
    three = place("three")
    shutil.copytree(run.folder, three / "run")
    runs = [Run(cwd, **end), Run(three, processes=3, **end)]
    whole.wait()
    for run in runs:
        run.wait()
        assert run.values("loss") == pytest.approx(whole.values("loss"), abs=2e-5)
        assert_same(run.checkpoint(), whole.checkpoint(), 1e-5)


def test_two_runs_in_one_folder(background):
    """The second is refused after a wait, and the first does not notice."""
    first, second = background["first"], background["second"]
    second.wait((1, 2)).complaint("run")
    assert json.loads((first.folder / "config.json").read_text())["lr"] == 0.02 and first.running()
    os.kill(first.pid, signal.SIGTERM)
    os.kill(first.pid, signal.SIGCONT)
    step = first.wait().step()
    assert (first.checkpoint()["step"] == step
            and list(first.values("loss")) == list(range(1, step + 1)))


@pytest.mark.parametrize("damage", [
    "truncated", "empty", "noise", "other", "names", "groups", "folder"])
def test_damaged_checkpoint(cwd, reference, damage):
    """One line, and nothing is touched; --resume=False goes over it."""
    (cwd / "run").mkdir()
    path, whole = cwd / "run/ckpt.pt", (reference.folder / "ckpt.pt").read_bytes()
    if damage == "other":
        torch.save({"model": {}, "config": 3, "optimizer": {}, "step": 1, "train_time_s": 1.0},
                   path)
    elif damage == "names":
        saved = reference.checkpoint()
        torch.save({**saved, "model": {f"_orig_mod.{name}": value
                                       for name, value in saved["model"].items()}}, path)
    elif damage == "groups":
        saved = reference.checkpoint()
        groups = saved["optimizer"]["param_groups"][:1]
        torch.save({**saved, "optimizer": {**saved["optimizer"], "param_groups": groups}}, path)
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"truncated": whole[:-len(whole) // 3], "empty": b"",
                          "noise": random.Random(0).randbytes(99999)}[damage])
    (cwd / "run/log.jsonl").write_text('{"step": 1}\n')
    before = tree(cwd)
    Run(cwd).wait(1).complaint("run/ckpt.pt", "--resume=False")
    assert {k: v for k, v in tree(cwd).items() if k != "run/.lock"} == before
    if damage != "folder":
        assert Run(cwd, max_tokens=BATCH, resume=False).wait().checkpoint()["step"] == 1


def test_data_made_anew(cwd, reference, tokens):
    """Resuming over shards with another vocabulary is one line too."""
    shutil.copytree(reference.folder, cwd / "run")
    (cwd / "data").unlink()
    shutil.copytree(reference.cwd / "data", cwd / "data")
    (cwd / "data/meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 500}))
    Run(cwd, max_tokens=20 * BATCH).wait((1, 2)).complaint("vocab")
