"""Runs a study: every optimizer, its rate tuned, at every horizon, any number of runs at once.

    python experiments/sweep.py experiments/studies/small.py --jobs=2
    python experiments/sweep.py experiments/studies/125m.py --nproc_per_node=8

A study is a file of plain Python assignments:

    base          knobs of train.py that all runs share
    tokens        of 1x; horizons: multiples of it
    seeds         that are reported; tuning_seeds: others, on which rates are chosen
    optimizers    {name: its knobs}. lr is a number, or a list to choose from. `horizons` and `seeds` among the knobs are
                  this optimizer's own.

What has a schedule is tuned and run for each horizon, with a grid around the best rate of the horizon before; what has
none is run once to the longest horizon and read at each, its rate chosen by the mean loss over them. A grid whose best
rate is at its edge grows by factors of 2. Runs are ordinary runs of train.py in runs/<study>/; when one has ended, its
config.json and log.jsonl (with fewer training lines) go to experiments/results/<study>/runs/, and what is there is not
run again. The same command goes on after any interruption.
"""
import argparse
import ctypes
import json
import math
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import lock
from data import write_atomically

TRAIN_LINES = 32  # kept of each run
WIDENINGS = 6  # of a grid, at most: a loss that does not depend on the rate would widen it forever


class Refused(Exception):
    """The command line or the study asks for what cannot be: exit status 2."""


def read_study(path: str) -> SimpleNamespace:
    try:
        study = SimpleNamespace(name=Path(path).stem, **runpy.run_path(path))
        for name, knobs in study.optimizers.items():
            study.optimizers[name] = {"horizons": study.horizons, "seeds": study.seeds, **study.base, **knobs}
            if set(study.optimizers[name]["seeds"]) & set(study.tuning_seeds):
                raise ValueError(f"{name}: rates must be chosen on other seeds than those reported")
    except FileNotFoundError:
        raise Refused(f"{path}: no such study")
    except Exception as e:
        raise Refused(f"{path} is not a study: {type(e).__name__}: {e}")
    study.results, study.runs = ROOT / "experiments/results" / study.name / "runs", ROOT / "runs" / study.name
    return study


# ---- what is to be done

def loss_at(study, run: str, max_tokens: int, tokens: list[int]) -> float | None:
    """Mean validation loss of an ended run over the given numbers of tokens, inf if it did not get there; None if it has
    not ended."""
    folder = study.results / run
    try:
        if json.loads((folder / "config.json").read_text())["max_tokens"] < max_tokens:
            return None
    except FileNotFoundError:
        return None
    losses = {line["tokens"]: line["val_loss"] for line in read_log(folder) if "val_loss" in line}
    return sum(losses.get(n, math.inf) for n in tokens) / len(tokens)


def remaining(study) -> list[tuple[str, dict]]:
    """The runs that have not ended, (name, knobs of train.py), those that can start first. Rates that are not known yet
    are None, and such runs cannot."""
    ready, later = [], []
    for name, knobs in study.optimizers.items():
        knobs = dict(knobs)
        horizons, seeds, rates = knobs.pop("horizons"), knobs.pop("seeds"), knobs.pop("lr")
        scheduled, grid = knobs.get("schedule", "constant") != "constant", rates
        for targets in [[h] for h in horizons] if scheduled else [horizons]:
            max_tokens = max(targets) * study.tokens
            title = f"{name}_{targets[0]}x" if scheduled else name

            def ask(rate, seed):
                """The loss of this run, which is put on the list if it is not known yet."""
                tuning = "tune_" * (seed in study.tuning_seeds)  # compare.py leaves these out of its means
                run = f"{tuning}{title}_lr{rate:g}_seed{seed}" if rate else ""
                loss = loss_at(study, run, max_tokens, [h * study.tokens for h in targets]) if rate else None
                if loss is None:
                    (ready if rate else later).append((run, {**knobs, "lr": rate, "seed": seed, "max_tokens": max_tokens}))
                return loss

            if isinstance(rates, (int, float)):
                rate = rates
            else:
                rate = choose(grid, lambda r: [ask(r, seed) for seed in study.tuning_seeds])
                grid = [rate / 2, rate, rate * 2] if rate else [None] * 3  # the next horizon starts from here
            for seed in seeds:
                ask(rate, seed)
    return ready + later


def choose(rates, losses_of) -> float | None:
    """The best rate of a grid that is widened until it is not at the edge, or None while a loss is not known."""
    losses = {rate: losses_of(rate) for rate in rates}
    while not any(None in ls for ls in losses.values()):
        best = min(losses, key=lambda rate: sum(losses[rate]))
        new = best / 2 if best == min(losses) else best * 2 if best == max(losses) else None
        if new is None or math.isinf(sum(losses[best])) or len(losses) == len(rates) + WIDENINGS:
            return best
        losses[new] = losses_of(new)


# ---- doing it

