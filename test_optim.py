"""What must stay true of the optimizers: the mathematics, against float64 references written from the papers' formulas;
the contracts; and the same result on many processes as on one. Run by torchrun, this file is one of those processes."""
import copy
import datetime
import importlib.util
import io
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sf_normuon
from baselines import AMUSE, NorMuon, ScheduleFreePlus
from sf_normuon import SFNorMuon, newton_schulz

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
MATRICES = [(6, 4), (6, 4), (4, 9), (5, 5), (6, 4), (4, 9), (1, 7)]  # tall, wide, square, several of one shape
OTHERS = [(7,), (3, 4), (2, 3, 2), (1,)]
SHAPES, GROUPS = MATRICES + OTHERS, (slice(4), slice(4, 7), slice(7, 11))  # one shape stands in two groups
DEFAULTS = dict(lr=0.008, betas=(0.9, 0.95), momentum=0.8, weight_decay=0.05, warmup_steps=2000, eps=1e-8,
                ns_steps=5, decay_at="z", normalize_rows=True, averaging_power=0.0, beta_power=0.0)
AMUSE_DEFAULTS = dict(lr=0.01, betas=(0.6, 0.999), momentum=0.95, weight_decay=0.05, warmup_steps=6000, rho=0.8,
                      averaging_power=0.0, eps=1e-10, ns_steps=5)
PLUS_DEFAULTS = dict(lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, averaging_power=0.0, averaging_start=0,
                     polyak_beta=0.0, beta_anneal_steps=0, eps=1e-8)
FAST = dict(lr=0.1, weight_decay=0.4, warmup_steps=5)  # every term of the update shows within a few steps
PLUS_FAST = dict(lr=1.0, weight_decay=3.0, warmup_steps=5)
# Every class with knobs all of which matter, warm-up and annealing over within a few steps.
KNOBS = {SFNorMuon: FAST | dict(warmup_steps=2, averaging_power=1.5, beta_power=0.5), AMUSE: FAST | {"warmup_steps": 2, "averaging_power": 1.0},
         ScheduleFreePlus: PLUS_FAST | dict(warmup_steps=2, averaging_power=1.0, averaging_start=1, polyak_beta=0.9,
                                            beta_anneal_steps=4)}
every = pytest.mark.parametrize("cls", KNOBS, ids=lambda cls: cls.__name__)
spectral = pytest.mark.parametrize("cls", [SFNorMuon, AMUSE], ids=lambda cls: cls.__name__)
OVERRIDES = ({}, {"lr": 0.05, "betas": (0.8, 0.9), "momentum": 0.5, "weight_decay": 0.7, "eps": 1e-3},
             {"lr": 0.02, "betas": (0.7, 0.98), "weight_decay": 0.3, "eps": 1e-4})
MISSING = {(1, 0), (2, 2), (3, 0), (3, 1), (3, 4), (5, 7), (6, 8), (9, 6)} | {(t, i) for t in range(4) for i in (5, 9)}
NS_ERROR = 485e-6  # float32 rounding, grown by the slope of the iteration at zero, 3.4445⁵ = 485


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only lose by being shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- references: float64, nothing in place


def polar(M, ns_steps=5):
    """Newton-Schulz on singular values, on which alone it acts: σ ← aσ + bσ³ + cσ⁵. P = M V diag(σ_out / σ_in) Vᵀ."""
    M = M.double()
    M = M / M.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-300)
    _, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    ratio = torch.ones_like(sigma)
    for _ in range(ns_steps):
        s2 = (sigma * ratio)**2
        ratio = ratio * (3.4445 - 4.7750 * s2 + 2.0315 * s2**2)
    return M @ Vh.mT * ratio[..., None, :] @ Vh


def start(w):
    """One parameter of a reference: its sequences x, y, z and its moments."""
    w = w.detach().double()
    return SimpleNamespace(x=w, y=w, z=w, M=torch.zeros_like(w), m=torch.zeros_like(w), v=torch.zeros_like(w))


def normalized(r, P, beta2, eps, normalize_rows):
    """0.2 √(mn) / ‖P̂‖_F · P̂, with v, one entry per row, kept in r."""
    r.v = beta2 * r.v[:, :1] + (1 - beta2) * (P * P).mean(dim=1, keepdim=True)
    P_hat = P / (r.v.sqrt() + eps) if normalize_rows else P
    return 0.2 * math.sqrt(P.numel()) / P_hat.norm() * P_hat if P_hat.norm() > 0 else P_hat


def adam_scale(r, g, beta2, t, eps):
    """√v̂ + ε, after the second moment of step t = 1, 2, ..."""
    r.v = beta2 * r.v + (1 - beta2) * g * g
    return (r.v / (1 - beta2**t)).sqrt() + eps


def sf_step(params, grads, group):
    """Algorithm 1, one step of a group, which counts t and s. A parameter whose gradient is None keeps x and z."""
    if group["lr"] == 0:
        return
    (beta1, beta2), mu, eps, lam = group["betas"], group["momentum"], group["eps"], group["weight_decay"]
    t = group["t"] = group.get("t", 0) + 1
    T0 = max(1, group["warmup_steps"])
    eta = group["lr"] * min(1, t / T0)
    w = t ** group["averaging_power"] * eta**2
    s = group["s"] = group.get("s", 0.0) + w
    c = w / s
    if t > T0:
        beta1 = 1 - (1 - beta1) * (T0 / t) ** group["beta_power"]
    for r, g in zip(params, grads):
        if g is None:
            r.y = (1 - beta1) * r.z + beta1 * r.x
            continue
        g = g.double()
        if group["use_muon"]:
            r.M = mu * r.M + (1 - mu) * g
            d = normalized(r, polar(r.M, group["ns_steps"]), beta2, eps, group["normalize_rows"])
        else:
            d = g / adam_scale(r, g, beta2, t, eps)
        u = eta * lam * {"z": r.z, "y": r.y, "none": 0 * r.z}[group["decay_at"]] + eta * d
        r.z_before, r.z = r.z, r.z - u
        r.x = (1 - c) * r.x + c * r.z
        r.y = (1 - beta1) * r.z + beta1 * r.x


