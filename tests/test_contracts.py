"""The contracts of the optimizers: modes, state, refusals, and other people's tools around them."""
import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoint_helpers

from baselines import AMUSE, NorMuon, ScheduleFreePlus
from conftest import ENV, REPO
from optimizers import (ALL_KNOBS, BF16, F16, F32, F64, FAST, GROUPS, KNOBS, MATRICES, MISSING,
                        OVERRIDES, SHAPES, all_classes, close, copies, draw, every, make, name_of,
                        same, same_run, spectral, step)
from sf_normuon import SFNorMuon

# ---- values and parameters that are refused

COMMON = [{"lr": -1.0}, {"lr": math.nan}, {"betas": (1.1, 0.95)}, {"betas": (-0.1, 0.95)},
          {"betas": (0.9, 1.0)}, {"betas": (0.9, -0.1)}, {"weight_decay": -0.1}, {"eps": 0.0},
          {"lr": math.inf}]
FREE = [*COMMON, {"warmup_steps": -1}]
MATRIX = [{"momentum": 1.0}, {"momentum": -0.1}, {"ns_steps": -1}, {"ns_steps": 0}]
BAD = {
    SFNorMuon: [*FREE, {"betas": (0.0, 0.95)}, *MATRIX, {"decay_at": "x"}, {"decay_at": "off"},
                {"averaging_power": -1.0}, {"beta_power": -0.1}, {"step_norm": "RMS"}],
    AMUSE: [*FREE, {"betas": (0.0, 0.95)}, *MATRIX, {"warmup_steps": 1}, {"rho": -0.1},
            {"averaging_power": -1.0}],
    ScheduleFreePlus: [*FREE, {"betas": (1.0, 0.95)}, {"polyak_beta": 1.0}, {"polyak_beta": -0.1},
                       {"averaging_power": -1.0}, {"averaging_start": -1},
                       {"beta_anneal_steps": -1}, {"sf_beta": 0.0}, {"sf_beta": 1.0}],
    NorMuon: [*COMMON, {"betas": (1.0, 0.95)}, *MATRIX, {"step_norm": "RMS"}],
}


@pytest.mark.parametrize("cls, bad", [(cls, bad) for cls in BAD for bad in BAD[cls]], ids=name_of)
def test_values_out_of_range_are_refused(cls, bad):
    """Of the constructor and of a group, which may have any of the knobs for itself."""
    (name,) = bad
    for options, own in ((bad, {}), ({}, bad)):
        with pytest.raises(ValueError, match=name.rstrip("s")):
            cls([{"params": [nn.Parameter(torch.zeros(3, 2))], **own}], **options)


@pytest.mark.parametrize("bad", [(0.0, 0.99), (1.1, 0.99), (0.9, 1.0)], ids=str)
def test_adam_betas_out_of_range_are_refused(bad):
    group = {"params": [nn.Parameter(torch.zeros(3))], "use_muon": False}
    with pytest.raises(ValueError, match="beta"):
        SFNorMuon([group], adam_betas=bad)
    with pytest.raises(ValueError, match="beta"):  # though no group has them yet
        SFNorMuon([nn.Parameter(torch.zeros(3, 2))], adam_betas=bad)


@all_classes
def test_a_refused_group_leaves_no_trace_and_groups_are_not_shared(cls):
    (w, b), grads = draw([(3, 2), (4,)], 2)
    groups = [{"params": [nn.Parameter(w)], "use_muon": True}]
    opt, (p,) = cls(groups, **ALL_KNOBS[cls]), groups[0]["params"]
    given = {"params": [nn.Parameter(b)], "lr": -1.0, "use_muon": False}
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group(given)
    assert len(opt.param_groups) == 1 and given.keys() == {"params", "lr", "use_muon"}
    step(opt, [p], grads[0][:1])
    assert opt.param_groups[0]["step"] == 1
    groups[0]["params"] = iter([p])
    cls(groups)
    assert groups[0]["params"] == [p]  # as torch leaves it
    another = cls(groups, lr=0.5)  # of the same dicts, which hold no counters
    assert another.param_groups[0]["step"] == 0 and another.param_groups[0]["lr"] == 0.5


