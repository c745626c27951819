"""Runs a study: every method tuned alike, at every horizon, any number of runs at once.

    python experiments/sweep.py experiments/studies/settled.py --jobs=2
    python experiments/sweep.py experiments/studies/125m.py --nproc_per_node=8
    python experiments/sweep.py experiments/studies/settled.py --list       what is left to do

A study is a file of plain Python assignments:

    base          knobs of train.py that all runs share
    tokens        tokens of 1x; horizons: multiples of it
    seeds         seeds of the runs that are reported; tuning_seeds: others, for choosing
    tuning        knobs of the tuning runs only: eval_offset, for other validation text
    optimizers    {method: its knobs}. A list as lr is a grid of rates to choose from; `horizons`,
                  `seeds` and `draws` among the knobs are this method's own; a function as a
                  value is called with the rate
    draws, draw_seed, rungs    for methods with a space

and for compare.py, all optional:

    headline      {method, or study.method: its words}: the rows of the first table
    claims        (method, rival, horizon), ...; margin: below it two methods are called equal
    panels        {title: study} of the figure of differences
    center, ...   a study of rates over sizes: see rates.py

A method may have a `space`, {knob: a list of values, or (low, high) for a range on a log scale}; a
value that is a dict gives several knobs at once. Its `draws` configurations are drawn by
`draw_seed` and thinned by successive halving: all of them train to the first rung (a horizon), the
best third to the next one. A grid of rates grows by factors of 2 while its best is at its edge.

A scheduled method is tuned and run for each horizon: at a rung among what is left of its draws,
elsewhere on a grid of rates around the configuration of the horizon before. A method without a
schedule is run once to the longest horizon and read at each; its configuration is the one with the
lowest mean loss over its horizons (those up to the last rung, if drawn).

Runs are ordinary runs of train.py in runs/<study>/. A run that has ended becomes a line of
experiments/results/<study>.jsonl: name, config (every knob), evals and train (lines of its log, the
latter thinned), machine. What stands there is not run again. Tuning runs are named tune_... .
The same command goes on after any interruption.
"""
import argparse
import ctypes
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import lock
from plan import Plan, read_study
from runs import Refused, Unreadable, read_log, read_results, write_results

TRAIN_LINES = 32  # of each run are kept, at most


def keep(study, name: str) -> None:
    """Adds an ended run to the results; a run that went further replaces its line."""
    folder = study.runs / name
    lines = read_log(folder)
    train = [line for line in lines if "loss" in line]
    run = dict(name=name, config=json.loads((folder / "config.json").read_text()),
               evals=[line for line in lines if "val_loss" in line],
               train=train[:: math.ceil(len(train) / TRAIN_LINES) or 1], machine=machine())
    write_results(study.file, {**read_results(study.file), name: run})


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": gpus, "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__}


# ---- doing it

def start(study, run: str, knobs: dict, slot: int, jobs: int, processes: int) -> subprocess.Popen:
    threads = max(1, os.cpu_count() // (jobs * processes))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if jobs > 1 and torch.cuda.is_available():
        every = ",".join(map(str, range(torch.cuda.device_count())))
        devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(",")
        own = devices[slot * processes:(slot + 1) * processes]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["train.py", f"--out_dir=runs/{study.name}/{run}"]
    command += [f"--{key}={value}" for key, value in knobs.items()]
    (study.runs / run).mkdir(parents=True, exist_ok=True)
    with open(study.runs / run / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                stdout=output, stderr=output, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    if sys.platform == "linux":  # 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def trained(folder: Path) -> int:
    """Tokens, up to the last line of the log."""
    lines = read_log(folder)
    return lines[-1]["tokens"] if lines else 0


def work(study, jobs: int, processes: int) -> None:
    """Makes the runs that are left, until a failure or a signal."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))
    running = {}  # slot: (run, knobs, process)
    plan, before, failure = Plan(study), 0, None
    bar = tqdm(unit="tok", unit_scale=True, smoothing=0.02,
               mininterval=0.5 if sys.stderr.isatty() else 60)
    while not (failure or stop):
        for slot in range(jobs):
            busy = {run for run, *_ in running.values()}
            waiting = [(run, knobs) for run, knobs in plan.ready if run not in busy]
            if slot not in running and waiting:
                run, knobs = waiting[0]
                running[slot] = run, knobs, start(study, run, knobs, slot, jobs, processes)
        if not running:
            break
        time.sleep(1)
        tokens = sum(knobs["max_tokens"] for _, knobs in plan.later) + sum(
            max(0, knobs["max_tokens"] - trained(study.runs / run)) for run, knobs in plan.ready)
        bar.update(max(0, before - tokens))
        bar.total, before = bar.n + tokens, tokens
        bar.set_description(f"{len(plan.ready) + len(plan.later)} runs left", refresh=False)
        for slot, (run, knobs, process) in list(running.items()):
            if process.poll() is None or stop:
                continue
            del running[slot]
            output = (study.runs / run / "output.txt").read_text().strip()
            last = ([line for line in output.splitlines() if line.startswith("train.py: ")]
                    or output.splitlines() or [""])[-1]  # torchrun's own lines follow
            diverged = process.returncode and re.search(r"step \d+: .*loss .*stopped", last)
            ended = process.returncode == 0 and trained(study.runs / run) >= knobs["max_tokens"]
            if not (diverged or ended):
                failure = f"{run} ended with status {process.returncode}: {last}"
                break
            keep(study, run)
            loss = "diverged" if diverged else read_log(study.runs / run)[-1]["val_loss"]
            tqdm.write(f"{run}: {loss}")
            plan = Plan(study)
    for _, _, process in running.values():
        process.terminate()  # writes its checkpoint
    for _, _, process in running.values():
        process.wait()
    bar.close()
    if failure:
        sys.exit(f"sweep.py: {failure}")
    if stop:
        print("stopped: the same command goes on")
    else:
        print(f"the study is complete: {study.file.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # a usage error gets one line
    parser.add_argument("study")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at once, each with its share of the cores or GPUs")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes of each run")
    parser.add_argument("--list", action="store_true", help="print what is left to do and stop")
    args = parser.parse_args()
    study = read_study(args.study)
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
        plan = Plan(study)
        for run, _ in plan.ready:
            print(run)
        for title, knobs in plan.later:
            print(f"{title}, {knobs['max_tokens']} tokens, seed {knobs['seed']}: not chosen yet")
        return
    jobs, processes, gpus = args.jobs, args.nproc_per_node, torch.cuda.device_count()
    if min(jobs, processes) < 1 or 0 < gpus < jobs * processes:
        raise Refused(f"--jobs={jobs} times --nproc_per_node={processes} must be at least 1 and at "
                      f"most the number of GPUs, {gpus}")
    lock(study.runs, patience=0)
    others = {json.dumps(run["machine"]) for run in read_results(study.file).values()}
    if others - {json.dumps(machine())}:
        print(f"{study.file.relative_to(ROOT)} has runs of another machine: seconds do not compare")
    work(study, jobs, processes)


if __name__ == "__main__":
    try:
        main()
    except Refused as e:
        print(f"sweep.py: {e}", file=sys.stderr)
        sys.exit(2)
    except (OSError, Unreadable) as e:
        sys.exit(f"sweep.py: {e}")
