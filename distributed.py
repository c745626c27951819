"""What the processes of a run do together, and how each of them ends."""
import os
import re
import signal
import sys
import threading
import time

import torch.distributed as dist
from tqdm import tqdm

RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ.get(k, d)) for k, d in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


class Failure(Exception):
    """Ends the run with one line. status 2: asked wrongly; 1: failed while running. `local`: only this process knows."""

    def __init__(self, message: str, status: int = 1, local: bool = False):
        super().__init__(" ".join(str(message).split()))
        self.status, self.local = status, local


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def gather(value) -> list:
    """The values of all processes."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def together(function):
    """Calls it on every process and returns its result; if it fails on one, all fail with what that one says."""
    result = failure = None
    try:
        result = function()
    except Failure as e:
        failure = e
    except OSError as e:
        failure = Failure(e)
    for rank, failure in enumerate(gather(failure)):
        if failure:
            raise Failure(f"process {rank}: {failure}" if rank else failure, failure.status)
    return result


def on_first_process(function) -> None:
    """Calls it on the first process alone; if it fails there, all fail."""
    together(function if RANK == 0 else lambda: None)


def same_everywhere(what: str, value) -> None:
    values = gather(value)
    if len(set(values)) > 1:
        raise Failure(f"{what} differs between processes: {', '.join(f'{v} on {r}' for r, v in enumerate(values))}")


def stop_with_parent(parent: int) -> None:
    """Ends this process when the torchrun that started it has gone, however that was killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run(main, argv: list[str]) -> None:
    """Calls main(argv) and ends the process: with status 0, or with one line on stderr."""
    status, message = 0, None
    try:
        main(argv)
    except Failure as e:
        status, message = e.status, str(e)
        if RANK and not e.local:  # the first process says it; do not let torchrun end that one before it does
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 if dist.is_torchelastic_launched() else 0)
            message = None
    except OSError as e:
        status, message = 1, str(e)
    except (RuntimeError, MemoryError) as e:
        status = 1
        if isinstance(e, MemoryError) or re.search("out of memory|can't allocate memory", str(e)):
            message = f"out of memory: lower batch_size, or give --activation_checkpointing=True ({str(e).splitlines()[0]})"
        elif isinstance(e, dist.DistError) or "gloo" in str(e):
            message = f"process {RANK} stopped, because another one has gone"
        else:
            raise
    if message:
        lead = "\n" * (RANK > 0)  # the first process's progress bar may be on the line
        tqdm.write(f"{lead}train.py: {message}", file=sys.stderr)
        sys.stderr.flush()
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        if not status:
            dist.destroy_process_group()
        if status or gloo:  # without waiting for the others; gloo's threads sometimes abort an ordinary exit
            sys.stdout.flush()
            os._exit(status)
    sys.exit(status)