def test_adam_betas_are_for_groups_of_the_rest_without_betas_of_their_own():
    """betas never reaches those groups, whether they come at the start or later."""
    def betas(**knobs):
        groups = [{}, {"betas": (0.5, 0.6)}, {"use_muon": False},
                  {"use_muon": False, "betas": (0.5, 0.6)}]
        groups = [{"params": [nn.Parameter(torch.zeros(3, 2))], **group} for group in groups]
        opt = SFNorMuon(groups[:2], **knobs)
        for group in groups[2:]:
            opt.add_param_group(group)
        assert SFNorMuon(groups, **knobs).state_dict() == opt.state_dict()
        return [group["betas"] for group in opt.param_groups]

    own = (0.5, 0.6)
    assert betas() == [(0.9, 0.95), own, (0.95, 0.99), own]
    assert betas(betas=(0.9, 0.95)) == [(0.9, 0.95), own, (0.95, 0.99), own]
    assert betas(betas=(0.7, 0.8)) == [(0.7, 0.8), own, (0.95, 0.99), own]
    assert betas(adam_betas=(0.7, 0.8)) == [(0.9, 0.95), own, (0.7, 0.8), own]


@pytest.mark.parametrize("cls", [SFNorMuon, AMUSE, NorMuon], ids=name_of)
@pytest.mark.parametrize("shape", [(), (17,), (13, 11, 17, 2), (2, 3, 5, 7, 11)], ids=str)
def test_only_matrices_take_the_matrix_step(cls, shape):
    """Other shapes are refused in a line that names the shape and the way out."""
    p = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="use_muon=False") as refused:
        cls([p])
    assert str(shape) in str(refused.value) and "\n" not in str(refused.value)
    for other in (cls, ScheduleFreePlus):
        other([{"params": [p], "use_muon": False}])


@all_classes
@pytest.mark.parametrize("use_muon", [True, False])
def test_complex_and_sparse_parameters_are_refused(cls, use_muon):
    for bad in (torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3, 2).to_sparse()):
        with pytest.raises(ValueError, match=r"\(3, 2\).* real and dense"):
            cls([{"params": [nn.Parameter(bad)], "use_muon": use_muon}])


@all_classes
@pytest.mark.parametrize("use_muon", [True, False])
def test_float16_is_refused(cls, use_muon):
    """ε is 0 there, and a gradient of 0 would become NaN."""
    p = nn.Parameter(torch.zeros(3, 2, dtype=F16))
    with pytest.raises(ValueError, match=r"\(3, 2\).*float16"):
        cls([{"params": [p], "use_muon": use_muon}])


# ---- refusals come before anything has moved or been counted

def misfit(p, kind):
    """Makes the gradient of p one that does not fit it. Returns what mends that."""
    whole, g = p.data, p.grad
    if kind == "sparse":
        p.grad = g.to_sparse()
    else:  # torch checks a gradient when it is assigned, not when the parameter changes
        p.data = whole[:2] if kind == "shape" else whole.double()

    def mend():
        p.data, p.grad = whole, g

    return mend


@all_classes
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("kind", ["sparse", "shape", "dtype"])
@pytest.mark.parametrize("index", [1, 8], ids=["matrix", "other"])
def test_a_gradient_that_does_not_fit_is_refused_first(cls, index, kind, before):
    """Before anything moves, in a line that names the shape of the parameter. Mended, the step is
    that of a run without the refusal."""
    weights, grads = draw(SHAPES, 3)
    (a, opt_a), (b, opt_b) = (make(weights, cls, **ALL_KNOBS[cls]) for _ in range(2))
    for gs in grads[:before]:
        step(opt_a, a, gs), step(opt_b, b, gs)
    saved = copy.deepcopy(opt_b.state_dict())
    for p, g in zip(b, grads[2]):
        p.grad = g.clone()
    mend = misfit(b[index], kind)
    for _ in range(2):
        with pytest.raises(ValueError) as refused:
            opt_b.step(lambda: 60.0)
        assert str(tuple(b[index].shape)) in str(refused.value) and "\n" not in str(refused.value)
    mend()
    same(a, b)
    assert opt_b.state_dict()["param_groups"] == saved["param_groups"]
    torch.testing.assert_close(opt_b.state_dict()["state"], saved["state"], rtol=0, atol=0)
    step(opt_a, a, grads[2]), opt_b.step(lambda: 60.0)
    same_run(a, opt_a, b, opt_b)


