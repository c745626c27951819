"""The optimizers on 2, 3 and 4 processes: the result of one process, and no collective too many.

Run by torchrun, this file is one of the processes. Four of them are two replicas of two shards.
"""
import datetime
import functools
import math
import os
import subprocess
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, placement_types
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import AMUSE, NorMuon, ScheduleFreePlus
from conftest import ENV, torchrun
from optimizers import ALL_KNOBS, FAST, F64, close, copies, draw, randn
from sf_normuon import SFNorMuon, param_groups

# 5 and 2 matrices of one shape, which neither 2 nor 3 processes divide; 5, 7, 8 and 11 rows, split
# unevenly; 1 and 2 rows, which leave a process without any; stacks of 3 matrices and of 1. The last
# one belongs to the root.
BLOCKS = [
    [(3, 5, 4), (8, 6), (8, 6), (5, 9), (1, 4), (6,)],
    [(8, 6), (8, 6), (8, 6), (5, 9), (2, 7), (7, 3), (1,), (1, 4, 4)],
    [(11, 6)],
]
MISSING = {(3, 0), (4, 6), (4, 7), (5, 5), (7, 3), (7, 12), (9, 2), (9, 4), (11, 14)}


class Given(nn.Module):
    """Weights whose gradients are given, through the hooks of fully_shard: the loss is Σ ⟨w, g⟩."""

    def __init__(self, weights, blocks=()):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for i, w in enumerate(weights):
            self.register_parameter(f"w{i}", nn.Parameter(w.clone()))

    def forward(self, grads):  # one list for each block, then its own
        pairs = zip(self.parameters(recurse=False), grads[-1])
        own = sum((w * g).sum() for w, g in pairs if g is not None)
        return own + sum(block([part]) for block, part in zip(self.blocks, grads))


def split(row):
    """A list of all weights or gradients, as a list for each block."""
    row = iter(row)
    return [[next(row) for _ in block] for block in BLOCKS]


def make_given(shard, cls, options, weights):
    """The model, its hidden matrices, and its optimizer."""
    first, second, own = split(weights)
    model = Given(own, [Given(first), Given(second)])
    for module in (*model.blocks, model):
        shard(module)
    hidden = [p for p in model.blocks.parameters() if p.ndim > 1]
    rest = [p for p in model.blocks.parameters() if p.ndim == 1]
    rest.append(model.w0)  # stands for an embedding, which has two dimensions
    groups = [{"params": hidden}, {"params": rest, "use_muon": False}]
    return model, hidden, cls(groups, **{"lr": 0.02, "weight_decay": 0.4} | options)


def train_given(shard, cls, options):
    weights, grads = draw(sum(BLOCKS, []), 20)
    model, hidden, opt = make_given(shard, cls, options, weights)
    for t, gs in enumerate(grads):
        loss = model(split([None if (t, i) in MISSING else g for i, g in enumerate(gs)]))
        loss.backward()
        opt.step(lambda: 90 + loss)  # on every process the same, and so their mean
        opt.zero_grad()
    return list(model.parameters()), hidden, opt


def whole(tensors):
    return [t.full_tensor() for t in tensors]


# ---- the checks of one process, which all of them run

def sharded_is_plain(mesh):
    """The sharded model against a plain one, which every process trains for itself."""
    ablated = FAST | {"decay_at": "y", "normalize_rows": False}
    spectral = FAST | {"step_norm": "spectral"}
    for cls, options in (*ALL_KNOBS.items(), (SFNorMuon, ablated), (SFNorMuon, spectral)):
        params, hidden, opt = train_given(lambda module: None, cls, options)
        shard = functools.partial(fully_shard, mesh=mesh)
        params_s, hidden_s, opt_s = train_given(shard, cls, options)
        close(whole(params_s), params, 1e-6)
        for p, q in zip(params, params_s):
            state, state_s = opt.state[p], opt_s.state[q]
            assert all(isinstance(v, DTensor) for v in state_s.values())
            assert all(v.placements == q.placements for v in state_s.values())
            close(whole(state_s[name] for name in state), state.values(), 1e-5)
        if cls is SFNorMuon:
            found, found_s = opt.diagnostics(), opt_s.diagnostics()
            assert len(found) == len(found_s) == len([p for p in hidden if p.ndim == 2])
            for p, q in zip(hidden, hidden_s, strict=True):
                assert p.ndim > 2 or found_s[q] == pytest.approx(found[p], abs=1e-5)
        if cls is not NorMuon:
            for mode in ("eval", "train"):
                getattr(opt, mode)(), getattr(opt_s, mode)()
                close(whole(params_s), params, 1e-6)


