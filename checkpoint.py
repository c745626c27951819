"""A run's folder: the lock that keeps others out, and checkpoints that do not depend on the number of processes."""
import fcntl
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from data import write_atomically


def lock(folder: Path, patience: float = 15) -> None:
    """Keeps other runs out of the folder for as long as this process lives, however it ends.

    Waits `patience` seconds for one that is about to end, like the orphaned workers of a torchrun that was killed.
    Raises OSError if it does not, or if the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # not closed: the lock ends with the process
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(f"another run is at work in {folder}: wait for its end, or give another folder")
            time.sleep(0.2)


def save(path: Path, tree, first: bool) -> None:
    """Writes nested dicts and lists of tensors and plain values as torch.save would, DTensors whole, one tensor after
    another: no process ever holds more than one whole tensor. A collective; only the `first` process writes.

    Raises OSError there if it cannot, after every process has done its part; `path` is then as it was.
    """
    # Lazy: each one is gathered when it is asked for, by all processes.
    tensors = (v.full_tensor() if isinstance(v, DTensor) else v for v in tree_leaves(tree) if isinstance(v, Tensor))

    def write(file):
        with FakeTensorMode():  # for tensors without memory torch.save leaves room, and torch.load says where
            layout = tree_map(lambda v: torch.empty(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v, tree)
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(layout, file)
            file.flush()
            layout = torch.load(file.name, weights_only=True)
        places = [v.untyped_storage()._checkpoint_offset for v in tree_leaves(layout) if isinstance(v, Tensor)]
        for offset, tensor in zip(places, tensors):
            file.seek(offset)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    try:
        if first:
            write_atomically(path, write)
    finally:
        for _ in tensors:  # each one is a collective
            pass


def load(path: Path) -> dict:
    """Maps the file, or ckpt.pt in a folder: its tensors are read when they are copied.

    Raises FileNotFoundError if there is none, ValueError if it is not a whole checkpoint.
    """
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not {"model", "model_config", "optimizer", "config", "step", "tokens", "train_time_s"} <= saved.keys():
            raise KeyError("keys")
        if not all(isinstance(saved[key], dict) for key in ("model", "model_config", "optimizer", "config")):
            raise TypeError("no dict")
        return saved
    except Exception as e:  # noise can fail in any way
        raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__})") from None


def restore(saved: dict, model: nn.Module, optimizer=None) -> None:
    """Copies the checkpoint, or this process's rows of it, into the model and the optimizer. Not a collective.

    Raises ValueError if it is of another model or of other parameter groups.
    """
    weights = model.state_dict()
    if {name: t.shape for name, t in saved["model"].items()} != {name: p.shape for name, p in weights.items()}:
        raise ValueError("does not hold the model that it describes")
    model.load_state_dict({name: like(saved["model"][name], p) for name, p in weights.items()})
    if optimizer is not None:
        restore_optimizer(saved["optimizer"], optimizer)


def restore_optimizer(saved: dict, optimizer) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # load_state_dict would copy whole tensors to the device
    state = {i: {name: like(value, params[i]) for name, value in s.items()} for i, s in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


def like(value: Tensor, p: Tensor) -> Tensor:
    """A copy of the whole tensor `value`, on the device of p and sharded as p is."""
    if not isinstance(p, DTensor) or value.ndim == 0:
        return value.to(p.device, copy=True)
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).clone()
