"""The rivals of `baselines.py` against float64 references from their papers' formulas, and against
the releases of torch. Each reference changes r = (x, y, z, M, v) of a parameter by assignment; M is
also AdamW's first moment.
"""
import math

import pytest
import torch
from torch import nn

from baselines import AMUSE, NorMuon, ScheduleFreePlus
from optimizers import (ALL_KNOBS, F64, FAST, GROUPS, MATRICES, MISSING, OVERRIDES, PLUS_FAST,
                        SHAPES, close, copies, draw, make, name_of, same, step)
from test_optim import polar, run_both, start

# ---- references


def adam_scale(r, g, beta2, t, eps):
    """√v̂ + ε, after the second moment of step t = 1, 2, ..."""
    r.v = beta2 * r.v + (1 - beta2) * g * g
    return (r.v / (1 - beta2**t)).sqrt() + eps


def normuon_step(params, grads, group):
    """NorMuon (arXiv:2510.05491), one step of a group, which counts t; r.y is the parameter."""
    (beta1, beta2), mu, eps = group["betas"], group["momentum"], group["eps"]
    eta, lam = group["lr"], group["weight_decay"]
    t = group["t"] = group.get("t", 0) + 1
    for r, g in zip(params, grads):
        if g is None:
            continue
        g = g.double()
        if group["use_muon"]:
            r.M = mu * r.M + (1 - mu) * g
            P = polar((1 - mu) * g + mu * r.M)
            r.v = beta2 * r.v[:, :1] + (1 - beta2) * (P * P).mean(dim=1, keepdim=True)
            P_hat = P / (r.v.sqrt() + eps) if group["normalize_rows"] else P
            length = 0.2 * math.sqrt(P.numel())
            if group["step_norm"] == "spectral":
                length = math.sqrt(P.shape[0] / P.shape[1]) * P.norm()
            d = length / P_hat.norm() * P_hat
        else:
            r.M = beta1 * r.M + (1 - beta1) * g
            d = r.M / (1 - beta1**t) / adam_scale(r, g, beta2, t, eps)
        r.y = (1 - eta * lam) * r.y - eta * d


def amuse_step(params, grads, group):
    """AMUSE (arXiv:2605.22432), one step of a group, which counts t and W and keeps c0."""
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
            P = polar((1 - mu) * g + mu * r.M, group["ns_steps"])
            d = 0.2 * math.sqrt(max(g.shape)) * P
        else:
            d = g / adam_scale(r, g, beta2, t, group["eps"])
        r.z = (1 - eta * group["weight_decay"]) * r.z - eta * d
        r.x = (1 - c) * r.x + c * r.z
        r.y = beta * r.x + (1 - beta) * r.z


def polyak(params, grads, groups, loss):
    """max(0, loss + I) / ê of ScheduleFree+, over all groups, the first of which keeps e."""
    if all(group["lr"] == 0 for group in groups):
        return 0.0
    G = I = 0.0
    for refs, gs, group in zip(params, grads, groups):
        k, A = group.get("t", 0), group["beta_anneal_steps"]
        one_minus_beta = 0.1 * (0.035 / 0.1) ** min(1, k / A) if A else 0.1
        group["beta"] = 1 - one_minus_beta
        for r, g in zip(refs, gs):
            if g is not None and group["lr"] != 0:
                G += g.double().abs().sum().item()
                I += group["beta"] * (g.double() * (r.z - r.x)).sum().item()
    first = groups[0]
    beta_p = first["polyak_beta"]
    first["e"] = beta_p * first.get("e", 0.0) + (1 - beta_p) * math.sqrt(math.pi / 2) * G
    e_hat = first["e"] / (1 - beta_p ** (first.get("t", 0) + 1))
    return max(0.0, loss + I) / e_hat if e_hat else 0.0


def plus_step(params, grads, group, ratio):
    """ScheduleFree+ (arXiv:2605.19095), one step of a group, which counts k and W."""
    if group["lr"] == 0:
        return
    (beta1, beta2), beta, k = group["betas"], group["beta"], group.get("t", 0)
    group["t"] = k + 1
    alpha = group["lr"] * min(1, (k + 1) / max(1, group["warmup_steps"])) * ratio
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
        r.M = beta1 * r.M + (1 - beta1) * g
        m_hat = r.M / (1 - beta1 ** (k + 1))
        r.z = r.z - alpha * m_hat / adam_scale(r, g, beta2, k + 1, group["eps"])
        r.x = (1 - c) * r.x + c * r.z
        r.y = beta * r.x + (1 - beta) * r.z


def amuse_groups(params, grads, groups, loss):
    for part in zip(params, grads, groups):
        amuse_step(*part)
    return params


def plus_groups(params, grads, groups, loss):
    ratio = polyak(params, grads, groups, loss)
    for part in zip(params, grads, groups):
        plus_step(*part, ratio)
    return params


AMUSE_REFERENCE = dict(cls=AMUSE, reference=amuse_groups, defaults=dict(
    lr=0.01, betas=(0.6, 0.999), momentum=0.95, weight_decay=0.05, warmup_steps=6000, rho=0.8,
    averaging_power=0.0, eps=1e-10, ns_steps=5))
PLUS_REFERENCE = dict(cls=ScheduleFreePlus, reference=plus_groups, defaults=dict(
    lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, averaging_power=0.0,
    averaging_start=0, polyak_beta=0.0, beta_anneal_steps=0, eps=1e-8))

# ---- NorMuon


