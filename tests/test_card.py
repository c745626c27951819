"""Every program under a pretend card (tests/pretend_card.py), as a process of its own and to its
end."""
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from conftest import ENV, HANG, REPO, TINY, TRAIN, Run, assert_same
from baselines import OPTIMIZERS
from data import write_shard

CARD = str(REPO / "tests/pretend_card.py")
H100 = [sys.executable, CARD]
TINY_CARD = dict(device="cuda", n_layer=1, max_tokens=3 * TINY["total_batch_tokens"],
                 eval_tokens=64, eval_interval=99,
                 dtype="float32")  # bfloat16 is slow on most CPUs


STUDY = """
base = dict(data_dir="data", n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, \
total_batch_tokens=32,
            vocab_size=320, warmup_steps=2, eval_interval=2, eval_tokens=64, log_interval=1, \
compile=False)
tokens, horizons, seeds, tuning_seeds = 64, (1,), (0,), (100,)
optimizers = {"sf": dict(optimizer="sf_normuon", lr=0.01)}
"""


def torchrun_cards(processes, cards):
    return [sys.executable, CARD, f"--cards={cards}", "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}"]


def call(cwd, *argv, status=0, cards=1, **env):
    """A program on `cards` pretend cards, in the folder cwd; what it printed."""
    result = subprocess.run([*H100, f"--cards={cards}", *map(str, argv)], cwd=cwd,
                            env={**ENV, **env}, text=True, capture_output=True, timeout=HANG * 5)
    assert result.returncode == status, result.stderr[-3000:]
    return result


def cards_taken(folder):
    """{local rank: {numbers of the cards it put something on}} over all processes."""
    taken = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            rank, number = line.split()
            taken.setdefault(int(rank), set()).add(int(number))
    return taken


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "cards"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------- training

