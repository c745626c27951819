"""What the processes of a run do together, and how each of them ends."""
import errno
import os
import re
import signal
import sys
import threading
import time

import torch.distributed as dist
from tqdm import tqdm

RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))  # processes on this node


class Failure(Exception):
    """Ends all processes with one line. status 2: usage error; 1: failed while running."""

    def __init__(self, message, status: int = 1):
        super().__init__(" ".join(str(message).split()))
        self.status = status


def outlive(stream) -> None:
    """Makes the stream ignore that its terminal or pipe has gone, which must not end a run."""
    def alone(method):
        def call(*args):
            try:
                return method(*args)
            except OSError as e:
                if e.errno not in (errno.EIO, errno.EPIPE):
                    raise
        return call
    stream.write, stream.flush = alone(stream.write), alone(stream.flush)


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
    """Calls it on every process and returns its result; if one fails, all fail with its line."""
    result = failure = None
    try:
        result = function()
    except (Failure, OSError, ValueError) as e:
        status = 2 if isinstance(e, FileNotFoundError) else 1  # the user named what is missing
        failure = e if isinstance(e, Failure) else Failure(e, status)
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
        listed = ", ".join(f"{v} on {r}" for r, v in enumerate(values))
        raise Failure(f"{what} differs between processes: {listed}")


def stop_with_parent(parent: int) -> None:
    """Ends this process after the torchrun that started it, however that was killed."""
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
        # Only the first process says it (of each node, if they have not met yet). The others wait:
        # torchrun ends all processes as soon as one has ended.
        if RANK if dist.is_initialized() else LOCAL_RANK:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 if dist.is_torchelastic_launched() else 0)
            message = None
    except (OSError, ValueError) as e:  # of this process alone
        status, message = 1, str(e)
    except (RuntimeError, MemoryError) as e:
        status, cause = 1, e.__cause__ or e
        if "gloo" in str(cause) or isinstance(cause, (dist.DistNetworkError, dist.DistStoreError)):
            message = f"process {RANK} stopped, because another one ended"
        elif isinstance(cause, dist.DistError):  # of NCCL, which says what it is
            message = f"process {RANK}: {cause}"
        elif isinstance(e, MemoryError) or re.search("out of memory|can't allocate|overflowed",
                                                     str(e)):
            message = ("out of memory: lower batch_size, or give --activation_checkpointing=True "
                       f"({str(e).splitlines()[0]})")
        else:
            raise
    if message:
        lead = "\n" * (RANK > 0)  # the first process's progress bar may be on the line
        tqdm.write(f"{lead}train.py: {' '.join(message.split())}", file=sys.stderr)
        sys.stderr.flush()
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        if not status:
            dist.destroy_process_group()
        if status or gloo:  # waits for nobody; gloo's threads sometimes abort an ordinary exit
            sys.stdout.flush()
            os._exit(status)
    sys.exit(status)