@pytest.mark.parametrize("options", [{}, {"normalize_rows": False}, {"momentum": 0.0},
                                     {"step_norm": "spectral"},
                                     {"betas": (0.8, 0.7), "eps": 0.01}], ids=str)
def test_normuon(options):
    """Against its formulas, AdamW groups against torch's AdamW too, while lr changes; and at lr 0
    nothing moves."""
    weights, grads = draw(SHAPES, 12, F64)
    params, opt = make(weights, NorMuon, lr=0.1, weight_decay=0.4, **options, ns_dtype=F64)
    knobs = dict(betas=(0.9, 0.95), momentum=0.95, eps=1e-8, weight_decay=0.4,
                 normalize_rows=True, step_norm="rms")
    groups = [knobs | {"use_muon": i < 2} | options for i in range(3)]
    refs, twins = [start(w) for w in weights], [nn.Parameter(w.clone()) for w in weights[GROUPS[2]]]
    adamw = torch.optim.AdamW(twins, **{name: groups[2][name]
                                        for name in ("betas", "eps", "weight_decay")})
    for t, gs in enumerate(grads):
        missing = lambda i: i < len(MATRICES) and (t, i) in MISSING
        gs = [None if missing(i) else g for i, g in enumerate(gs)]
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
    """torch's match_rms_adamw steps ‖P‖_F / √min(m,n) times ours; it computes in bfloat16: 2%."""
    (w,), grads = draw([shape], 6)
    a, b, M = nn.Parameter(w.clone()), nn.Parameter(w.clone()), torch.zeros(shape)
    knobs = dict(lr=0.1, momentum=0.95, weight_decay=0.2)
    ours = NorMuon([a], **knobs, normalize_rows=False)
    muon = torch.optim.Muon([b], **knobs, adjust_lr_fn="match_rms_adamw")
    for (g,) in grads:
        before = copies([a, b])
        step(ours, [a], [g]), step(muon, [b], [g])
        u_ours, u_muon = (0.98 * old - new.detach() for old, new in zip(before, (a, b)))
        M = 0.95 * M + 0.05 * g
        scale = polar(0.05 * g + 0.95 * M).norm().item() / math.sqrt(min(shape))
        assert (scale * u_ours - u_muon).norm() < 0.02 * u_muon.norm()


# ---- AMUSE and ScheduleFree+

RIVALS = {
    "amuse": {},
    "amuse fast": FAST,
    "amuse r 1": FAST | {"averaging_power": 1.0, "warmup_steps": 9},
    "amuse T0 2": FAST | {"warmup_steps": 2, "rho": 0.3},
    "amuse β1 1": FAST | {"betas": (1.0, 0.9), "eps": 1e-3},
    "amuse no momentum": FAST | {"momentum": 0.0, "weight_decay": 0.0, "ns_steps": 3, "rho": 0.0},
    "plus": {},
    "plus fast": PLUS_FAST,
    "plus annealed": PLUS_FAST | {"beta_anneal_steps": 20},
    "plus r 2": PLUS_FAST | {"averaging_power": 2.0},
    "plus start": PLUS_FAST | {"averaging_start": 8, "averaging_power": 1.0},
    "plus βp": PLUS_FAST | {"polyak_beta": 0.9},
    "plus betas": PLUS_FAST | {"betas": (0.0, 0.8), "eps": 0.03},
    "plus all": PLUS_FAST | {"beta_anneal_steps": 10, "averaging_power": 2.0, "averaging_start": 6,
                             "polyak_beta": 0.9},
}


@pytest.mark.parametrize("overrides", [({}, {}, {}), OVERRIDES], ids=["", "overrides"])
@pytest.mark.parametrize("still", [(), (0, 1)], ids=["", "still"])
@pytest.mark.parametrize("case", RIVALS)
def test_rivals(case, still, overrides):
    """Past the end of warm-up and annealing; gradients are zero in two steps, or in the first;
    loss + I is once below 0."""
    losses = [60.0 + 20 * math.sin(t) for t in range(32)]
    losses[12] = -1e4
    for t in (7, 8, *still):
        losses[t] = None
    rival = AMUSE_REFERENCE if "amuse" in case else PLUS_REFERENCE
    run_both(RIVALS[case], overrides, losses=losses, tol=1e-10, **rival)


@pytest.mark.parametrize("rival, options", [
    (AMUSE_REFERENCE, FAST | {"warmup_steps": 100}),
    (PLUS_REFERENCE, PLUS_FAST | {"polyak_beta": 0.9})], ids=["AMUSE", "plus"])
def test_rivals_with_overrides_a_schedule_and_missing_gradients(rival, options):
    """While β stands still."""
    factors = (1.0, 0.5, 2.0, 0.0, 1.5)
    run_both(options, OVERRIDES, factors, MISSING, losses=[60.0] * 32, tol=1e-10, **rival)


# ---- stacks

@pytest.mark.parametrize("cls", [NorMuon, AMUSE], ids=name_of)
def test_each_matrix_of_a_stack_moves_as_it_would_alone(cls):
    """A parameter (E, m, n) is E matrices."""
    weights, grads = draw([(4, 6, 9), (5, 7, 7), (6, 9)], 5, F64)
    alone = lambda tensors: [M for t in tensors for M in t.reshape(-1, *t.shape[-2:])]
    params = [nn.Parameter(w.clone()) for w in weights]
    singles = [nn.Parameter(w.clone()) for w in alone(weights)]
    opts = [cls(ps, **ALL_KNOBS[cls], ns_dtype=F64) for ps in (params, singles)]
    for gs in grads:
        step(opts[0], params, gs), step(opts[1], singles, alone(gs))
        close(alone(params), singles)
