"""The rivals that torch does not ship, each as its authors give it, with the conventions of `SFNorMuon`."""
import math

import torch

from sf_normuon import (ScheduleFree, adam_denominator, check_group, check_not_negative, local, matrix_sum, normuon_direction,
                        polar, same_shape)


def nesterov(Ms, params, momentum):
    """(1-μ) g + μ M for each parameter, after M ← μ M + (1-μ) g in place."""
    g = [p.grad for p in params]
    torch._foreach_lerp_(local(Ms), local(g), 1 - momentum)
    return torch._foreach_lerp(g, Ms, momentum)


class NorMuon(torch.optim.Optimizer):
    """NorMuon (arXiv:2510.05491) with steps of RMS 0.2 lr: the method to equal, given a schedule that knows the horizon.

        M ← μ M + (1-μ) g,  P = polar((1-μ) g + μ M)                  Nesterov
        v ← β2 v + (1-β2) rowmean(P²),  P̂ = P / (√v + ε)
        p ← (1 - η λ) p - 0.2 η √(mn) / ‖P̂‖_F · P̂

    Groups with use_muon=False take AdamW's step. normalize_rows=False is Muon with its step normalized.
    Parameters, groups and errors as for `SFNorMuon`; there is no train() and eval(), and warm-up is the schedule's.
    """

    def __init__(self, params, lr=0.008, betas=(0.9, 0.95), momentum=0.95, weight_decay=0.05, eps=1e-8,
                 ns_steps=5, ns_dtype=None, normalize_rows=True):
        super().__init__(params, dict(
            lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay, eps=eps, ns_steps=ns_steps,
            ns_dtype=ns_dtype, normalize_rows=normalize_rows, use_muon=True, step=0))

    def add_param_group(self, group):
        super().add_param_group(group)
        check_group(group)
        if not 0 <= group["betas"][0] < 1:
            raise ValueError(f"beta1 must be in [0, 1), got {group['betas'][0]}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    first, second = ("momentum_buffer", "row_second_moment") if group["use_muon"] else \
                                    ("exp_avg", "exp_avg_sq")
                    self.state[p][first] = torch.zeros_like(p)
                    self.state[p][second] = torch.zeros_like(p[:, :1] if group["use_muon"] else p)
            if not params or group["lr"] == 0:
                continue
            group["step"] += 1
            for bucket in same_shape(params) if group["use_muon"] else [params]:
                u = self._matrix_step(group, bucket) if group["use_muon"] else self._adamw_step(group, bucket)
                p, lr = local(bucket), float(group["lr"])
                torch._foreach_mul_(p, 1 - lr * group["weight_decay"])
                torch._foreach_add_(p, u, alpha=-lr)
        return loss

    def _matrix_step(self, group, params):
        Ms, vs = ([self.state[p][name] for p in params] for name in ("momentum_buffer", "row_second_moment"))
        return list(normuon_direction(nesterov(Ms, params, group["momentum"]), vs, group["betas"][1], group["eps"],
                                      group["ns_steps"], group["ns_dtype"], group["normalize_rows"]).unbind())

    def _adamw_step(self, group, params):
        g = local([p.grad for p in params])
        m, v = (local([self.state[p][name] for p in params]) for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), t = group["betas"], group["step"]
        torch._foreach_lerp_(m, g, 1 - beta1)
        u = torch._foreach_div(m, adam_denominator(v, g, beta2, t, group["eps"]))
        torch._foreach_div_(u, 1 - beta1**t)
        return u


class AMUSE(ScheduleFree):
    """AMUSE (arXiv:2605.22432): schedule-free Muon whose gradient moves from near z to x as the average slows down.

        M ← μ M + (1-μ) g,  P = polar((1-μ) g + μ M)                  Nesterov, no row normalization
        z ← (1 - η_t λ) z - η_t 0.2 √max(m,n) P,  η_t = η min(1, t / T0)
        x ← (1-c) x + c z,  c = w / Σw,  w = tʳ η_t²
        y = β_t x + (1-β_t) z,  β_t = β1 up to T0, then 1 - S^ρ (1-β1),  S = c (1-c0) / (c0 (1-c)),  c0 = c at T0

    Groups with use_muon=False: z ← (1 - η_t λ) z - η_t g / (√v̂ + ε), with β2. averaging_power: r.
    Parameters, groups, train(), eval() and errors as for `SFNorMuon`; warmup_steps below 2 is a ValueError too, since
    c0 = 1 would make β jump to 1.
    """

    def __init__(self, params, lr=0.01, betas=(0.6, 0.999), momentum=0.95, weight_decay=0.05, warmup_steps=6000, rho=0.8,
                 averaging_power=0.0, eps=1e-10, ns_steps=5, ns_dtype=None):
        super().__init__(params, dict(
            lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps, rho=rho,
            averaging_power=averaging_power, eps=eps, ns_steps=ns_steps, ns_dtype=ns_dtype, use_muon=True,
            step=0, weight_sum=0.0, c0=1.0, train_mode=True))

    def add_param_group(self, group):
        super().add_param_group(group)
        group["beta"] = group["betas"][0]
        check_group(group)
        if not 0 < group["betas"][0] <= 1:
            raise ValueError(f"beta1 must be in (0, 1], got {group['betas'][0]}")
        if not group["warmup_steps"] >= 2:
            raise ValueError(f"warmup_steps must be at least 2, got {group['warmup_steps']}")
        check_not_negative(group, "rho", "averaging_power")

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._begin(closure)
        for group, params in self._moving():
            group["step"] += 1
            lr, beta = self._warmed_up_lr(group), group["betas"][0]
            c = self._next_average_weight(group, lr)
            if group["step"] <= group["warmup_steps"]:
                group["c0"] = c
            else:
                S = c * (1 - group["c0"]) / (group["c0"] * (1 - c))
                beta = 1 - min(1.0, S) ** group["rho"] * (1 - beta)  # S > 1 only if lr is raised from outside
            self._move_all(group, params, lr, c, beta)
        return loss

    def _init_state(self, p, use_muon):
        self.state[p]["z"] = p.detach().clone()
        self.state[p]["momentum_buffer" if use_muon else "exp_avg_sq"] = torch.zeros_like(p)

    def _matrix_direction(self, group, params):
        update = nesterov(self._states(params, "momentum_buffer"), params, group["momentum"])
        return list((0.2 * math.sqrt(max(params[0].shape)) * polar(update, group["ns_steps"], group["ns_dtype"])).unbind())


class ScheduleFreePlus(ScheduleFree):
    """ScheduleFree+ (arXiv:2605.19095): schedule-free AdamW that finds its rate by itself, as Polyak's step.

        G = Σ|g|,  I = β Σ⟨g, z-x⟩,  e ← βp e + (1-βp) √(π/2) G,  ê = e / (1 - βp^(k+1)),  k = 0, 1, ...
        α = η_k max(0, loss + I) / ê                                  sums over all parameters, of all groups
        z ← z - α² λ y - α m̂ / (√v̂ + ε)                               m, v: Adam's moments
        x ← (1-c) x + c z,  c = 1 while k < averaging_start, then w / Σw,  w = (k+1)ʳ (largest α so far)²
        y = β x + (1-β) z,  1-β from 0.1 to 0.035, geometrically, over beta_anneal_steps (0: β stays at 0.9)

    step(closure) needs the loss: its mean over all processes and micro-batches, of the gradients that are there after it.
    lr: what multiplies Polyak's step. averaging_power: r. polyak_beta: βp. All parameters are taken alike (use_muon has no
    meaning), and gradients should not be clipped, which would make the step longer.
    Parameters, train(), eval() and errors as for `SFNorMuon`; step() without a closure is a ValueError, except at lr 0.
    """

    def __init__(self, params, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, averaging_power=0.0,
                 averaging_start=0, polyak_beta=0.0, beta_anneal_steps=0, eps=1e-8):
        super().__init__(params, dict(
            lr=lr, betas=betas, weight_decay=weight_decay, warmup_steps=warmup_steps, averaging_power=averaging_power,
            averaging_start=averaging_start, polyak_beta=polyak_beta, beta_anneal_steps=beta_anneal_steps, eps=eps,
            step=0, weight_sum=0.0, beta=0.9, largest_lr=0.0, gradient_sum=0.0, train_mode=True))

    def add_param_group(self, group):
        group["use_muon"] = False
        super().add_param_group(group)
        check_group(group)
        if not (0 <= group["betas"][0] < 1 and 0 <= group["polyak_beta"] < 1):
            raise ValueError(f"beta1 and polyak_beta must be in [0, 1), got {group['betas'][0]} and {group['polyak_beta']}")
        check_not_negative(group, "averaging_power", "averaging_start", "beta_anneal_steps")

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._begin(closure)
        moving = list(self._moving())
        if not moving:
            return loss
        if loss is None:
            raise ValueError("ScheduleFreePlus needs the loss: call step(closure), with a closure that returns it")
        polyak, gradient_sum = self._polyak(float(loss), moving)
        for group, params in moving:
            old_beta, beta, k = group["beta"], self._annealed_beta(group), group["step"]
            self._set_beta(group, beta, params)
            group.update(step=k + 1, gradient_sum=gradient_sum)
            lr = self._warmed_up_lr(group) * polyak
            group["largest_lr"] = max(group["largest_lr"], lr, group["eps"])
            c = self._next_average_weight(group, group["largest_lr"]) if k >= group["averaging_start"] else 1.0
            y, z, m, v = (local(ts) for ts in (params, *(self._states(params, n) for n in ("z", "exp_avg", "exp_avg_sq"))))
            g = local([p.grad for p in params])
            x = torch._foreach_lerp(y, z, 1 - 1 / old_beta)
            torch._foreach_add_(z, y, alpha=-lr * lr * group["weight_decay"])
            torch._foreach_lerp_(m, g, 1 - group["betas"][0])
            u = torch._foreach_div(m, adam_denominator(v, g, group["betas"][1], k + 1, group["eps"]))
            torch._foreach_add_(z, u, alpha=-lr / (1 - group["betas"][0] ** (k + 1)))
            torch._foreach_lerp_(x, z, c)
            torch._foreach_copy_(y, torch._foreach_lerp(x, z, 1 - beta))
        return loss

    def _init_state(self, p, use_muon):
        self.state[p].update(z=p.detach().clone(), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def _annealed_beta(self, group):
        progress = min(1.0, group["step"] / group["beta_anneal_steps"]) if group["beta_anneal_steps"] else 0.0
        return 1 - 0.1 * (0.035 / 0.1) ** progress

    def _polyak(self, loss, moving):
        """Polyak's step, max(0, loss + I) / ê, and e, from all gradients of all processes: one all-reduce."""
        G = I = 0.0
        for group, params in moving:
            g, y, z = local([p.grad for p in params]), local(params), local(self._states(params, "z"))
            G = G + sum(torch._foreach_norm(g, 1))
            inner = sum((a * b).sum() for a, b in zip(g, torch._foreach_sub(z, y)))
            I = I + self._annealed_beta(group) / group["beta"] * inner  # z - x = (z - y) / β, with the β that y was written with
        G, I = matrix_sum(torch.stack([G, I]).view(2, 1, 1), moving[0][1][0]).flatten().tolist()
        group = max((group for group, _ in moving), key=lambda group: group["step"])
        e = group["polyak_beta"] * group["gradient_sum"] + (1 - group["polyak_beta"]) * G * math.sqrt(math.pi / 2)
        corrected = e / (1 - group["polyak_beta"] ** (group["step"] + 1))
        return (max(0.0, loss + I) / corrected if corrected > 0 else 0.0), e


class MuonAdamW:
    """torch's own Muon for the groups with use_muon=True and torch's AdamW for the others, as one optimizer."""

    def __init__(self, params, momentum, ns_steps):
        matrices, others = ([group for group in params if group["use_muon"] == use_muon] for use_muon in (True, False))
        self.muon = torch.optim.Muon(matrices, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, fused=True)

    def step(self, closure=None):
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    @property
    def param_groups(self):
        return self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self):
        return {**self.muon.state, **self.adamw.state}
