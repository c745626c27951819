"""The rivals that torch does not ship, as their authors give them, and the registry of optimizers.

The conventions are those of `SFNorMuon`: groups with use_muon, state made at the first gradient, a
parameter without a gradient skipped, nothing moved or counted at lr 0.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sf_normuon import (SFNorMuon, adamw_directions, begin_step, check_group, local,
                        normuon_directions, over_processes, own_group, param_groups, polar,
                        same_shape, towards_z)


class NorMuon(torch.optim.Optimizer):
    """NorMuon (arXiv:2510.05491) with steps of RMS 0.2 lr: the scheduled rival to equal.

        M ← μ M + (1-μ) g,  P = polar((1-μ) g + μ M)                  Nesterov
        v ← β2 v + (1-β2) rowmean(P²),  P̂ = P / (√v + ε)
        p ← (1 - η λ) p - 0.2 η √(mn) / ‖P̂‖_F · P̂

    Groups with use_muon=False take AdamW's step, and only they use β1. normalize_rows=False: Muon,
    its step of RMS 0.2 η. Parameters, groups, step_norm and errors as for `SFNorMuon`; no train()
    and eval(), no warm-up of its own.
    """

    def __init__(self, params, lr=0.008, betas=(0.9, 0.95), momentum=0.95, weight_decay=0.05,
                 eps=1e-8, ns_steps=5, ns_dtype=None, normalize_rows=True, step_norm="rms"):
        super().__init__(params, dict(
            lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay, eps=eps, step=0,
            ns_steps=ns_steps, ns_dtype=ns_dtype, normalize_rows=normalize_rows,
            step_norm=step_norm, use_muon=True))

    def add_param_group(self, group):
        group = own_group(group)
        super().add_param_group(group)
        self.param_groups.pop()  # until it has been checked
        check_group(group)
        check_beta1(group)
        self.param_groups.append(group)

    def __setstate__(self, state):
        check_state(self, state, "normalize_rows", without="decay_at")
        for group in state["param_groups"]:
            group.setdefault("step_norm", "rms")  # the only one before it had a keyword
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure=None):
        loss = begin_step(self, closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state.get(p):
                    if group["use_muon"]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                        self.state[p]["row_second_moment"] = torch.zeros_like(p[..., :1])
                    else:
                        self.state[p]["exp_avg"] = torch.zeros_like(p)
                        self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if params and group["lr"] != 0:
                self._step_group(group, params)
        return loss

    def _step_group(self, group, params):
        group["step"] += 1
        t, eta = group["step"], float(group["lr"])
        for bucket in same_shape(params):
            g = [local(p.grad) for p in bucket]  # (m, n) each, or this process's rows of it
            if group["use_muon"]:
                M = [local(self.state[p]["momentum_buffer"]) for p in bucket]  # (m, n)
                v = [local(self.state[p]["row_second_moment"]) for p in bucket]  # (m, 1)
                directions = normuon_directions(nesterov(M, g, group["momentum"]), v, bucket[0],
                                                group, group["betas"][1])
            else:
                m = [local(self.state[p]["exp_avg"]) for p in bucket]
                v = [local(self.state[p]["exp_avg_sq"]) for p in bucket]
                directions = [adamw(*moments, t, group) for moments in zip(g, m, v)]
            weights = [local(p) for p in bucket]
            torch._foreach_mul_(weights, 1 - eta * group["weight_decay"])
            torch._foreach_sub_(weights, directions, alpha=eta)
            del directions  # free them before the next bucket is orthogonalized


class AMUSE(torch.optim.Optimizer):
    """AMUSE (arXiv:2605.22432): schedule-free Muon whose gradient moves from near z to x.

        M ← μ M + (1-μ) g,  P = polar((1-μ) g + μ M)                  Nesterov, no row normalization
        z ← (1 - η_t λ) z - η_t 0.2 √max(m,n) P,  η_t = η min(1, t / T0)
        x ← (1-c) x + c z,  c = w / Σw,  w = tʳ η_t²
        y = β_t x + (1-β_t) z,  β_t = β1 up to T0, then 1 - S^ρ (1-β1),  S = c (1-c0) / (c0 (1-c)),
        c0 = c at T0

    Groups with use_muon=False: z ← (1 - η_t λ) z - η_t g / (√v̂ + ε), v̂ with β2 and
    bias-corrected. averaging_power: r. warmup_steps: T0, after which β grows: scale it with the run
    (the authors' is 6,000 of 16,000 steps). Below 2 it is a ValueError: at c0 = 1 β jumps to 1.
    Parameters, groups, train(), eval() and errors as for `SFNorMuon`.
    """
    train, eval = SFNorMuon.train, SFNorMuon.eval

    def __init__(self, params, lr=0.01, betas=(0.6, 0.999), momentum=0.95, weight_decay=0.05,
                 warmup_steps=6000, rho=0.8, averaging_power=0.0, eps=1e-10, ns_steps=5,
                 ns_dtype=None):
        super().__init__(params, dict(
            lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay, eps=eps, rho=rho,
            warmup_steps=warmup_steps, averaging_power=averaging_power, ns_steps=ns_steps,
            ns_dtype=ns_dtype, use_muon=True, step=0, weight_sum=0.0, c0=1.0, train_mode=True))

    def add_param_group(self, group):
        group = own_group(group)
        super().add_param_group(group)
        self.param_groups.pop()  # until it has been checked
        group["beta"] = group["betas"][0]  # the β with which y was written
        check_group(group, "rho", "averaging_power")
        if not group["warmup_steps"] >= 2:
            raise ValueError(f"warmup_steps must be at least 2, got {group['warmup_steps']}")
        self.param_groups.append(group)

    def __setstate__(self, state):
        check_state(self, state, "rho")
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure=None):
        loss = begin_step(self, closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            moment = "momentum_buffer" if group["use_muon"] else "exp_avg_sq"
            for p in params:
                if not self.state.get(p):
                    self.state[p].update({"z": p.detach().clone(), moment: torch.zeros_like(p)})
            if params and group["lr"] != 0:
                self._step_group(group, params)
        return loss

    def _step_group(self, group, params):
        group["step"] += 1
        t, T0, beta = group["step"], group["warmup_steps"], group["betas"][0]
        eta = float(group["lr"]) * min(1.0, t / T0)
        w = t ** group["averaging_power"] * eta**2
        group["weight_sum"] += w
        c = w / group["weight_sum"] if group["weight_sum"] else 1.0
        if t <= T0:
            group["c0"] = c
        else:
            S = c * (1 - group["c0"]) / (group["c0"] * (1 - c))
            beta = 1 - min(1.0, S) ** group["rho"] * (1 - beta)  # S > 1 if lr is raised on the way
        skipped = [p for p in group["params"] if p.grad is None]
        towards_z(self, skipped, 1 - beta / group["beta"])  # their y follows β, x and z stay
        for bucket in same_shape(params):
            g = [local(p.grad) for p in bucket]  # (m, n) each, or this process's rows of it
            if group["use_muon"]:
                M = [local(self.state[p]["momentum_buffer"]) for p in bucket]
                scale = 0.2 * math.sqrt(max(bucket[0].shape[-2:]))
                directions = polar(nesterov(M, g, group["momentum"]), bucket[0], group["ns_steps"],
                                   group["ns_dtype"]).mul_(scale).unbind()
            else:
                v = [local(self.state[p]["exp_avg_sq"]) for p in bucket]
                directions = adamw_directions(g, v, t, group)
            y, z = [local(p) for p in bucket], [local(self.state[p]["z"]) for p in bucket]
            x = torch._foreach_lerp(y, z, 1 - 1 / group["beta"])
            torch._foreach_mul_(z, 1 - eta * group["weight_decay"])
            torch._foreach_sub_(z, directions, alpha=eta)
            torch._foreach_lerp_(x, z, c)
            torch._foreach_copy_(y, x)
            torch._foreach_lerp_(y, z, 1 - beta)
            del x, directions  # free them before the next bucket is orthogonalized
        group["beta"] = beta


class ScheduleFreePlus(torch.optim.Optimizer):
    """ScheduleFree+ (arXiv:2605.19095): schedule-free AdamW whose rate is Polyak's step.

        G = Σ|g|,  I = β Σ⟨g, z-x⟩                         over all parameters, at k = 0, 1, ...
        e ← βp e + (1-βp) √(π/2) G,  ê = e / (1 - βp^(k+1))
        α = η_k max(0, loss + I) / ê
        z ← z - α² λ y - α m̂ / (√v̂ + ε)                    m, v: Adam's moments
        x ← (1-c) x + c z,  c = 1 while k < averaging_start, then w / Σw,  w = (k+1)ʳ (largest α)²
        y = β x + (1-β) z,  1-β from 1 - sf_beta to 0.035, geometrically, over beta_anneal_steps

    step(closure) needs the loss, the mean over all processes and micro-batches; without a closure
    it raises ValueError, except at lr 0. lr multiplies Polyak's step. averaging_power: r.
    polyak_beta: βp. beta_anneal_steps 0: β stays. use_muon is ignored. Clipped gradients make
    the step longer. The released class stores ê in the place of e, and so corrects it twice if
    βp > 0: a hidden warm-up of some hundred steps. This one is the formula. Parameters, train(),
    eval(): as for `SFNorMuon`.
    """
    train, eval = SFNorMuon.train, SFNorMuon.eval

    def __init__(self, params, lr=1.0, betas=(0.9, 0.95), sf_beta=0.9, weight_decay=0.0,
                 warmup_steps=0, averaging_power=0.0, averaging_start=0, polyak_beta=0.0,
                 beta_anneal_steps=0, eps=1e-8):
        super().__init__(params, dict(
            lr=lr, betas=betas, sf_beta=sf_beta, weight_decay=weight_decay, eps=eps, step=0,
            warmup_steps=warmup_steps, averaging_power=averaging_power, weight_sum=0.0,
            averaging_start=averaging_start, polyak_beta=polyak_beta, largest_lr=0.0,
            beta_anneal_steps=beta_anneal_steps, gradient_sum=0.0, train_mode=True))

    def add_param_group(self, group):
        group = own_group(group) | {"use_muon": False}
        super().add_param_group(group)
        self.param_groups.pop()  # until it has been checked
        group["beta"] = group["sf_beta"]  # the β with which y was written
        if not 0 < group["sf_beta"] < 1:
            raise ValueError(f"sf_beta must be in (0, 1), got {group['sf_beta']}")
        check_group(group, "averaging_power", "averaging_start", "beta_anneal_steps")
        check_beta1(group)
        if not 0 <= group["polyak_beta"] < 1:
            raise ValueError(f"polyak_beta must be in [0, 1), got {group['polyak_beta']}")
        self.param_groups.append(group)

    def __setstate__(self, state):
        check_state(self, state, "polyak_beta")
        for group in state["param_groups"]:
            group.setdefault("sf_beta", 0.9)  # which was fixed before it had a keyword
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure=None):
        loss = begin_step(self, closure)
        given = [(group, [p for p in group["params"] if p.grad is not None])
                 for group in self.param_groups]
        moving = [(group, params) for group, params in given if params and group["lr"] != 0]
        if moving and loss is None:
            raise ValueError("ScheduleFreePlus needs the loss: give step() a closure for it")
        for p in (p for _, params in given for p in params if not self.state.get(p)):
            self.state[p].update(z=p.detach().clone(), exp_avg=torch.zeros_like(p),
                                 exp_avg_sq=torch.zeros_like(p))
        if not moving:
            return loss
        polyak_step, gradient_sum = self._polyak(float(loss), moving)
        for group, params in moving:
            group["gradient_sum"] = gradient_sum
            self._step_group(group, params, polyak_step)
        return loss

    def _step_group(self, group, params, polyak_step):
        k, beta = group["step"], annealed_beta(group)
        group["step"] = k + 1
        alpha = float(group["lr"]) * min(1.0, (k + 1) / max(1, group["warmup_steps"])) * polyak_step
        group["largest_lr"] = max(group["largest_lr"], alpha, group["eps"])
        c = 1.0
        if k >= group["averaging_start"]:
            w = (k + 1) ** group["averaging_power"] * group["largest_lr"] ** 2
            group["weight_sum"] += w
            c = w / group["weight_sum"] if group["weight_sum"] else 1.0
        skipped = [p for p in group["params"] if p.grad is None]
        towards_z(self, skipped, 1 - beta / group["beta"])  # their y follows β, x and z stay
        for p in params:
            g, y, z = local(p.grad), local(p), local(self.state[p]["z"])
            m, v = local(self.state[p]["exp_avg"]), local(self.state[p]["exp_avg_sq"])
            x = y.lerp(z, 1 - 1 / group["beta"])
            z.sub_(y, alpha=alpha**2 * group["weight_decay"])
            z.sub_(adamw(g, m, v, k + 1, group), alpha=alpha)
            x.lerp_(z, c)
            torch.lerp(x, z, 1 - beta, out=y)
        group["beta"] = beta

    def _polyak(self, loss, moving):
        """max(0, loss + I) / ê, and e, from all gradients of all processes: one all-reduce."""
        G = I = 0.0
        for group, params in moving:
            for p in params:
                g, y, z = local(p.grad), local(p), local(self.state[p]["z"])
                G = G + g.abs().sum()
                # z - x = (z - y) / β, with the β that y was written with
                I = I + annealed_beta(group) / group["beta"] * (g * (z - y)).sum()
        G, I = over_processes(torch.stack([G, I]), moving[0][1][0]).tolist()
        group = max((group for group, _ in moving), key=lambda group: group["step"])
        beta_p = group["polyak_beta"]
        e = beta_p * group["gradient_sum"] + (1 - beta_p) * G * math.sqrt(math.pi / 2)
        corrected = e / (1 - beta_p ** (group["step"] + 1))
        return (max(0.0, loss + I) / corrected if corrected > 0 else 0.0), e


class MuonAdamW(torch.optim.Optimizer):
    """torch's own Muon for groups with use_muon=True and torch's AdamW for the others, as one.

    Under `fully_shard` torch's Muon runs a collective for every product (91 for six matrices, where
    `polar` makes 9): its losses compare there, its seconds do not.
    """

    def __init__(self, params, momentum=0.95, ns_steps=5):
        matrices, rest = ([g for g in params if g["use_muon"] == kind] for kind in (True, False))
        self.muon = torch.optim.Muon(matrices, momentum=momentum, ns_steps=ns_steps,
                                     adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, fused=True)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part, kind in ((self.muon, True), (self.adamw, False)):
            part.param_groups = [group for group in self.param_groups if group["use_muon"] == kind]
            part.state = self.state  # here too, since load_state_dict() makes new ones
            part.step()
        return loss


# ---- shared parts

def nesterov(Ms, gs, momentum):
    """(1-μ) g + μ M for each matrix, after M ← μ M + (1-μ) g in place."""
    torch._foreach_lerp_(Ms, gs, 1 - momentum)
    return torch._foreach_lerp(gs, Ms, momentum)


def adamw(g, m, v, t, group):
    """m̂ / (√v̂ + ε) at t = 1, 2, ..., after m ← β1 m + (1-β1) g, v ← β2 v + (1-β2) g² in place."""
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])


def annealed_beta(group):
    """β of ScheduleFree+ at the step to come."""
    if not group["beta_anneal_steps"]:
        return group["sf_beta"]
    start, progress = 1 - group["sf_beta"], min(1.0, group["step"] / group["beta_anneal_steps"])
    return 1 - start * (0.035 / start) ** progress  # to β = 0.965


def check_state(optimizer, state, name, without=None):
    """Raises ValueError for another optimizer's state, by the hyperparameters of its groups."""
    if any(name not in group or without in group for group in state["param_groups"]):
        raise ValueError(f"this is not the state of {type(optimizer).__name__}")