@all_classes
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_a_model_that_changed_its_dtype_is_refused_first(cls, dtype):
    """After the first steps: the state is of the old one, so no step can be taken."""
    weights, grads = draw(SHAPES, 2)
    params, opt = make(weights, cls, **ALL_KNOBS[cls])
    step(opt, params, grads[0])
    before = copy.deepcopy(opt.state_dict())
    for p in params:
        p.data = p.data.to(dtype)
    y = copies(params)
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        step(opt, params, [g.to(dtype) for g in grads[1]])
    same(params, y)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(opt.state_dict()["state"], before["state"], rtol=0, atol=0)


@all_classes
def test_a_state_on_another_device_is_refused_first(cls):
    """As after model.to("cuda") with the state of a run on the CPU."""
    weights, grads = draw(SHAPES, 1)
    params, opt = make(weights, cls, **ALL_KNOBS[cls])
    step(opt, params, grads[0])
    for name, value in opt.state[params[1]].items():
        opt.state[params[1]][name] = value.to("meta")
    before, groups = copies(params), copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"\(6, 4\).*meta"):
        step(opt, params, grads[0])
    same(params, before)
    assert opt.state_dict()["param_groups"] == groups


@all_classes
def test_a_model_in_float16_is_refused_first(cls):
    """model.half() after the optimizer was made: one gradient of 0 would make all weights NaN."""
    weights, grads = draw(SHAPES, 1, F16)
    params, opt = make([w.float() for w in weights], cls, **ALL_KNOBS[cls])
    for p in params:
        p.data = p.data.half()
    with pytest.raises(ValueError, match=r"\(6, 4\).*float16"):
        step(opt, params, grads[0])
    same(params, weights)
    assert {group["step"] for group in opt.param_groups} == {0}


@all_classes
def test_a_state_of_other_shapes_is_refused_first(cls):
    """torch loads it without a look at the shapes; the step names the parameter's."""
    weights, grads = draw(SHAPES, 1)
    params, opt = make(weights, cls, **ALL_KNOBS[cls])
    step(opt, params, grads[0])
    wider = [w.repeat(*[1] * (w.ndim - 1), 2) for w in weights]
    params_2, opt_2 = make(wider, cls, **ALL_KNOBS[cls])
    opt_2.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"\(6, 8\)"):
        step(opt_2, params_2, wider)
    same(params_2, wider)
    assert opt_2.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


@all_classes
def test_a_sparse_embedding_is_refused_as_users_meet_it(cls):
    embedding, linear = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)
    opt = cls([{"params": linear.parameters(), "use_muon": False},
               {"params": embedding.parameters(), "use_muon": False}])
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = copies(linear.parameters())
    with pytest.raises(ValueError, match=r"\(7, 4\)"):
        opt.step(lambda: 1.0)
    same(linear.parameters(), before)
    assert not opt.state_dict()["state"] and [g["step"] for g in opt.param_groups] == [0, 0]


@all_classes
def test_gradients_that_are_not_finite_raise_nothing(cls):
    weights, grads = draw(SHAPES, 1)
    for value in (math.nan, math.inf):
        params, opt = make(weights, cls, **ALL_KNOBS[cls])
        step(opt, params, [torch.full_like(g, value) for g in grads[0]])


# ---- modes

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
    assert pointers == [p.data_ptr() for p in params]
    assert all(p.is_leaf and p.requires_grad for p in params)


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


# ---- state