def normuon_step(params, grads, group):
    """NorMuon, one step of a group, which counts t; r.y is the parameter."""
    (beta1, beta2), mu, eps = group["betas"], group["momentum"], group["eps"]
    t = group["t"] = group.get("t", 0) + 1
    for r, g in zip(params, grads):
        if g is None:
            continue
        g = g.double()
        if group["use_muon"]:
            r.M = mu * r.M + (1 - mu) * g
            d = normalized(r, polar((1 - mu) * g + mu * r.M), beta2, eps, group["normalize_rows"])
        else:
            r.m = beta1 * r.m + (1 - beta1) * g
            d = r.m / (1 - beta1**t) / adam_scale(r, g, beta2, t, eps)
        r.y = (1 - group["lr"] * group["weight_decay"]) * r.y - group["lr"] * d


def amuse_step(params, grads, group):
    """AMUSE, one step of a group, which counts t and W and keeps c0."""
    if group["lr"] == 0:
        return
    (beta1, beta2), mu, T0 = group["betas"], group["momentum"], group["warmup_steps"]
    t = group["t"] = group.get("t", 0) + 1
    eta = group["lr"] * min(1, t / T0)
    w = t ** group["averaging_power"] * eta**2
    group["W"] = group.get("W", 0.0) + w
    c, beta = w / group["W"], beta1
    if t == T0:
        group["c0"] = c
    if t > T0:
        S = c * (1 - group["c0"]) / (group["c0"] * (1 - c))
        beta = 1 - S ** group["rho"] * (1 - beta1)
    for r, g in zip(params, grads):
        if g is None:
            continue
        g = g.double()
        if group["use_muon"]:
            r.M = mu * r.M + (1 - mu) * g
            d = 0.2 * math.sqrt(max(g.shape)) * polar((1 - mu) * g + mu * r.M, group["ns_steps"])
        else:
            d = g / adam_scale(r, g, beta2, t, group["eps"])
        r.z = (1 - eta * group["weight_decay"]) * r.z - eta * d
        r.x = (1 - c) * r.x + c * r.z
        r.y = beta * r.x + (1 - beta) * r.z


def polyak(params, grads, groups, loss):
    """max(0, loss + I) / ê of ScheduleFree+, from lists of parameters and gradients for each group; the first keeps e."""
    if all(group["lr"] == 0 for group in groups):
        return 0.0
    G = I = 0.0
    for refs, gs, group in zip(params, grads, groups):
        k, A = group.get("t", 0), group["beta_anneal_steps"]
        group["beta"] = 1 - math.exp(math.log(0.1) + (math.log(0.035) - math.log(0.1)) * min(1, k / A)) if A else 0.9
        for r, g in zip(refs, gs):
            if g is not None and group["lr"] != 0:
                G += g.double().abs().sum().item()
                I += group["beta"] * (g.double() * (r.z - r.x)).sum().item()
    first = groups[0]
    beta_p = first["polyak_beta"]
    first["e"] = beta_p * first.get("e", 0.0) + (1 - beta_p) * math.sqrt(math.pi / 2) * G
    e_hat = first["e"] / (1 - beta_p ** (first.get("t", 0) + 1))
    return max(0.0, loss + I) / e_hat if e_hat else 0.0


def plus_step(params, grads, group):
    """ScheduleFree+, one step of a group, which counts k and W; `polyak` is for all groups the same."""
    if group["lr"] == 0:
        return
    (beta1, beta2), beta, k = group["betas"], group["beta"], group.get("t", 0)
    group["t"] = k + 1
    alpha = group["lr"] * min(1, (k + 1) / max(1, group["warmup_steps"])) * group["polyak"]
    group["largest"] = max(group.get("largest", group["eps"]), alpha)
    c = 1
    if k >= group["averaging_start"]:
        w = (k + 1) ** group["averaging_power"] * group["largest"] ** 2
        group["W"] = group.get("W", 0.0) + w
        c = w / group["W"]
    for r, g in zip(params, grads):
        if g is None:
            continue
        g = g.double()
        r.z = r.z - alpha**2 * group["weight_decay"] * r.y
        r.m = beta1 * r.m + (1 - beta1) * g
        r.z = r.z - alpha * r.m / (1 - beta1 ** (k + 1)) / adam_scale(r, g, beta2, k + 1, group["eps"])
        r.x = (1 - c) * r.x + c * r.z
        r.y = beta * r.x + (1 - beta) * r.z


REFERENCES = {SFNorMuon: (sf_step, DEFAULTS), AMUSE: (amuse_step, AMUSE_DEFAULTS), ScheduleFreePlus: (plus_step, PLUS_DEFAULTS)}