class Collectives(TorchDispatchMode):
    """Lists (name, group, elements sent) of what is called while it is on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it is an operation of this process
        namespace, _, name = func.name().partition("::")
        if namespace == "_dtensor" or "c10d" in namespace and isinstance(args[-1], str):
            self.calls.append((name, args[-1], args[0].numel()))  # the last one names the group
        return func(*args, **(kwargs or {}))


def a_step_exchanges_and_gathers_nothing(mesh):
    """For each shape of matrices: two all-to-alls among the shards, of what this replica takes; one
    all-reduce of norms; and the replicas give each other what they took. Stacks need nothing."""
    replicas, shards = mesh.shape if mesh.ndim == 2 else (1, mesh.size())
    names = [mesh.get_group(dim).group_name for dim in range(mesh.ndim)]
    shapes = {(8, 6): 5, (5, 9): 2, (1, 4): 1, (2, 7): 1, (7, 3): 1}  # and how many there are
    exchanges = {("shard_dim_alltoall", names[-1]): 2 * len(shapes)}
    if replicas > 1:
        exchanges["all_gather_into_tensor", names[0]] = len(shapes)
    norms = {("all_reduce", names[-1]): len(shapes)}
    expected = {SFNorMuon: exchanges | norms, NorMuon: exchanges | norms, AMUSE: exchanges,
                ScheduleFreePlus: {("all_reduce", names[-1]): 1}}
    weights, grads = draw(sum(BLOCKS, []), 2)
    for cls, options in ALL_KNOBS.items():
        shard = functools.partial(fully_shard, mesh=mesh)
        model, hidden, opt = make_given(shard, cls, options, weights)
        for gs in grads:
            loss = model(split(gs))
            loss.backward()
            with Collectives() as seen:
                opt.step(lambda: 90 + loss.detach())
        found = Counter((name, group) for name, group, _ in seen.calls)
        assert found == expected[cls], (cls, found, expected[cls])
        padded = lambda number, parts: math.ceil(number / parts) * parts
        most = sum(padded(math.ceil(B / replicas), shards) * padded(m, shards) * n // shards
                   for (m, n), B in shapes.items())
        sent = sum(size for name, _, size in seen.calls if name == "shard_dim_alltoall")
        assert sent <= 2 * most, (sent, most)
        assert all(size <= 5 for name, _, size in seen.calls if name == "all_reduce")


def other_shardings_are_refused(mesh):
    """A matrix cut by columns, before anything moves: its rows' norms would be wrong."""
    mesh = mesh["shard"] if mesh.ndim == 2 else mesh
    p = nn.Parameter(distribute_tensor(randn(4, 6), mesh, [Shard(1)]))
    for cls in (SFNorMuon, AMUSE, NorMuon):
        with pytest.raises(ValueError, match=r"\(4, 6\).*Shard\(0\)"):
            cls([p])
        cls([{"params": [p], "use_muon": False}])


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data_parallel_is_plain(mesh):
    """DistributedDataParallel: a part of the batch for each process, and one model."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    plain, ddp = small_model(), DistributedDataParallel(small_model())
    opts = [SFNorMuon(param_groups(model), lr=0.05, warmup_steps=3, ns_dtype=F64)
            for model in (plain, ddp)]
    for t in range(6):
        x = randn(12, 6, seed=t)
        part = x[rank * 12 // processes:(rank + 1) * 12 // processes]
        for model, opt, batch in zip((plain, ddp), opts, (x, part)):
            opt.train()
            model(batch).square().mean().backward()
            opt.step()
            opt.zero_grad()
            opt.eval()
        close(ddp.parameters(), plain.parameters())


def zero_must_not_be_used(mesh):
    """README's reason: eval() reaches only the parameters that this process steps."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns
    model = small_model()[0]
    zero = ZeroRedundancyOptimizer([model.weight], SFNorMuon, lr=0.1, warmup_steps=1)
    for t in range(2):
        model(randn(5, 6, seed=t)).sum().backward()
        zero.step()
    y = copies([model.weight])[0]
    zero.optim.eval()
    mine = not torch.equal(y, model.weight)
    owners = torch.tensor(int(mine))
    dist.all_reduce(owners)
    assert owners == 1 < dist.get_world_size()


CHECKS = (sharded_is_plain, a_step_exchanges_and_gathers_nothing, other_shardings_are_refused,
          data_parallel_is_plain, zero_must_not_be_used)


def all_to_all(tensor, gather_dim, shard_dim, mesh, mesh_dim):
    """What DTensor calls on cards. On CPUs it gathers and cuts in its place, as in test_train.py."""
    name = mesh.get_group(mesh_dim).group_name
    return torch.ops._dtensor.shard_dim_alltoall(tensor, gather_dim, shard_dim, name)


def worker():
    placement_types.shard_dim_alltoall = all_to_all
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    processes = dist.get_world_size()
    shape = (2, 2) if processes == 4 else (1, processes)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shape[0] > 1 else mesh["shard"]
    for check in CHECKS:
        check(mesh)
        print(f"{check.__name__}: held", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit, as in train.py


# ---- the tests

@functools.cache
def outcome(processes):
    """What the processes said. They are started once for all tests, since a start takes seconds."""
    return subprocess.run([*torchrun(processes), __file__], capture_output=True, text=True,
                          timeout=150, env=ENV)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_sharding(check, processes):
    done = outcome(processes)
    assert done.stdout.count(f"{check}: held") == processes, done.stderr[-8000:]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_process_ends_well(processes):
    assert outcome(processes).returncode == 0, outcome(processes).stderr[-8000:]


if __name__ == "__main__":
    worker()