STATES = {  # of matrices, of the others
    SFNorMuon: ({"z", "momentum_buffer", "row_second_moment"}, {"z", "exp_avg_sq"}),
    AMUSE: ({"z", "momentum_buffer"}, {"z", "exp_avg_sq"}),
    ScheduleFreePlus: ({"z", "exp_avg", "exp_avg_sq"}, {"z", "exp_avg", "exp_avg_sq"}),
    NorMuon: ({"momentum_buffer", "row_second_moment"}, {"exp_avg", "exp_avg_sq"}),
}


@all_classes
def test_state_is_what_the_contract_says_and_only_where_a_gradient_was(cls):
    weights, grads = draw(SHAPES, 1)
    params, opt = make(weights, cls, **ALL_KNOBS[cls])
    step(opt, params, [None if i in (1, 8) else g for i, g in enumerate(grads[0])])
    for i, (p, w) in enumerate(zip(params, weights)):
        if i in (1, 8):
            assert not opt.state.get(p) and torch.equal(p, w)
            continue
        assert set(opt.state[p]) == STATES[cls][i >= len(MATRICES)]
        for name, value in opt.state[p].items():
            assert value.shape == (p.shape if name != "row_second_moment" else (p.shape[0], 1))
    assert len(opt.state_dict()["state"]) == len(params) - 2


@all_classes
def test_looking_at_the_state_of_a_parameter_changes_nothing(cls):
    """opt.state is a defaultdict: reading it makes an empty entry, which is no state."""
    weights, grads = draw(SHAPES, 4)
    (a, opt_a), (b, opt_b) = (make(weights, cls, **ALL_KNOBS[cls]) for _ in range(2))
    late = lambda t: [None if t < 2 and i in (1, 8) else g for i, g in enumerate(grads[t])]
    for t in range(4):
        assert t >= 2 or all(opt_b.state[b[i]] == {} for i in (1, 8))
        for params, opt in ((a, opt_a), (b, opt_b)):
            for name in ("eval", "diagnostics", "train"):
                getattr(opt, name, lambda: None)()
            step(opt, params, late(t))
    same_run(a, opt_a, b, opt_b)