# ---------------------------------------------------------------- tools


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def draw(shapes, steps, dtype=F32):
    """Weights, and their gradients at every step: a constant part, so that momentum matters, and noise."""
    weights = [randn(*s, seed=i).to(dtype) for i, s in enumerate(shapes)]
    return weights, [[(randn(*s, seed=100 + i) + randn(*s, seed=1000 + 100 * t + i)).to(dtype)
                      for i, s in enumerate(shapes)] for t in range(steps)]


def make(weights, cls=SFNorMuon, overrides=({}, {}, {}), **options):
    """Parameters of the shapes SHAPES and their optimizer, in three groups, the last with use_muon=False."""
    params = [nn.Parameter(w.clone()) for w in weights]
    groups = [{"params": params[part], **override} for part, override in zip(GROUPS, overrides)]
    groups[2]["use_muon"] = False
    return params, cls(groups, **options)


def step(opt, params, grads, loss=60.0):  # 60 keeps Polyak's step above 0
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    opt.step(lambda: loss)


def close(actual, expected, tol=1e-11):
    torch.testing.assert_close([a.detach().double() for a in actual], [e.detach().double() for e in expected],
                               rtol=0, atol=tol)


def same(actual, expected):
    torch.testing.assert_close([a.detach() for a in actual], [e.detach() for e in expected], rtol=0, atol=0)


def same_run(params_a, opt_a, params_b, opt_b):
    """Bitwise: weights, state, and the numbers in the groups, counters included."""
    same(params_a, params_b)
    a, b = opt_a.state_dict(), opt_b.state_dict()
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["param_groups"] == b["param_groups"]


def copies(params):
    return [p.detach().clone() for p in params]


# ---------------------------------------------------------------- newton_schulz

SIZES = [(32, 32), (64, 24), (24, 64), (3, 2, 20, 48), (5, 7), (1, 16), (16, 1), (1, 1),
         (257, 257), (2, 260, 600)]  # from 256 on, without the mirrored part of symmetric products
GIVEN = {str(s): randn(*s) for s in SIZES} | {"rank 8 of 32": randn(32, 8) @ randn(8, 40, seed=1)}


@pytest.mark.parametrize("scale", [1, 1e-15, 1e15])
@pytest.mark.parametrize("name", GIVEN)
def test_newton_schulz_brings_singular_values_near_one(name, scale):
    G = GIVEN[name] * scale
    P = newton_schulz(G.float()).double()
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    s_out = (U.mT @ P @ Vh.mT).diagonal(dim1=-2, dim2=-1)  # in the order of s: the iteration is not monotone
    large = s_out[s > 0.01 * s.norm(dim=-1, keepdim=True)]
    assert 0.68 <= large.min() and large.max() <= 1.14
    close([P], [polar(G)], NS_ERROR)
    close([newton_schulz(G)], [P], NS_ERROR)  # float32 inside by default
    close([newton_schulz(G, dtype=F64), newton_schulz(G, 3, F64)], [polar(G), polar(G, 3)], 1e-12)


