"""What the tests of the optimizers share: shapes, knobs, gradients, and comparisons."""
import pytest
import torch
from torch import nn

from baselines import AMUSE, NorMuon, ScheduleFreePlus
from sf_normuon import SFNorMuon

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Tall, wide and square matrices, several of one shape; then what takes AdamW's step. They go into
# three groups, and one shape stands in two of them.
MATRICES = [(6, 4), (6, 4), (4, 9), (5, 5), (6, 4), (4, 9), (1, 7)]
SHAPES = MATRICES + [(7,), (3, 4), (2, 3, 2), (1,)]
GROUPS = (slice(4), slice(4, 7), slice(7, 11))
# What the three groups override, and the steps t at which parameter i has no gradient.
OVERRIDES = (
    {},
    {"lr": 0.05, "betas": (0.8, 0.9), "momentum": 0.5, "weight_decay": 0.7, "eps": 1e-3},
    {"lr": 0.02, "betas": (0.7, 0.98), "weight_decay": 0.3, "eps": 1e-4},
)
MISSING = {(1, 0), (2, 2), (3, 0), (3, 1), (3, 4), (5, 7), (6, 8), (9, 6)}
MISSING |= {(t, i) for t in range(4) for i in (5, 9)}  # their first gradient comes late

# Knobs with which every term of an update shows within a few steps.
FAST = dict(lr=0.1, weight_decay=0.4, warmup_steps=5)
PLUS_FAST = dict(lr=1.0, weight_decay=3.0, warmup_steps=5)
# The same with every knob in use, and warm-up and annealing over within a few steps.
KNOBS = {
    SFNorMuon: FAST | dict(warmup_steps=2, averaging_power=1.5, beta_power=0.5),
    AMUSE: FAST | dict(warmup_steps=2, averaging_power=1.0),
    ScheduleFreePlus: PLUS_FAST | dict(warmup_steps=2, averaging_power=1.0, averaging_start=1,
                                       polyak_beta=0.9, beta_anneal_steps=4),
}
ALL_KNOBS = KNOBS | {NorMuon: dict(lr=0.1, weight_decay=0.4)}


def name_of(value):
    return getattr(value, "__name__", str(value))


every = pytest.mark.parametrize("cls", KNOBS, ids=name_of)  # of the schedule-free optimizers
all_classes = pytest.mark.parametrize("cls", ALL_KNOBS, ids=name_of)
spectral = pytest.mark.parametrize("cls", [SFNorMuon, AMUSE], ids=name_of)

torch.set_num_threads(1)  # matrices this small only lose by being shared between threads


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def draw(shapes, steps, dtype=F32):
    """Weights, and their gradients at every step: a constant part, and noise."""
    weights = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    grads = []
    for t in range(steps):
        noise = [randn(*shape, seed=1000 + 100 * t + i) for i, shape in enumerate(shapes)]
        grads.append([(randn(*n.shape, seed=100 + i) + n).to(dtype) for i, n in enumerate(noise)])
    return weights, grads


def make(weights, cls=SFNorMuon, overrides=({}, {}, {}), **options):
    """Parameters of SHAPES and their optimizer, in three groups, the last with use_muon=False."""
    params = [nn.Parameter(w.clone()) for w in weights]
    groups = [{"params": params[part], **own} for part, own in zip(GROUPS, overrides)]
    groups[2]["use_muon"] = False
    return params, cls(groups, **options)


def step(opt, params, grads, loss=60.0):  # 60 keeps Polyak's step above 0
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    opt.step(lambda: loss)


def close(actual, expected, tol=1e-11):
    actual, expected = ([t.detach().double() for t in side] for side in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def same(actual, expected):
    actual, expected = ([t.detach() for t in side] for side in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def same_run(params_a, opt_a, params_b, opt_b):
    """Bitwise: weights, state, and the numbers in the groups, counters included."""
    same(params_a, params_b)
    a, b = opt_a.state_dict(), opt_b.state_dict()
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["param_groups"] == b["param_groups"]


def copies(params):
    return [p.detach().clone() for p in params]
