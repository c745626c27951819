"""Algorithm 1 of the paper (arXiv:2605.23061) as an executable specification, and the tests that
hold `SFNorMuon` to it.

The specification comes first: float64, the paper's formulas in the paper's order and by its names,
nothing in place. `sf_normuon.py` is the same made fast, and stores fewer of the sequences.
"""
import importlib.util
import math
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sf_normuon
from model import GPT, GPTConfig
from optimizers import (  # tests/optimizers.py
    BF16, F32, F64, FAST, GROUPS, KNOBS, MATRICES, MISSING, OVERRIDES, SHAPES, close, draw, make,
    randn, step)
from sf_normuon import SFNorMuon, newton_schulz, param_groups

# ---- Algorithm 1: one step makes a new w = (x, y, z, M, v) of the old one


def start(w):
    """A parameter before the first step: x = y = z, and no moments yet."""
    w = w.detach().double()
    return SimpleNamespace(x=w, y=w, z=w, M=torch.zeros_like(w), v=torch.zeros_like(w))


def polar(M, ns_steps=5):
    """Newton-Schulz: from X = M / ‖M‖_F, ns_steps times X ← a X + b (XXᵀ) X + c (XXᵀ)² X."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = M.double() / M.double().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-300)
    for _ in range(ns_steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def coefficients(group):
    """Counts t and sums up s in the group; returns η_t, c and β1 of this step."""
    beta1, T_warmup = group["betas"][0], max(1, group["warmup_steps"])
    t = group["t"] = group.get("t", 0) + 1
    eta = group["lr"] * min(1, t / T_warmup)
    # averaging_power: r of Schedule-Free. The paper's method has r = 0: c = η_t² / s.
    weight = t ** group["averaging_power"] * eta**2
    s = group["s"] = group.get("s", 0) + weight
    c = weight / s
    # beta_power: p, after AMUSE, with T_warmup / t for its S. The paper has p = 0: β1 stays.
    if t > T_warmup:
        beta1 = 1 - (1 - beta1) * (T_warmup / t) ** group["beta_power"]
    return eta, c, beta1


def matrix_step(w, g, eta, c, beta1, group):
    """The step of a hidden weight matrix of shape (m, n)."""
    mu, beta2, eps, lam = group["momentum"], group["betas"][1], group["eps"], group["weight_decay"]
    m, n = g.shape
    M = mu * w.M + (1 - mu) * g
    P = polar(M, group["ns_steps"])
    v = w.v[:, :1]  # one entry per row, (m, 1); start() makes v as large as w
    v = beta2 * v + (1 - beta2) * (P * P).mean(dim=1, keepdim=True)
    P_hat = P / (v.sqrt() + eps) if group["normalize_rows"] else P  # False: the ablation of Fig. 3
    decayed = {"z": w.z, "y": w.y, "none": 0}[group["decay_at"]]  # "y" and "none": those of Fig. 2
    length = 0.2 * math.sqrt(m * n)  # so that P̂ has an RMS of 0.2
    if group["step_norm"] == "spectral":  # not the paper's: P̂ of P's length, times √(m/n)
        length = math.sqrt(m / n) * P.norm()
    norm = P_hat.norm() or 1  # zero gradients: P̂ = 0 takes no step
    u = eta * lam * decayed + eta * length / norm * P_hat
    z = w.z - u
    x = (1 - c) * w.x + c * z
    y = (1 - beta1) * z + beta1 * x
    return SimpleNamespace(x=x, y=y, z=z, M=M, v=v)


def other_step(w, g, eta, c, beta1, group):
    """The step of everything else (embeddings, output heads, gains): schedule-free AdamW."""
    beta2, eps, lam, t = group["betas"][1], group["eps"], group["weight_decay"], group["t"]
    v = beta2 * w.v + (1 - beta2) * g * g
    decayed = {"z": w.z, "y": w.y, "none": 0}[group["decay_at"]]
    u = eta * lam * decayed + eta * g / ((v / (1 - beta2**t)).sqrt() + eps)
    z = w.z - u
    x = (1 - c) * w.x + c * z
    y = (1 - beta1) * z + beta1 * x
    return SimpleNamespace(x=x, y=y, z=z, M=w.M, v=v)


def algorithm_1(weights, grads, group):
    """One step of a group. A parameter without a gradient keeps x and z; at lr 0 all stays."""
    if group["lr"] == 0:
        return weights
    eta, c, beta1 = coefficients(group)
    take_step = matrix_step if group["use_muon"] else other_step
    after = []
    for w, g in zip(weights, grads):
        if g is None:
            y = (1 - beta1) * w.z + beta1 * w.x
            after.append(SimpleNamespace(**vars(w) | {"y": y}))
        else:
            after.append(take_step(w, g.double(), eta, c, beta1, group))
    return after


DEFAULTS = dict(lr=0.008, betas=(0.9, 0.95), adam_betas=(0.95, 0.99), momentum=0.8,
                weight_decay=0.05, warmup_steps=2000, eps=1e-8, ns_steps=5, decay_at="z",
                normalize_rows=True, step_norm="rms", averaging_power=0.0, beta_power=0.0)

# ---- newton_schulz

SIZES = [(32, 32), (64, 24), (24, 64), (3, 2, 20, 48), (5, 7), (1, 16), (16, 1), (1, 1), (257, 257),
         (2, 260, 600)]
GIVEN = {str(size): randn(*size) for size in SIZES}
GIVEN["rank 8 of 32"] = randn(32, 8) @ randn(8, 40, seed=1)
NS_ERROR = 485e-6  # float32 rounding, grown by the slope of the iteration at zero, 3.4445⁵ = 485


@pytest.mark.parametrize("scale", [1, 1e-15, 1e15])
@pytest.mark.parametrize("name", GIVEN)
def test_newton_schulz_brings_singular_values_near_one(name, scale):
    G = GIVEN[name] * scale
    P = newton_schulz(G.float()).double()
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    s_out = (U.mT @ P @ Vh.mT).diagonal(dim1=-2, dim2=-1)  # in the order of s: it is not monotone
    large = s_out[s > 0.01 * s.norm(dim=-1, keepdim=True)]
    assert 0.68 <= large.min() and large.max() <= 1.14
    close([P], [polar(G)], NS_ERROR)
    close([newton_schulz(G)], [P], NS_ERROR)  # float32 inside by default
    close([newton_schulz(G, dtype=F64)], [polar(G)], 1e-12)
    close([newton_schulz(G, 3, F64)], [polar(G, 3)], 1e-12)


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


@pytest.mark.parametrize("steps", [1, 4, 6, 7, 9])
def test_any_number_of_newton_schulz_steps(steps):
    """The Gram form computes XXᵀ again after every three steps: each remainder is tried."""
    for shape in [(24, 64), (64, 24), (1, 7)]:
        G = randn(*shape)
        close([newton_schulz(G, steps, F64)], [polar(G, steps)], 1e-9)


def test_the_gram_form_is_as_exact_as_the_plain_one():
    """Also for small singular values: without a new XXᵀ after three steps, the error is 2e-4."""
    U, _, Vh = torch.linalg.svd(randn(24, 64), full_matrices=False)
    G = U * torch.logspace(0, -4, 24, dtype=F64) @ Vh
    close([newton_schulz(G.float()), newton_schulz(G.float().mT)], [polar(G), polar(G).mT], 1e-5)


def test_compiled_newton_schulz_compiles_once_per_shape(monkeypatch):
    """What runs on CUDA, without the compiler's code generation: no graph breaks, nothing compiled
    twice, and more shapes than torch's limit of 8, beyond which a fullgraph function raises.
    """
    compile_ = torch.compile
    eagerly = lambda f, **options: compile_(f, **options | {"backend": "aot_eager"})
    monkeypatch.setattr(torch, "compile", eagerly)
    spec = importlib.util.spec_from_file_location("sf_normuon_compiled", sf_normuon.__file__)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.iteration = module.compile_iteration()  # on the CPU too
    torch._dynamo.reset()
    graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    sizes = [(8, 8), (32, 8), (8, 32), (16, 24), (1, 7), (7, 1)]
    for seed in range(3):
        for shape in [(*B, m, n) for m, n in sizes for B in [(3,), ()]]:
            X = (randn(*shape, seed=seed) * 10.0**seed).float()
            close([module.newton_schulz(X)], [newton_schulz(X)], NS_ERROR)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


# ---- SFNorMuon beside the reference

CASES = {
    "defaults": {},
    "fast": FAST,
    "warming up": FAST | {"warmup_steps": 100},
    "no warm-up": FAST | {"warmup_steps": 0},
    "decay at y": FAST | {"decay_at": "y"},
    "decay nowhere": FAST | {"decay_at": "none"},
    "no decay": FAST | {"weight_decay": 0.0},
    "no momentum": FAST | {"momentum": 0.0},
    "rows as they are": FAST | {"normalize_rows": False},
    "spectral": FAST | {"step_norm": "spectral"},
    "spectral, rows as they are": FAST | {"step_norm": "spectral", "normalize_rows": False},
    "large eps": FAST | {"eps": 0.1},
    "betas": FAST | {"betas": (0.6, 0.8)},
    "adam_betas": FAST | {"adam_betas": (0.7, 0.9)},
    "y is x": FAST | {"betas": (1.0, 0.0), "adam_betas": (1.0, 0.0)},
    "3 Newton-Schulz steps": FAST | {"ns_steps": 3},
    "r 2": FAST | {"averaging_power": 2.0},
    "p ½": FAST | {"beta_power": 0.5},
    "p ½, no warm-up": FAST | {"beta_power": 0.5, "warmup_steps": 0},
    "r 2, p 1, decay at y": FAST | {"averaging_power": 2.0, "beta_power": 1.0, "warmup_steps": 3,
                                    "decay_at": "y"},
}


def all_groups(weights, grads, groups, loss):
    """Algorithm 1 knows no loss, and its groups know nothing of each other."""
    return [algorithm_1(*group) for group in zip(weights, grads, groups)]


def run_both(options, overrides=({}, {}, {}), factors=(1.0,), missing=(), dtype=F64, tol=1e-11,
             losses=(60.0,) * 12, cls=SFNorMuon, defaults=DEFAULTS, reference=all_groups):
    """The optimizer beside its reference: y in train mode, z in the state, x in eval mode.

    They take a step for each loss; where it is None, all gradients are zero. The rates are
    multiplied by the factors in turn. Returns params, opt, and the reference's parameters, after
    the last step and before it.
    """
    weights, grads = draw(SHAPES, len(losses), dtype)
    inside = {"ns_dtype": dtype} if "ns_steps" in defaults else {}
    params, opt = make(weights, cls, overrides, **options, **inside)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: factors[t % len(factors)])
    groups = [defaults | options | {"use_muon": i < 2} for i in range(3)]
    groups[2]["betas"] = groups[2].get("adam_betas", groups[2]["betas"])
    groups = [group | own for group, own in zip(groups, overrides)]
    refs, lrs = [start(w) for w in weights], [group["lr"] for group in groups]
    for t, loss in enumerate(losses):
        gs = [g if loss else 0 * g for g in grads[t]]
        gs = [None if (t, i) in missing else g for i, g in enumerate(gs)]
        step(opt, params, gs, loss or 60.0)
        scheduler.step()
        for group, lr in zip(groups, lrs):
            group["lr"] = lr * factors[t % len(factors)]
        before, by_group = refs, lambda row: [row[part] for part in GROUPS]
        refs = sum(reference(by_group(refs), by_group(gs), groups, loss or 60.0), [])
        close(params, [w.y for w in refs], tol)
        z = [opt.state[p]["z"] if opt.state.get(p) else p for p in params]
        close(z, [w.z for w in refs], tol)
        if t % 4 in (0, 3):
            opt.eval()
            close(params, [w.x for w in refs], tol)
            opt.train()
    return params, opt, refs, before


@pytest.mark.parametrize("case", CASES)
def test_algorithm_1(case):
    run_both(CASES[case])


@pytest.mark.parametrize("knobs", [{"decay_at": "z"}, {"decay_at": "y"}, {"decay_at": "none"},
                                   KNOBS[SFNorMuon]], ids=str)
def test_algorithm_1_with_overrides_a_schedule_and_missing_gradients(knobs):
    """The schedule passes 0; the first gradient of two parameters comes late."""
    run_both(FAST | knobs, OVERRIDES, (1.0, 0.5, 2.0, 0.0, 1.5), MISSING)


def test_algorithm_1_in_float32():
    """A step is 0.02 P̂: 12 roundings of weights below 4, and 12 errors of Newton-Schulz."""
    run_both(FAST, dtype=F32, tol=12 * (4 * 6e-8 + 0.02 * 485 * 6e-8))


def test_the_defaults_are_the_papers():
    """Every knob of the specification is a keyword with the same default."""
    group = SFNorMuon([nn.Parameter(randn(3, 2))]).param_groups[0]
    assert {name: group[name] for name in DEFAULTS} == DEFAULTS and group["use_muon"]


@pytest.mark.parametrize("options", [FAST, FAST | {"normalize_rows": False},
                                     FAST | {"step_norm": "spectral"}], ids=str)
def test_zero_gradients(options):
    """Of everything, at the start and later, and of one matrix and one row among others."""
    weights, grads = draw(MATRICES, 5, F64)
    params, refs = [nn.Parameter(w.clone()) for w in weights], [start(w) for w in weights]
    opt = SFNorMuon(params, **options, ns_dtype=F64)
    group = DEFAULTS | options | {"use_muon": True}
    for t, gs in enumerate(grads):
        for g in gs if t in (0, 3) else (gs[0], gs[2][1]):
            g.zero_()
        step(opt, params, gs)
        refs = algorithm_1(refs, gs, group)
        close(params, [w.y for w in refs])
        assert all(math.isfinite(v) for d in opt.diagnostics().values() for v in d.values())


@pytest.mark.parametrize("shape", [(24, 40), (512, 640)], ids=str)
def test_matrices_of_one_shape_move_as_they_would_alone(shape):
    weights, grads = draw([shape] * 3, 2)

    def after(chosen):
        params = [nn.Parameter(weights[i].clone()) for i in chosen]
        opt = SFNorMuon(params, ns_dtype=F64)
        for gs in grads:
            step(opt, params, [gs[i] for i in chosen])
        return params

    close(after([0, 1, 2]), [after([i])[0] for i in range(3)], 1e-6)


@pytest.mark.parametrize("knobs", [{}, {"normalize_rows": False}, {"step_norm": "spectral"}],
                         ids=str)
def test_each_matrix_of_a_stack_moves_as_it_would_alone(knobs):
    """A parameter (E, m, n), such as the experts of a layer, is E matrices, beside other shapes."""
    weights, grads = draw([(4, 6, 9), (5, 7, 7), (4, 6, 9), (6, 9)], 5, F64)
    params = [nn.Parameter(w.clone()) for w in weights]
    options = FAST | knobs
    opt, group = SFNorMuon(params, **options, ns_dtype=F64), DEFAULTS | options | {"use_muon": True}
    alone = lambda tensors: [M for t in tensors for M in t.reshape(-1, *t.shape[-2:])]
    refs = [start(w) for w in alone(weights)]
    for gs in grads:
        step(opt, params, gs)
        refs = algorithm_1(refs, alone(gs), group)
        close(alone(params), [w.y for w in refs])
    opt.eval()
    close(alone(params), [w.x for w in refs])
    assert opt.state[params[0]]["row_second_moment"].shape == (4, 6, 1)
    assert set(opt.diagnostics()) == {params[3]}  # which is of matrices


@pytest.mark.parametrize("warmup_steps", [0, 6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_sf_adamw_is_the_released_one(warmup_steps, weight_decay):
    schedulefree = pytest.importorskip("schedulefree")
    weights, grads = draw(SHAPES, 15, F64)
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    knobs = dict(lr=0.05, betas=(0.9, 0.97), eps=1e-6, weight_decay=weight_decay,
                 warmup_steps=warmup_steps)
    group = {"params": ours, "use_muon": False, "betas": knobs["betas"]}
    opt = SFNorMuon([group], **knobs, decay_at="y")
    released = schedulefree.AdamWScheduleFree(theirs, **knobs, r=0.0, weight_lr_power=2.0)
    for gs in grads:
        opt.train(), released.train()
        step(opt, ours, gs), step(released, theirs, gs)
        close(ours, theirs)
        opt.eval(), released.eval()
        close(ours, theirs)


# ---- diagnostics

@pytest.mark.parametrize("step_norm", ["rms", "spectral"])
def test_diagnostics(step_norm):
    """ρ, α and the predicted λρ of every matrix, from the state as it stands, in both modes."""
    params, opt, refs, before = run_both(FAST | {"eps": 1e-3, "step_norm": step_norm})
    for mode in (opt.train, opt.eval):
        mode()
        found = opt.diagnostics()
        assert set(found) == set(params[:len(MATRICES)])
        for p, w, last in zip(params[:len(MATRICES)], refs, before):
            P = polar(w.M)
            P_hat = P / (w.v.sqrt() + 1e-3)
            rms = 0.2 if step_norm == "rms" else P.norm().item() / p.shape[1]
            alpha = ((last.z * P_hat).sum() / (last.z.norm() * P_hat.norm())).item()
            expected = {"rho": w.z.square().mean().sqrt().item(), "alpha": alpha,
                        "predicted": rms / 2 * (-alpha + math.sqrt(alpha**2 + 2 * 0.1 * 0.4))}
            assert found[p] == pytest.approx(expected, abs=1e-10)


def test_steady_state():
    """Under random gradients ρ settles where the prediction says."""
    gen, params = torch.Generator().manual_seed(5), [nn.Parameter(randn(24, 32).float())]
    # It settles in 1 / 2ηλ = 50 steps.
    opt = SFNorMuon(params, lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=10)
    found = []
    for t in range(900):
        step(opt, params, [torch.randn(24, 32, generator=gen)])
        if t >= 400:
            found += opt.diagnostics().values()
    rho, predicted = ([d[name] for d in found] for name in ("rho", "predicted"))
    assert 0.1 * sum(rho) == pytest.approx(sum(predicted), rel=0.02)
    assert max(abs(b - a) / a for a, b in zip(rho, rho[1:])) < 0.01


# ---- param_groups

class Expert(nn.Module):
    """A block with everything that has two dimensions or looks so."""

    def __init__(self, width, words):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.router = nn.Linear(width, words, bias=False)  # as many outputs as there are words
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, 3)
        self.own = nn.Parameter(torch.zeros(width, width))
        self.stack = nn.Parameter(torch.zeros(3, width, width))


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.EmbeddingBag(5, 8)
        self.blocks = nn.ModuleList(Expert(8, 11) for _ in range(2))
        self.first = nn.Linear(8, 16)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.words.weight


@pytest.mark.parametrize("tied", [True, False])
def test_param_groups(tied):
    """Hidden matrices, and all else: embeddings, heads, and what has not two dimensions."""
    model = Model(tied)
    matrices, rest = param_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in matrices["params"]}
    inside = ("up.weight", "router.weight", "own")
    hidden = {f"blocks.{i}.{name}" for i in range(2) for name in inside}
    assert found == hidden | {"first.weight"}
    assert matrices.get("use_muon", True) and rest["use_muon"] is False
    assert len(matrices["params"] + rest["params"]) == len(names)  # each once
    assert {id(p) for p in matrices["params"] + rest["params"]} == set(names)
    opt = SFNorMuon(param_groups(model))
    assert [group["betas"] for group in opt.param_groups] == [(0.9, 0.95), (0.95, 0.99)]


def test_param_groups_of_our_own_model():
    gpt = GPT(GPTConfig(vocab_size=96, block_size=8, n_layer=2, n_head=2, n_embd=96))
    matrices, rest = param_groups(gpt)
    blocks = [p for name, p in gpt.named_parameters() if p.ndim == 2 and p is not gpt.wte.weight]
    assert [id(p) for p in matrices["params"]] == [id(p) for p in blocks] and len(blocks) == 12
    assert len(rest["params"]) + 12 == len(list(gpt.parameters()))


# ---- README

def test_readme_lines_for_your_own_loop(monkeypatch):
    """They run as they stand, move all of their model, and end with the averaged weights."""
    starts = {}

    class Watched(SFNorMuon):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            params = [p for group in self.param_groups for p in group["params"]]
            starts.update({p: p.detach().clone() for p in params})

    monkeypatch.setattr(sf_normuon, "SFNorMuon", Watched)
    readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    torch.manual_seed(0)
    lines = re.search(r"## In your own loop.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    exec(lines, names := {})
    assert set(starts) == set(names["model"].parameters())
    assert all(p.isfinite().all() and not torch.equal(p, starts[p]) for p in starts)
    x = torch.randn(1000, 8)
    with torch.no_grad():
        error = (names["model"](x) - x.sin().sum(1, keepdim=True)).square().mean()
    assert error < 0.5 < 3 < x.sin().sum(1).var()
    assert not names["opt"].param_groups[0]["train_mode"]
    with pytest.raises(RuntimeError, match="train"):
        names["opt"].step()
    exec(re.search(r"```python\n(steps = .*?)```", readme, re.DOTALL)[1], names)  # recommended
    names["opt"].step()
    assert names["opt"].param_groups[1]["beta_power"] == 0.3