def check_beta1(group):
    if not 0 <= group["betas"][0] < 1:
        raise ValueError(f"beta1 must be in [0, 1), got {group['betas'][0]}")


# ---- the registry: to add an optimizer, add its class (here or in a file of its own) and an entry

@dataclass(frozen=True)
class Entry:
    """label: its name in tables. scheduled: train.py warms up and schedules its rate; otherwise it
    warms up by itself and has train() and eval(). build(groups, cfg): makes it from two parameter
    groups, matrices and the rest (use_muon=False), and the knobs of config.py.
    """
    label: str
    scheduled: bool
    build: Callable


def build_optimizer(cfg, model) -> torch.optim.Optimizer:
    """The optimizer cfg.optimizer of a model. Raises ValueError for knobs that it cannot take."""
    matrices, rest = param_groups(model)
    matrices.update(use_muon=True, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    rest.update(lr=cfg.adam_lr or cfg.lr, betas=cfg.adam_betas, weight_decay=cfg.adam_weight_decay)
    return OPTIMIZERS[cfg.optimizer].build([matrices, rest], cfg)


def all_adamw(groups, cfg):
    """The groups of an optimizer that knows no matrices."""
    return [{**group, "use_muon": False, "betas": cfg.betas} for group in groups]


OPTIMIZERS = {
    "sf_normuon": Entry("SF-NorMuon", False, lambda groups, cfg: SFNorMuon(
        groups, momentum=cfg.momentum, warmup_steps=cfg.warmup_steps, ns_steps=cfg.ns_steps,
        decay_at=cfg.decay_at, normalize_rows=cfg.normalize_rows, step_norm=cfg.step_norm,
        averaging_power=cfg.averaging_power, beta_power=cfg.beta_power)),
    "sf_adamw": Entry("SF-AdamW", False, lambda groups, cfg: SFNorMuon(
        all_adamw(groups, cfg), warmup_steps=cfg.warmup_steps, decay_at=cfg.decay_at,
        averaging_power=cfg.averaging_power, beta_power=cfg.beta_power)),
    "amuse": Entry("AMUSE", False, lambda groups, cfg: AMUSE(
        groups, momentum=cfg.momentum, warmup_steps=cfg.warmup_steps, rho=cfg.rho,
        averaging_power=cfg.averaging_power, ns_steps=cfg.ns_steps)),
    "schedulefree_plus": Entry("ScheduleFree+", False, lambda groups, cfg: ScheduleFreePlus(
        all_adamw(groups, cfg), sf_beta=cfg.sf_beta, warmup_steps=cfg.warmup_steps,
        averaging_power=cfg.averaging_power, averaging_start=cfg.averaging_start,
        polyak_beta=cfg.polyak_beta, beta_anneal_steps=cfg.beta_anneal_steps)),
    "adamw": Entry("AdamW", True, lambda groups, cfg: torch.optim.AdamW(
        all_adamw(groups, cfg), fused=True)),
    "normuon": Entry("NorMuon", True, lambda groups, cfg: NorMuon(
        groups, momentum=cfg.momentum, ns_steps=cfg.ns_steps, normalize_rows=cfg.normalize_rows,
        step_norm=cfg.step_norm)),
    "muon": Entry("Muon", True, lambda groups, cfg: MuonAdamW(
        groups, momentum=cfg.momentum, ns_steps=cfg.ns_steps)),
}