def start(study, run: str, knobs: dict, slot: int, jobs: int, processes: int) -> subprocess.Popen:
    environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // (jobs * processes))), **os.environ}
    if jobs > 1 and torch.cuda.is_available():
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices.split(",")[slot * processes:(slot + 1) * processes])
    (study.runs / run).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = (command if processes > 1 else [sys.executable]) + ["train.py", f"--out_dir=runs/{study.name}/{run}"]
    with open(study.runs / run / "output.txt", "w") as output:
        return subprocess.Popen(command + [f"--{key}={value}" for key, value in knobs.items()], cwd=ROOT, env=environment,
                                stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    if sys.platform == "linux":  # 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def read_log(folder: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        return []


def trained(folder: Path) -> int:
    """Tokens, up to the last line of the log."""
    lines = read_log(folder)
    return lines[-1]["tokens"] if lines else 0


def keep(study, run: str) -> None:
    """Copies what an ended run leaves to the results."""
    lines = read_log(study.runs / run)
    train = [line for line in lines if "loss" in line]
    kept = {line["step"] for line in train[:: max(1, len(train) // TRAIN_LINES)]}
    text = "".join(json.dumps(line) + "\n" for line in lines if "val_loss" in line or line["step"] in kept)
    (study.results / run).mkdir(parents=True, exist_ok=True)
    config = (study.runs / run / "config.json").read_bytes()
    write_atomically(study.results / run / "log.jsonl", lambda file: file.write(text.encode()))
    write_atomically(study.results / run / "config.json", lambda file: file.write(config))


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}


def work(study, jobs: int, processes: int) -> None:
    """Makes the runs that are left, until a failure or a signal."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))
    running = {}  # slot: (run, knobs, process)
    left, before, failure = remaining(study), 0, None
    bar = tqdm(unit="tok", unit_scale=True, smoothing=0.02, mininterval=0.5 if sys.stderr.isatty() else 60)
    while not (failure or stop):
        for slot in range(jobs):
            busy = {run for run, *_ in running.values()}
            waiting = [(run, knobs) for run, knobs in left if run and run not in busy]
            if slot not in running and waiting:
                running[slot] = *waiting[0], start(study, *waiting[0], slot, jobs, processes)
        if not running:
            break
        time.sleep(1)
        tokens = sum(max(0, knobs["max_tokens"] - trained(study.runs / run)) for run, knobs in left)
        bar.update(max(0, before - tokens))
        bar.total, before = bar.n + tokens, tokens
        bar.set_description(f"{len(left)} runs left", refresh=False)
        for slot, (run, knobs, process) in list(running.items()):
            if process.poll() is None or stop:
                continue
            del running[slot]
            output = (study.runs / run / "output.txt").read_text().strip()
            diverged = process.returncode and "stopped before" in output
            if not diverged and (process.returncode or trained(study.runs / run) < knobs["max_tokens"]):
                failure = f"{run} ended with status {process.returncode}: {output.splitlines()[-1] if output else ''}"
                break
            keep(study, run)
            tqdm.write(f"{run}: {'diverged' if diverged else read_log(study.runs / run)[-1]['val_loss']}")
            left = remaining(study)
    for _, _, process in running.values():
        process.terminate()  # writes its checkpoint
    for _, _, process in running.values():
        process.wait()
    bar.close()
    if failure:
        sys.exit(f"sweep.py: {failure}")
    print("stopped: the same command goes on" if stop else f"the study is complete: experiments/results/{study.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # what is asked wrongly gets one line
    parser.add_argument("study")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores or GPUs")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes of each run")
    parser.add_argument("--list", action="store_true", help="print what is left to do and stop")
    args = parser.parse_args()
    study = read_study(args.study)
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
        for run, knobs in remaining(study):
            print(run or f"{knobs['optimizer']}, {knobs['max_tokens']} tokens, seed {knobs['seed']}: rate not chosen yet")
        return
    if min(args.jobs, args.nproc_per_node) < 1 or 0 < torch.cuda.device_count() < args.jobs * args.nproc_per_node:
        raise Refused(f"--jobs={args.jobs} times --nproc_per_node={args.nproc_per_node} must be at least 1 and at most the "
                      f"number of GPUs, {torch.cuda.device_count()}")
    lock(study.runs)
    study.results.mkdir(parents=True, exist_ok=True)
    description = study.results.parent / "machine.json"
    if not description.exists():
        write_atomically(description, lambda file: file.write((json.dumps(machine(), indent=1) + "\n").encode()))
    elif json.loads(description.read_text()) != machine():
        print(f"this is not the machine of {description.relative_to(ROOT)}: seconds will not compare")

    work(study, args.jobs, args.nproc_per_node)


if __name__ == "__main__":
    try:
        main()
    except Refused as e:
        print(f"sweep.py: {e}", file=sys.stderr)
        sys.exit(2)