@spectral
@pytest.mark.parametrize("momentum", [0.8, 0.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bfloat16_newton_schulz_leaves_state_and_gradients_alone(cls, dtype, momentum):
    weights, grads = draw(SHAPES, 1, dtype)
    params, opt = make(weights, cls, **FAST | {"momentum": momentum}, ns_dtype=BF16)
    step(opt, params, grads[0])
    same([p.grad for p in params], grads[0])
    for p in params:
        assert all(v.dtype == dtype and v.isfinite().all() for v in opt.state[p].values())
    matrices = params[:len(MATRICES)]
    M = [opt.state[p]["momentum_buffer"] for p in matrices]
    expected = [(1 - momentum) * g.double() for g in grads[0][:len(MATRICES)]]
    close(M, expected, 1e-6 if dtype == F32 else 4e-3)
    assert not {m.data_ptr() for m in M} & {p.grad.data_ptr() for p in params}


@all_classes
def test_bfloat16_parameters_stay_finite(cls):
    """Zero gradients among them, of everything, of one matrix and of one entry."""
    weights, grads = draw(SHAPES, 6, BF16)
    params, opt = make(weights, cls, **ALL_KNOBS[cls])
    for t, gs in enumerate(grads):
        for g in gs if t in (0, 3) else (gs[0], gs[2][1], gs[7][2:3]):
            g.zero_()
        step(opt, params, gs)
    for mode in ("eval", "train"):
        getattr(opt, mode, lambda: None)()
        assert all(p.dtype == BF16 and p.isfinite().all() for p in params)
    assert not any(torch.equal(p, w) for p, w in zip(params[1:], weights[1:]))


OTHER = {  # knobs of another run, which a loaded state replaces
    SFNorMuon: dict(momentum=0.1, decay_at="none", beta_power=0.0, warmup_steps=9),
    AMUSE: dict(momentum=0.1, rho=0.0, warmup_steps=9),
    ScheduleFreePlus: dict(polyak_beta=0.0, averaging_start=20, warmup_steps=9),
    NorMuon: dict(momentum=0.1, normalize_rows=False),
}


@pytest.mark.parametrize("cls, mode", [(cls, mode) for cls in KNOBS for mode in ("train", "eval")]
                         + [(NorMuon, "train")], ids=name_of)
def test_a_run_continued_from_a_state_dict_is_bitwise_the_same(cls, mode):
    weights, grads = draw(SHAPES, 10)
    params, opt = make(weights, cls, OVERRIDES, **ALL_KNOBS[cls])
    for t in range(4):
        step(opt, params, [None if (t, i) in MISSING else g for i, g in enumerate(grads[t])])
    if cls is not NorMuon:
        getattr(opt, mode)()
    torch.save({"model": copies(params), "optimizer": opt.state_dict()}, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params_2, opt_2 = make(saved["model"], cls, lr=0.7, eps=1.0, **OTHER[cls])
    opt_2.load_state_dict(saved["optimizer"])
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"\.train\(\)"):
            opt_2.step()
        opt.train(), opt_2.train()
    for gs in grads[4:]:
        step(opt, params, gs), step(opt_2, params_2, gs)
    if cls is not NorMuon:
        opt.eval(), opt_2.eval()
    same_run(params, opt, params_2, opt_2)


@all_classes
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copied_optimizer_goes_on_alike(cls, way):
    """With its defaults too: a group that is added later has the same knobs."""
    weights, grads = draw(SHAPES, 5)
    params, opt = make(weights, cls, OVERRIDES, **ALL_KNOBS[cls])
    for gs in grads[:2]:
        step(opt, params, gs)
    pair = (params, opt)
    params_2, opt_2 = pickle.loads(pickle.dumps(pair)) if way == "pickle" else copy.deepcopy(pair)
    assert not {p.data_ptr() for p in params} & {p.data_ptr() for p in params_2}
    for ps, o in (pair, (params_2, opt_2)):
        ps.append(nn.Parameter(torch.ones(3)))
        o.add_param_group({"params": ps[-1:], "use_muon": False})
    for gs in grads[2:]:
        for ps, o in (pair, (params_2, opt_2)):
            step(o, ps, [*gs, torch.ones(3)])
    opt_2.param_groups[-1].pop("differentiable", None)  # torch's own, which a copy adds
    same_run(params, opt, params_2, opt_2)


@pytest.mark.parametrize("cls", [SFNorMuon, NorMuon], ids=name_of)
def test_a_state_of_an_older_version_is_completed(cls):
    """Where the meaning of what is missing is certain: powers of 0, the β1 of the group, and steps
    of RMS 0.2 η."""
    weights, grads = draw(SHAPES, 6)
    knobs = FAST if cls is SFNorMuon else ALL_KNOBS[cls]
    params, opt = make(weights, cls, OVERRIDES, **knobs)
    for gs in grads[:3]:
        step(opt, params, gs)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for name in ("averaging_power", "beta_power", "beta", "step_norm"):
            group.pop(name, None)
    later = {"averaging_power": 1.0, "beta_power": 1.0} if cls is SFNorMuon else {}
    params_2, opt_2 = make(copies(params), cls, **knobs, **later, step_norm="spectral")
    opt_2.load_state_dict(saved)
    for gs in grads[3:]:
        step(opt, params, gs), step(opt_2, params_2, gs)
    if cls is SFNorMuon:
        opt.eval(), opt_2.eval()
    same_run(params, opt, params_2, opt_2)


@pytest.mark.parametrize("cls, other", [
    (cls, other) for cls in ALL_KNOBS for other in (*ALL_KNOBS, torch.optim.AdamW) if cls != other],
    ids=name_of)
def test_the_state_of_another_optimizer_is_refused_and_nothing_changes(cls, other):
    weights, grads = draw(SHAPES, 3)
    (a, opt_a), (b, opt_b) = (make(weights, cls, **ALL_KNOBS[cls]) for _ in range(2))
    c = [nn.Parameter(w.clone()) for w in weights]
    another = other([{"params": c[part], "use_muon": part != GROUPS[2]} for part in GROUPS])
    for params, opt in ((a, opt_a), (b, opt_b), (c, another)):
        step(opt, params, grads[0])
    with pytest.raises(ValueError, match=f"not the state of .*{cls.__name__}"):
        opt_b.load_state_dict(another.state_dict())
    for gs in grads[1:]:
        step(opt_a, a, gs), step(opt_b, b, gs)
    same_run(a, opt_a, b, opt_b)


# ---- other people's tools

@pytest.mark.parametrize("cls, knobs", [*KNOBS.items(), (NorMuon, {})],
                         ids=lambda v: getattr(v, "__name__", ""))
def test_torch_state_dict_helpers_disturb_nothing(cls, knobs):
    """On a fresh optimizer they begin with a step at lr 0 and zero gradients."""
    get = checkpoint_helpers.get_optimizer_state_dict
    set_ = checkpoint_helpers.set_optimizer_state_dict
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    models = [copy.deepcopy(model) for _ in range(3)]
    grads = draw([p.shape for p in model.parameters()], 5)[1]
    params = [list(model.parameters()) for model in models]
    opts = [cls([{"params": p[::2]}, {"params": p[1::2], "use_muon": False}], **knobs)
            for p in params]
    get(models[1], opts[1])
    for t, gs in enumerate(grads):
        if t == 3:
            models[2].load_state_dict(models[1].state_dict())
            set_(models[2], opts[2], copy.deepcopy(get(models[1], opts[1])))
        for i in (0, 1, 2) if t >= 3 else (0, 1):
            step(opts[i], params[i], gs)
            same_run(params[i], opts[i], params[0], opts[0])


WITHOUT_DISTRIBUTED = """
import sys, torch
torch.distributed.is_available = lambda: False  # as a torch that is built without it says
for name in [name for name in sys.modules if name.startswith("torch.distributed.")]:
    sys.modules[name] = None
sys.modules["torch.distributed.tensor"] = None
"""
THREE_STEPS = """
import torch
from sf_normuon import SFNorMuon, newton_schulz, param_groups
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
opt = SFNorMuon(param_groups(model), lr=0.1, warmup_steps=1)
for _ in range(3):
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
opt.diagnostics(), opt.eval()
result = model(torch.ones(1, 3)).sum().item()
"""


def test_it_needs_no_torch_distributed():
    program = WITHOUT_DISTRIBUTED + THREE_STEPS + "print(result)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=ENV, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    exec(THREE_STEPS, names := {})
    assert float(done.stdout) == names["result"]


@every
def test_accelerate_turns_the_weights_into_those_of_each_mode(cls):
    accelerate = pytest.importorskip("accelerate")
    weights, grads = draw([(4, 6)], 3)
    model = nn.Linear(6, 4, bias=False)
    model.weight.data.copy_(weights[0])
    p = nn.Parameter(weights[0].clone())
    plain, knobs = cls([p], **KNOBS[cls]), KNOBS[cls]
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, cls([model.weight], **knobs))
    for gs in grads:
        plain.train(), wrapped.train()
        step(plain, [p], gs), step(wrapped, [model.weight], gs)
        same([model.weight], [p])
        plain.eval(), wrapped.eval()
        same([model.weight], [p])


def test_a_compiled_step_is_the_step():
    """It is compiled again at every step, so nobody should; but it must not be wrong."""
    (w,), grads = draw([(4, 6)], 4)
    a, b = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    opt_a, opt_b = SFNorMuon([a], **KNOBS[SFNorMuon]), SFNorMuon([b], **KNOBS[SFNorMuon])
    torch._dynamo.reset()
    compiled = torch.compile(opt_b.step, backend="eager")
    for gs in grads:
        step(opt_a, [a], gs)
        b.grad = gs[0].clone()
        compiled()
    close([a], [b], 1e-6)
