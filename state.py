"""Model and optimizer on disk: one file that does not depend on the number of processes."""
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from data import write_atomically
from distributed import RANK, together
from sf_normuon import local


def save(path: Path, tree) -> None:
    """Writes nested dicts and lists of tensors and values as torch.save would, DTensors whole, but
    for the zip archive's checksums of tensors, which torch.load does not look at.

    No process ever holds more than one whole tensor. All must call it, the first one writes. Raises
    Failure on all of them if it cannot; `path` is then as it was.
    """
    tensors = [v for v in tree_leaves(tree) if isinstance(v, Tensor)]

    def whole(v):
        try:
            return v.full_tensor() if isinstance(v, DTensor) else v
        except RuntimeError as e:  # the others wait in it and cannot be told: run() ends this one
            raise MemoryError(f"{path}: {e}") from e

    def write(file):
        # torch.save leaves room for tensors without memory, and torch.load says where
        empty = lambda v: torch.empty(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v
        with FakeTensorMode():
            layout = tree_map(empty, tree)
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(layout, file)
            file.flush()
            layout = torch.load(file.name, weights_only=True)
        rooms = [v.untyped_storage() for v in tree_leaves(layout) if isinstance(v, Tensor)]
        for room, tensor in zip(rooms, tensors):
            together(lambda: None)
            content = whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.seek(room._checkpoint_offset)
            file.write(content.data)

    if RANK == 0:
        together(lambda: write_atomically(path, write))
    else:
        for tensor in tensors:  # in step with the writer: NCCL aborts what waits for too long
            together(lambda: None)
            whole(tensor)
        together(lambda: None)


def load(path: Path) -> dict:
    """Maps the file, or ckpt.pt in a folder: its tensors are read when they are copied.

    Raises FileNotFoundError if there is none, ValueError if it is not a whole checkpoint.
    """
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        kinds = dict(model=dict, model_config=dict, optimizer=dict, config=dict, step=int,
                     tokens=int)
        if not all(isinstance(saved[key], kind) for key, kind in kinds.items()):
            raise TypeError("another kind")
        return saved
    except Exception as e:  # noise can fail in any way
        raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__})") from None


def rows(value: Tensor, p: Tensor) -> Tensor:
    """The rows of the whole tensor `value` that this process holds where it is sharded as p is."""
    if isinstance(p, DTensor) and value.ndim:
        for dim, placement in enumerate(p.placements):
            if placement.is_shard():
                n = -(-len(value) // p.device_mesh.size(dim))
                return value[n * p.device_mesh.get_local_rank(dim):][:n]
    return value


def like(value: Tensor, p: Tensor) -> Tensor:
    """A copy of the whole tensor `value`, on the device of p and sharded as p is."""
    mine = rows(value, p).to(p.device, copy=True)
    if not isinstance(p, DTensor) or value.ndim == 0:
        return mine
    return DTensor.from_local(mine, p.device_mesh, p.placements, run_check=False,
                              shape=value.shape, stride=value.stride())


@torch.no_grad()
def restore(path: Path, saved: dict, model: nn.Module, optimizer=None) -> None:
    """Copies a loaded checkpoint, or this process's rows of it, into the model and the optimizer.

    Raises ValueError if it is of another model or of another optimizer.
    """
    weights = model.state_dict()
    if {n: t.shape for n, t in saved["model"].items()} != {n: p.shape for n, p in weights.items()}:
        raise ValueError(f"{path} does not hold the model that it describes")
    for name, p in weights.items():
        local(p).copy_(rows(saved["model"][name], p))
    if optimizer is not None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            state = {i: {name: like(value, params[i]) for name, value in values.items()}
                     for i, values in saved["optimizer"]["state"].items()}
            optimizer.load_state_dict({**saved["optimizer"], "state": state})
        except (KeyError, IndexError, ValueError) as e:
            raise ValueError(f"{path} holds the state of another optimizer ({e})") from None