@pytest.mark.parametrize("compute", [None, F64, F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_newton_schulz_keeps_shape_dtype_and_input(dtype, compute):
    for shape in [(9, 5), (5, 9), (2, 3, 8, 8), (0, 4, 6), (256, 300), (640, 257)]:
        G = randn(*shape).to(dtype)
        before = G.clone()
        P = newton_schulz(G, dtype=compute)
        assert P.shape == G.shape and P.dtype == dtype
        assert torch.equal(G, before) and (P.data_ptr() != G.data_ptr() or not G.numel())
        if G.numel():
            close([P], [polar(G)], 0.1 if BF16 in (dtype, compute) else NS_ERROR)
        assert newton_schulz(torch.zeros_like(G), dtype=compute).count_nonzero() == 0


def test_compiled_newton_schulz_compiles_once_per_shape(monkeypatch):
    """What runs on CUDA, with the compiler's code generation left out: no graph breaks, nothing compiled twice, and
    shapes enough for torch's limit of 8 recompilations, beyond which a fullgraph function raises."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, **kwargs | {"backend": "aot_eager"}))
    spec = importlib.util.spec_from_file_location("sf_normuon_compiled", sf_normuon.__file__)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.iteration = module.compile_iteration()  # on the CPU too
    torch._dynamo.reset()
    graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    for seed in range(3):
        for shape in [(*B, m, n) for m, n in [(8, 8), (32, 8), (8, 32), (16, 24), (1, 7), (7, 1)] for B in [(3,), ()]]:
            X = (randn(*shape, seed=seed) * 10.0**seed).float()
            close([module.newton_schulz(X)], [newton_schulz(X)], NS_ERROR)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


# ---------------------------------------------------------------- SFNorMuon: the mathematics

CASES = {
    "defaults": {}, "fast": FAST, "warming up": FAST | {"warmup_steps": 100}, "no warm-up": FAST | {"warmup_steps": 0},
    "decay at y": FAST | {"decay_at": "y"}, "decay nowhere": FAST | {"decay_at": "none"},
    "no decay": FAST | {"weight_decay": 0.0}, "no momentum": FAST | {"momentum": 0.0},
    "rows as they are": FAST | {"normalize_rows": False}, "large eps": FAST | {"eps": 0.1},
    "betas": FAST | {"betas": (0.6, 0.8)}, "adam_betas": FAST | {"adam_betas": (0.7, 0.9)}, "y is x": FAST | {"betas": (1.0, 0.0), "adam_betas": (1.0, 0.0)},
    "3 Newton-Schulz steps": FAST | {"ns_steps": 3}, "r 2": FAST | {"averaging_power": 2.0},
    "p ½": FAST | {"beta_power": 0.5}, "p ½, no warm-up": FAST | {"beta_power": 0.5, "warmup_steps": 0},
    "r 2, p 1, decay at y": FAST | {"averaging_power": 2.0, "beta_power": 1.0, "warmup_steps": 3, "decay_at": "y"},
}


def run_both(options, overrides=({}, {}, {}), factors=(1.0,), missing=(), dtype=F64, tol=1e-11, cls=SFNorMuon,
             losses=(60.0,) * 12):
    """The optimizer beside its reference, a step for each loss: y in train mode, z in the state, x in eval mode.

    Without a loss, all gradients of the step are zero.
    """
    reference, defaults = REFERENCES[cls]
    weights, grads = draw(SHAPES, len(losses), dtype)
    params, opt = make(weights, cls, overrides, **options, **{} if cls is ScheduleFreePlus else {"ns_dtype": dtype})
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: factors[t % len(factors)])
    refs = [start(w) for w in weights]
    adamw = {"betas": options.get("adam_betas", (0.95, 0.99))} if cls is SFNorMuon else {}
    groups = [defaults | options | own | override | {"use_muon": i < 2}
              for i, (own, override) in enumerate(zip(({}, {}, adamw), overrides))]
    lrs = [group["lr"] for group in groups]
    for t, loss in enumerate(losses):
        gs = [None if (t, i) in missing else g if loss else 0 * g for i, g in enumerate(grads[t])]
        step(opt, params, gs, loss or 60.0)
        scheduler.step()
        for group, lr in zip(groups, lrs):
            group["lr"] = lr * factors[t % len(factors)]
        if cls is ScheduleFreePlus:
            ratio = polyak([refs[part] for part in GROUPS], [gs[part] for part in GROUPS], groups, loss or 60.0)
            groups = [group | {"polyak": ratio} for group in groups]
        for part, group in zip(GROUPS, groups):
            reference(refs[part], gs[part], group)
        close(params, [r.y for r in refs], tol)
        close([opt.state[p]["z"] if p in opt.state else p for p in params], [r.z for r in refs], tol)
        if t % 4 in (0, 3):
            opt.eval()
            close(params, [r.x for r in refs], tol)
            opt.train()
    return params, opt, refs


@pytest.mark.parametrize("case", CASES)
def test_algorithm_1(case):
    run_both(CASES[case])


@pytest.mark.parametrize("knobs", [{"decay_at": "z"}, {"decay_at": "y"}, {"decay_at": "none"}, KNOBS[SFNorMuon]], ids=str)
def test_algorithm_1_with_overrides_a_schedule_and_missing_gradients(knobs):
    """The schedule passes 0; the first gradient of two parameters comes late."""
    run_both(FAST | knobs, OVERRIDES, (1.0, 0.5, 2.0, 0.0, 1.5), MISSING)


def test_algorithm_1_in_float32():
    """A step is 0.02 P̂: at most 12 roundings of weights below 4, and 12 errors of Newton-Schulz."""
    run_both(FAST, dtype=F32, tol=12 * (4 * 6e-8 + 0.02 * 485 * 6e-8))


@pytest.mark.parametrize("shape", [(24, 40), (512, 640)], ids=str)
def test_matrices_of_one_shape_move_as_they_would_alone(shape):
    """Small ones are stacked, large ones on a CPU are not."""
    weights, grads = draw([shape] * 3, 2)

    def after(chosen):
        params = [nn.Parameter(weights[i].clone()) for i in chosen]
        opt = SFNorMuon(params, ns_dtype=F64)
        for gs in grads:
            step(opt, params, [gs[i] for i in chosen])
        return params

    close(after([0, 1, 2]), [after([i])[0] for i in range(3)], 1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_sf_adamw_is_the_released_one(warmup_steps, weight_decay):
    schedulefree = pytest.importorskip("schedulefree")
    weights, grads = draw(SHAPES, 15, F64)
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    knobs = dict(lr=0.05, betas=(0.9, 0.97), eps=1e-6, weight_decay=weight_decay, warmup_steps=warmup_steps)
    opt = SFNorMuon([{"params": ours, "use_muon": False, "betas": knobs["betas"]}], **knobs, decay_at="y")
    released = schedulefree.AdamWScheduleFree(theirs, **knobs, r=0.0, weight_lr_power=2.0)
    for gs in grads:
        opt.train(), released.train()
        step(opt, ours, gs), step(released, theirs, gs)
        close(ours, theirs)
        opt.eval(), released.eval()
        close(ours, theirs)


def test_diagnostics():
    """ρ, α and the predicted λρ of every matrix, from the state as it stands, in both modes."""
    params, opt, refs = run_both(FAST | {"eps": 1e-3})
    for mode in (opt.train, opt.eval):
        mode()
        found = opt.diagnostics()
        assert set(found) == set(params[:len(MATRICES)])
        for p, r in zip(params, refs[:len(MATRICES)]):
            P_hat = polar(r.M) / (r.v.sqrt() + 1e-3)
            alpha = ((r.z_before * P_hat).sum() / (r.z_before.norm() * P_hat.norm())).item()
            expected = {"rho": r.z.square().mean().sqrt().item(), "alpha": alpha,
                        "predicted": 0.1 * (-alpha + math.sqrt(alpha**2 + 2 * 0.1 * 0.4))}
            assert found[p] == pytest.approx(expected, abs=1e-10)


def test_steady_state():
    """Under random gradients ρ settles where the prediction says."""
    gen, params = torch.Generator().manual_seed(5), [nn.Parameter(randn(24, 32).float())]
    opt = SFNorMuon(params, lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=10)  # settles in 1 / 2ηλ = 50 steps
    found = []
    for t in range(900):
        step(opt, params, [torch.randn(24, 32, generator=gen)])
        if t >= 400:
            found += opt.diagnostics().values()
    rho, predicted = ([d[name] for d in found] for name in ("rho", "predicted"))
    assert 0.1 * sum(rho) == pytest.approx(sum(predicted), rel=0.02)
    assert max(abs(b - a) / a for a, b in zip(rho, rho[1:])) < 0.01


# ---------------------------------------------------------------- the contracts of the schedule-free optimizers

BAD = [{"lr": -1.0}, {"lr": math.nan}, {"betas": (1.1, 0.95)}, {"betas": (-0.1, 0.95)}, {"betas": (0.9, 1.0)},
       {"betas": (0.9, -0.1)}, {"weight_decay": -0.1}, {"eps": -1e-8}, {"warmup_steps": -1}]
BAD_SPECTRAL = [*BAD, {"betas": (0.0, 0.95)}, {"momentum": 1.0}, {"momentum": -0.1}, {"ns_steps": -1}]
BAD = {SFNorMuon: [*BAD_SPECTRAL, {"decay_at": "x"}, {"averaging_power": -1.0}, {"beta_power": -0.1}],
       AMUSE: [*BAD_SPECTRAL, {"warmup_steps": 1}, {"rho": -0.1}, {"averaging_power": -1.0}],
       ScheduleFreePlus: [*BAD, {"betas": (1.0, 0.95)}, {"polyak_beta": 1.0}, {"polyak_beta": -0.1}, {"averaging_power": -1.0},
                          {"averaging_start": -1}, {"beta_anneal_steps": -1}]}


@pytest.mark.parametrize("cls, bad", [(cls, bad) for cls in BAD for bad in BAD[cls]],
                         ids=lambda v: getattr(v, "__name__", str(v)))
def test_values_out_of_range_are_refused(cls, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name.rstrip("s")):
        cls([nn.Parameter(torch.zeros(3, 2))], **bad)
    if not bad.keys() & {"warmup_steps", "ns_steps", "decay_at"}:  # what a group may override
        with pytest.raises(ValueError, match=name.rstrip("s")):
            cls([{"params": [nn.Parameter(torch.zeros(3, 2))], **bad}])


@spectral
@pytest.mark.parametrize("shape", [(), (17,), (13, 11, 17, 2)], ids=str)
def test_only_matrices_take_the_matrix_step(cls, shape):
    p = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=", ".join(map(str, shape)) or r"\(\)|\[\]"):
        cls([p])
    for other in (cls, ScheduleFreePlus):
        other([{"params": [p], "use_muon": False}])


@every
@pytest.mark.parametrize("use_muon", [True, False])
def test_complex_and_sparse_parameters_are_refused(cls, use_muon):
    for bad in (torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3, 2).to_sparse()):
        with pytest.raises(ValueError, match="real and dense"):
            cls([{"params": [nn.Parameter(bad)], "use_muon": use_muon}])


@every
def test_train_and_eval(cls):
    """Train mode at the start; both idempotent and in place; no step in eval mode."""
    weights, grads = draw(SHAPES, 4)
    params, opt = make(weights, cls, **KNOBS[cls])
    pointers = [p.data_ptr() for p in params]
    opt.eval(), opt.train()
    same(params, weights)
    for gs in grads:
        step(opt, params, gs)
    y = copies(params)
    opt.train()
    same(params, y)
    opt.eval()
    x = copies(params)
    opt.eval()
    with pytest.raises(RuntimeError, match=r"\.train\(\)"):
        opt.step()
    same(params, x)
    assert not any(torch.equal(a, b) for a, b in zip(x, y))
    opt.train()
    close(params, y, 1e-6)
    step(opt, params, grads[0])
    assert pointers == [p.data_ptr() for p in params] and all(p.is_leaf and p.requires_grad for p in params)


@every
def test_lr_0_moves_nothing_and_is_not_counted(cls):
    """Before the first step, between two, and in one group alone. It needs no closure."""
    weights, grads = draw(SHAPES, 6)
    (a, opt_a), (b, opt_b) = (make(weights, cls, **KNOBS[cls]) for _ in range(2))
    for t in range(3):
        for lr, g in ((0.0, grads[t + 3]), (KNOBS[cls]["lr"], grads[t])):
            for group in opt_b.param_groups:
                group["lr"] = lr
            before = copies(b)
            step(opt_b, b, g)
            if lr == 0:
                opt_b.step()
            assert (lr == 0) == all(torch.equal(p, old) for p, old in zip(b, before))
        step(opt_a, a, grads[t])
        same_run(a, opt_a, b, opt_b)
    opt_a.param_groups[0]["lr"] = 0.0
    step(opt_a, a, grads[3]), step(opt_b, b, [None] * 4 + grads[3][4:])
    opt_a.param_groups[0]["lr"] = KNOBS[cls]["lr"]
    same_run(a, opt_a, b, opt_b)


STATES = {  # beside z: of matrices, of the others
    SFNorMuon: ({"momentum_buffer", "row_second_moment"}, {"exp_avg_sq"}), AMUSE: ({"momentum_buffer"}, {"exp_avg_sq"}),
    ScheduleFreePlus: ({"exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq"})}


@every
def test_state_is_what_the_contract_says_and_only_where_a_gradient_was(cls):
    weights, grads = draw(SHAPES, 1)
    params, opt = make(weights, cls, **KNOBS[cls])
    step(opt, params, [None if i in (1, 8) else g for i, g in enumerate(grads[0])])
    for i, (p, w) in enumerate(zip(params, weights)):
        if i in (1, 8):
            assert not opt.state.get(p) and torch.equal(p, w)
            continue
        assert set(opt.state[p]) == {"z"} | STATES[cls][i >= len(MATRICES)]
        for name, value in opt.state[p].items():
            assert value.shape == (p.shape if name != "row_second_moment" else (p.shape[0], 1))
    assert len(opt.state_dict()["state"]) == len(params) - 2


@pytest.mark.parametrize("options", [FAST, FAST | {"normalize_rows": False}], ids=["rows", "whole"])
def test_zero_gradients(options):
    """Of everything, at the start and later, and of one matrix and one row among others."""
    weights, grads = draw(MATRICES, 5, F64)
    params, refs = [nn.Parameter(w.clone()) for w in weights], [start(w) for w in weights]
    opt, group = SFNorMuon(params, **options, ns_dtype=F64), DEFAULTS | options | {"use_muon": True}
    for t, gs in enumerate(grads):
        for g in gs if t in (0, 3) else (gs[0], gs[2][1]):
            g.zero_()
        step(opt, params, gs)
        sf_step(refs, gs, group)
        close(params, [r.y for r in refs])
        assert all(math.isfinite(v) for d in opt.diagnostics().values() for v in d.values())


@every
def test_gradients_that_are_not_finite_raise_nothing(cls):
    weights, grads = draw(SHAPES, 1)
    for value in (math.nan, math.inf):
        params, opt = make(weights, cls, **KNOBS[cls])
        step(opt, params, [torch.full_like(g, value) for g in grads[0]])


@spectral
@pytest.mark.parametrize("momentum", [0.8, 0.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bfloat16_newton_schulz_leaves_state_and_gradients_alone(cls, dtype, momentum):
    weights, grads = draw(SHAPES, 1, dtype)
    params, opt = make(weights, cls, **FAST | {"momentum": momentum}, ns_dtype=BF16)
    step(opt, params, grads[0])
    same([p.grad for p in params], grads[0])
    assert all(v.dtype == dtype and v.isfinite().all() for p in params for v in opt.state[p].values())
    M = [opt.state[p]["momentum_buffer"] for p in params[:len(MATRICES)]]
    close(M, [(1 - momentum) * g.double() for g in grads[0][:len(MATRICES)]], 1e-6 if dtype == F32 else 4e-3)
    assert not {m.data_ptr() for m in M} & {p.grad.data_ptr() for p in params}


OTHER = {SFNorMuon: dict(momentum=0.1, decay_at="none", beta_power=0.0), AMUSE: dict(momentum=0.1, rho=0.0),
         ScheduleFreePlus: dict(polyak_beta=0.0, averaging_start=20, beta_anneal_steps=0)}


@every
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_run_continued_from_a_state_dict_is_bitwise_the_same(cls, mode):
    weights, grads = draw(SHAPES, 10)
    params, opt = make(weights, cls, OVERRIDES, **KNOBS[cls])
    for t in range(4):
        step(opt, params, [None if (t, i) in MISSING else g for i, g in enumerate(grads[t])])
    getattr(opt, mode)()
    torch.save({"model": copies(params), "optimizer": opt.state_dict()}, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params_2, opt_2 = make(saved["model"], cls, lr=0.7, warmup_steps=9, eps=1.0, **OTHER[cls])
    opt_2.load_state_dict(saved["optimizer"])
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"\.train\(\)"):
            opt_2.step()
        opt.train(), opt_2.train()
    for gs in grads[4:]:
        step(opt, params, gs), step(opt_2, params_2, gs)
    opt.eval(), opt_2.eval()
    same_run(params, opt, params_2, opt_2)


@every
def test_closure_has_gradients_and_its_loss_is_returned(cls):
    p = nn.Parameter(torch.ones(3, 2))
    opt = cls([p], **FAST)

    def closure():
        loss = (p * torch.arange(6.0).view(3, 2)).sum()
        loss.backward()  # raises where gradients are off
        return loss

    assert opt.step(closure).item() == 15.0 and not torch.equal(p, torch.ones(3, 2))
    if cls is not ScheduleFreePlus:
        assert opt.step() is None
        return
    before = copies([p, opt.state[p]["z"]]), copy.deepcopy(opt.param_groups[0])
    with pytest.raises(ValueError, match="closure"):
        opt.step()
    same([p, opt.state[p]["z"]], before[0])
    assert {**opt.param_groups[0], "params": 0} == {**before[1], "params": 0}


@pytest.mark.parametrize("cls, knobs", [*KNOBS.items(), (NorMuon, {})], ids=lambda v: getattr(v, "__name__", ""))
def test_torch_state_dict_helpers_disturb_nothing(cls, knobs):
    """On a fresh optimizer they begin with a step at lr 0 and zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    models, grads = [copy.deepcopy(model) for _ in range(3)], draw([p.shape for p in model.parameters()], 5)[1]
    params = [list(model.parameters()) for model in models]
    opts = [cls([{"params": p[::2]}, {"params": p[1::2], "use_muon": False}], **knobs) for p in params]
    get_optimizer_state_dict(models[1], opts[1])
    for t, gs in enumerate(grads):
        if t == 3:
            models[2].load_state_dict(models[1].state_dict())
            set_optimizer_state_dict(models[2], opts[2], copy.deepcopy(get_optimizer_state_dict(models[1], opts[1])))
        for i in (0, 1, 2) if t >= 3 else (0, 1):
            step(opts[i], params[i], gs)
            same_run(params[i], opts[i], params[0], opts[0])


# ---------------------------------------------------------------- NorMuon


@pytest.mark.parametrize("options", [{}, {"normalize_rows": False}, {"momentum": 0.0},
                                     {"betas": (0.8, 0.7), "eps": 0.01}], ids=str)
def test_normuon(options):
    """Against its formulas, AdamW groups against torch's AdamW too, while lr changes; and at lr 0 nothing moves."""
    weights, grads = draw(SHAPES, 12, F64)
    params, opt = make(weights, NorMuon, lr=0.1, weight_decay=0.4, **options, ns_dtype=F64)
    groups = [dict(betas=(0.9, 0.95), momentum=0.95, eps=1e-8, normalize_rows=True, weight_decay=0.4, use_muon=i < 2)
              | options for i in range(3)]
    refs, twins = [start(w) for w in weights], [nn.Parameter(w.clone()) for w in weights[GROUPS[2]]]
    adamw = torch.optim.AdamW(twins, weight_decay=0.4, betas=groups[2]["betas"], eps=groups[2]["eps"])
    for t, gs in enumerate(grads):
        gs = [None if i < len(MATRICES) and (t, i) in MISSING else g for i, g in enumerate(gs)]
        for group in (*opt.param_groups, *adamw.param_groups, *groups):
            group["lr"] = 0.1 / (t + 1)
        step(opt, params, gs), step(adamw, twins, gs[GROUPS[2]])
        for part, group in zip(GROUPS, groups):
            normuon_step(refs[part], gs[part], group)
        close(params, [r.y for r in refs])
        close(params[GROUPS[2]], twins)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = copies(params)
    step(opt, params, grads[0])
    same(params, before)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_normuon_without_rows_is_muon_up_to_the_documented_scale(shape):
    """A step of torch's match_rms_adamw is ours times ‖P‖_F / √min(m,n); it computes in bfloat16, hence 2%."""
    (w,), grads = draw([shape], 6)
    a, b, M = nn.Parameter(w.clone()), nn.Parameter(w.clone()), torch.zeros(shape)
    ours = NorMuon([a], lr=0.1, momentum=0.95, weight_decay=0.2, normalize_rows=False)
    muon = torch.optim.Muon([b], lr=0.1, momentum=0.95, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for (g,) in grads:
        before = copies([a, b])
        step(ours, [a], [g]), step(muon, [b], [g])
        u_ours, u_muon = (0.98 * old - new.detach() for old, new in zip(before, (a, b)))
        M = 0.95 * M + 0.05 * g
        scale = polar(0.05 * g + 0.95 * M).norm().item() / math.sqrt(min(shape))
        assert (scale * u_ours - u_muon).norm() < 0.02 * u_muon.norm()


# ---------------------------------------------------------------- AMUSE and ScheduleFree+: the mathematics

RIVALS = {
    "amuse": {}, "amuse fast": FAST, "amuse r 1": FAST | {"averaging_power": 1.0, "warmup_steps": 9},
    "amuse T0 2": FAST | {"warmup_steps": 2, "rho": 0.3}, "amuse β1 1": FAST | {"betas": (1.0, 0.9), "eps": 1e-3},
    "amuse no momentum": FAST | {"momentum": 0.0, "weight_decay": 0.0, "ns_steps": 3, "rho": 0.0},
    "plus": {}, "plus fast": PLUS_FAST, "plus annealed": PLUS_FAST | {"beta_anneal_steps": 20},
    "plus r 2": PLUS_FAST | {"averaging_power": 2.0}, "plus start": PLUS_FAST | {"averaging_start": 8, "averaging_power": 1.0},
    "plus βp": PLUS_FAST | {"polyak_beta": 0.9}, "plus betas": PLUS_FAST | {"betas": (0.0, 0.8), "eps": 0.03},
    "plus all": PLUS_FAST | {"beta_anneal_steps": 10, "averaging_power": 2.0, "averaging_start": 6, "polyak_beta": 0.9},
}


@pytest.mark.parametrize("overrides", [({}, {}, {}), OVERRIDES], ids=["", "overrides"])
@pytest.mark.parametrize("still", [(), (0, 1)], ids=["", "still"])
@pytest.mark.parametrize("case", RIVALS)
def test_rivals(case, still, overrides):
    """Past the end of warm-up and annealing; gradients are zero in two steps, or in the first; loss + I is once below 0."""
    losses = [None if t in (7, 8, *still) else -1e4 if t == 12 else 60.0 + 20 * math.sin(t) for t in range(32)]
    run_both(RIVALS[case], overrides, cls=AMUSE if "amuse" in case else ScheduleFreePlus, losses=losses, tol=1e-10)


@pytest.mark.parametrize("cls, options", [
    (AMUSE, FAST | {"warmup_steps": 100}), (ScheduleFreePlus, PLUS_FAST | {"polyak_beta": 0.9})], ids=["AMUSE", "plus"])
def test_rivals_with_overrides_a_schedule_and_missing_gradients(cls, options):
    """While β stands still."""
    run_both(options, OVERRIDES, (1.0, 0.5, 2.0, 0.0, 1.5), MISSING, cls=cls, losses=[60.0] * 32, tol=1e-10)


@every
def test_a_step_without_gradient_leaves_average_and_z(cls):
    """Also where the step changes the β of the others."""
    weights, grads = draw(SHAPES, 7)
    params, opt = make(weights, cls, **KNOBS[cls])
    for gs in grads[:4]:
        step(opt, params, gs)
    opt.eval()
    x, z = copies(params), [opt.state[p]["z"].clone() for p in params]
    opt.train()
    for gs in grads[4:]:
        step(opt, params, [None if i in (1, 8) else g for i, g in enumerate(gs)])
    opt.eval()
    close([params[1], params[8]], [x[1], x[8]], 1e-6)
    same([opt.state[params[i]]["z"] for i in (1, 8)], [z[1], z[8]])


# ---------------------------------------------------------------- many processes

# 5 and 2 matrices of one shape, which neither 2 nor 3 processes divide; 5, 7, 8 and 11 rows, split unevenly; 1 and 2
# rows, which leave a process without any. The last one belongs to the root.
BLOCKS = [[(8, 6), (8, 6), (5, 9), (1, 4), (6,)], [(8, 6), (8, 6), (8, 6), (5, 9), (2, 7), (7, 3), (1,)], [(11, 6)]]


class Given(nn.Module):
    """Weights whose gradients are given, through the real hooks of fully_shard: the loss is Σ ⟨w, g⟩."""

    def __init__(self, weights, blocks=()):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for i, w in enumerate(weights):
            self.register_parameter(f"w{i}", nn.Parameter(w.clone()))

    def forward(self, grads):  # one list for each block, then its own
        own = sum((w * g).sum() for w, g in zip(self.parameters(recurse=False), grads[-1]) if g is not None)
        return own + sum(block([part]) for block, part in zip(self.blocks, grads))


def train_given(shard, cls, options):
    """20 steps. Returns all parameters, the hidden matrices among them, and the optimizer."""
    weights, grads = draw(sum(BLOCKS, []), 20)
    missing = {(3, 0), (4, 5), (4, 6), (7, 3), (7, 11), (9, 2), (9, 4), (11, 12)}
    split = lambda row: [[row.pop(0) for _ in block] for block in BLOCKS]
    first, second, own = split(weights)
    model = Given(own, [Given(first), Given(second)])
    for module in (*model.blocks, model):
        shard(module)
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.blocks.parameters() if p.ndim != 2] + [model.w0]  # the embedding has two dimensions
    opt = cls([{"params": hidden}, {"params": rest, "use_muon": False}], **{"lr": 0.02, "weight_decay": 0.4} | options)
    for t, gs in enumerate(grads):
        loss = model(split([None if (t, i) in missing else g for i, g in enumerate(gs)]))
        loss.backward()
        opt.step(lambda: 90 + loss)  # on every process the same, and so their mean
        opt.zero_grad()
    return list(model.parameters()), hidden, opt


def worker():
    """One process of several: the sharded model against a plain one, which every process trains for itself."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    shape = (2, 2) if dist.get_world_size() == 4 else (1, dist.get_world_size())  # four: two copies, each on two processes
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shape[0] > 1 else mesh["shard"]
    whole = lambda tensors: [t.full_tensor() for t in tensors]
    ablated = FAST | {"decay_at": "y", "normalize_rows": False}
    for cls, options in (*KNOBS.items(), (SFNorMuon, ablated), (NorMuon, {})):
        params, hidden, opt = train_given(lambda module: None, cls, options)
        params_s, hidden_s, opt_s = train_given(lambda module: fully_shard(module, mesh=mesh), cls, options)
        close(whole(params_s), params, 1e-6)
        for p, q in zip(params, params_s):
            assert all(isinstance(v, DTensor) and v.placements == q.placements for v in opt_s.state[q].values())
            close(whole(opt_s.state[q][name] for name in opt.state[p]), opt.state[p].values(), 1e-5)
        if cls is SFNorMuon:
            found, found_s = opt.diagnostics(), opt_s.diagnostics()
            for p, q in zip(hidden, hidden_s, strict=True):
                assert found_s[q] == pytest.approx(found[p], abs=1e-5)
        if cls is not NorMuon:
            for mode in ("eval", "train"):
                getattr(opt, mode)(), getattr(opt_s, mode)()
                close(whole(params_s), params, 1e-6)
    print("agrees", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit, as in train.py


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_sharded_is_plain(processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.count("agrees") == processes


# ---------------------------------------------------------------- README


def test_readme_lines_for_your_own_loop(monkeypatch):
    """They run as they stand, move every parameter of their model, and end with the averaged weights of a good model."""
    starts = {}

    class Watched(SFNorMuon):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            starts.update({p: p.detach().clone() for group in self.param_groups for p in group["params"]})

    monkeypatch.setattr(sf_normuon, "SFNorMuon", Watched)
    readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    torch.manual_seed(0)
    exec(re.search(r"## In your own loop.*?```python\n(.*?)```", readme, re.DOTALL)[1], names := {})
    assert set(starts) == set(names["model"].parameters())
    assert all(p.isfinite().all() and not torch.equal(p, starts[p]) for p in starts)
    x = torch.randn(1000, 8)
    with torch.no_grad():
        error = (names["model"](x) - x.sin().sum(1, keepdim=True)).square().mean()
    assert error < 0.5 < 3 < x.sin().sum(1).var() and not names["opt"].param_groups[0]["train_mode"]
    with pytest.raises(RuntimeError, match="train"):
        names["opt"].step()


if __name__ == "__main__":
    worker()