@pytest.fixture(scope="module")
def trained(place):
    """A run that others resume, evaluate, sample and export: the quickstart's shape, 20 steps on a
    card."""
    return Run(place("card"), command=H100, device="cuda", log_interval=1,
               max_tokens=20 * TINY["total_batch_tokens"], eval_interval=10).wait()


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_the_first_losses_on_a_card_are_the_cpus(place, trained, dtype, tolerance):
    knobs = dict(log_interval=1, max_tokens=20 * TINY["total_batch_tokens"],
                 eval_interval=10, dtype=dtype)
    cpu = Run(place("cpu"), **knobs).wait().values("loss")
    if dtype == "float32":
        card = Run(place("card32"), command=H100, device="cuda", **knobs).wait().values("loss")
    else:
        card = trained.values("loss")  # the default on a card
        assert json.loads((trained.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(card) == len(cpu) == 20
    assert max(abs(card[step] - cpu[step]) for step in cpu) < tolerance


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_quickstart_trains_on_a_card_with_every_optimizer(cwd, log, optimizer):
    run = Run(cwd, str(REPO / "configs/quickstart.py"), command=H100, optimizer=optimizer,
              env={"PRETEND_LOG": str(log)}, **TINY_CARD).wait()
    assert "NVIDIA H100 80GB HBM3" in run.out and run.step() == 3
    assert cards_taken(log) == {0: {0}}


def test_a_run_resumes_on_a_card_and_goes_on_as_without_a_stop(cwd, place):
    knobs = {**TINY_CARD, "checkpoint_interval": 2}
    whole = Run(place("whole"), command=H100, **knobs).wait()
    Run(cwd, command=H100, **{**knobs, "max_tokens": 2 * TINY["total_batch_tokens"]}).wait()
    resumed = Run(cwd, command=H100, **knobs).wait()
    assert "going on from" in resumed.out
    assert_same(resumed.checkpoint(), whole.checkpoint())


def test_two_processes_take_a_card_each(cwd, log, place):
    """The second simulated on one machine: cards 2 and 3 are visible, so that a number is not a
    rank."""
    knobs = {**TINY_CARD, "compile": False}
    two = Run(cwd, command=torchrun_cards(2, 2),
              env={"PRETEND_LOG": str(log), "CUDA_VISIBLE_DEVICES": "2,3"}, **knobs).wait()
    assert cards_taken(log) == {0: {2}, 1: {3}}
    one = Run(place("one_card"), command=H100, **knobs).wait()
    assert_same(two.checkpoint(), one.checkpoint(), tolerance=1e-4, parts=("model",))


# ---------------------------------------------------------------- the other programs

def test_evaluation_and_sampling_work_on_a_card(trained):
    evaluated = Run(trained.cwd, "--eval_only", command=H100, device="cuda",
                    eval_interval=10).wait()
    assert "validation loss" in evaluated.out
    assert call(trained.cwd, REPO / "sample.py", trained.folder, "--tokens=3",
                "--prompt=def").stdout.startswith("def")


def test_export_works_on_a_card(trained):
    pytest.importorskip("transformers")
    call(trained.cwd, REPO / "export_hf.py", trained.folder / "ckpt.pt", trained.cwd / "hf")
    assert (trained.cwd / "hf/config.json").exists()


@pytest.mark.parametrize("what", ["step", "train", "loop"])
def test_bench_works_on_a_card(tmp_path, what):
    out = call(tmp_path, REPO / "experiments/bench.py", what, "--size=quickstart", "--layers=1",
               "--rounds=1", "--tokens=32", "--dtype=float32", TORCH_COMPILE_DISABLE="1").stdout
    assert "NVIDIA H100 80GB HBM3" in out and "| --- |" in out


def test_memory_counts_on_a_card(tmp_path):
    out = call(tmp_path, REPO / "experiments/memory.py", REPO / "configs/125m_sf.py",
               "--n_layer=3").stdout
    assert "fits" in out


def test_a_study_runs_on_a_card(tmp_path):
    for name in ("experiments/studies", "data"):
        (tmp_path / name).mkdir(parents=True)
    for file in (*REPO.glob("*.py"), *(REPO / "experiments").glob("*.py")):
        shutil.copy(file, tmp_path / file.relative_to(REPO))
    for split in ("train", "val"):
        write_shard(tmp_path / f"data/x_{split}_000000.bin", np.arange(400) % 64)
    (tmp_path / "data/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    (tmp_path / "experiments/studies/tiny.py").write_text(STUDY)
    call(tmp_path, "experiments/sweep.py", "experiments/studies/tiny.py", "--jobs=2", cards=2)
    [line] = (tmp_path / "experiments/results/tiny.jsonl").read_text().splitlines()
    assert json.loads(line)["config"]["device"] == "cuda"


def test_hf_trainer_works_on_a_card(tmp_path):
    pytest.importorskip("accelerate")
    float(call(tmp_path, REPO / "examples/hf_trainer.py", "out", 2).stdout.split()[-1])


@pytest.mark.parametrize("nodes", [1, 2])
def test_fsdp2_takes_the_card_of_its_local_rank(tmp_path, log, nodes):
    """Two processes on one node with two cards, and on two nodes with a card each, numbered 0 on
    both."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {**ENV, "RANK": str(rank), "LOCAL_RANK": str(rank % (2 // nodes)),
                       "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "PRETEND_LOG": str(log)}
        processes.append(subprocess.Popen(
            [*H100, f"--cards={2 // nodes}", str(REPO / "examples/fsdp2.py"), "out", "2"],
            cwd=tmp_path, env=environment))
    assert [process.wait(HANG * 5) for process in processes] == [0, 0]
    assert cards_taken(log) == ({0: {0}} if nodes == 2 else {0: {0}, 1: {1}})


def test_the_acceptance_run_is_rehearsed(tmp_path):
    """tests/test_gpu.py from its first line to its last, smaller and on the pretend card."""
    out = call(REPO, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
               REPO / "tests/test_gpu.py", CARD_JSON=str(tmp_path / "card.json"), REHEARSAL="1",
               TORCH_COMPILE_DISABLE="1").stdout
    assert "11 passed, 2 skipped" in out
    rows = json.loads((tmp_path / "card.json").read_text())
    assert [row["size"] for row in rows] == ["125m", "772m"]


# ---------------------------------------------------------------- bad input

def complaint(result, *words, program="train.py"):
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{program}: "), result.stderr[-2000:]
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_a_card_that_is_not_there_is_one_line(cwd, trained):
    complaint(call(cwd, TRAIN, "--data_dir=data", "--device=cuda:7", status=2), "cuda:7")
    sampled = call(cwd, REPO / "sample.py", trained.folder, "--device=cuda:7", status=2)
    complaint(sampled, "cuda:7", program="sample.py")


def test_cuda_in_a_torch_without_it_is_one_line(cwd):
    result = subprocess.run([sys.executable, TRAIN, "--data_dir=data", "--device=cuda"], cwd=cwd,
                            env={**ENV, "CUDA_VISIBLE_DEVICES": ""}, text=True,
                            capture_output=True, timeout=HANG)
    assert result.returncode == 2
    complaint(result, "device", "cuda", "cpu")


def test_more_processes_than_cards_is_one_line(cwd):
    environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT="0")
    complaint(call(cwd, TRAIN, "--data_dir=data", "--device=cuda", status=2, **environment),
              "2 processes", "1 card")
