"""The rivals that torch does not ship, each as its authors give it, with the conventions of `SFNorMuon`."""
import torch

from sf_normuon import adam_denominator, check_group, local, normuon_direction, same_shape


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
                g = local([p.grad for p in bucket])
                u = self._matrix_step(group, bucket, g) if group["use_muon"] else self._adamw_step(group, bucket, g)
                p, lr = local(bucket), float(group["lr"])
                torch._foreach_mul_(p, 1 - lr * group["weight_decay"])
                torch._foreach_add_(p, u, alpha=-lr)
        return loss

    def _matrix_step(self, group, params, g):
        Ms, vs = ([self.state[p][name] for p in params] for name in ("momentum_buffer", "row_second_moment"))
        torch._foreach_lerp_(local(Ms), g, 1 - group["momentum"])
        nesterov = torch._foreach_lerp([p.grad for p in params], Ms, group["momentum"])
        return list(normuon_direction(nesterov, vs, group["betas"][1], group["eps"], group["ns_steps"],
                                      group["ns_dtype"], group["normalize_rows"]).unbind())

    def _adamw_step(self, group, params, g):
        m, v = (local([self.state[p][name] for p in params]) for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), t = group["betas"], group["step"]
        torch._foreach_lerp_(m, g, 1 - beta1)
        u = torch._foreach_div(m, adam_denominator(v, g, beta2, t, group["eps"]))
        torch._foreach_div_(u, 1 - beta1**t)
        return u


class MuonAdamW:
    """torch's own Muon for the groups with use_muon=True and torch's AdamW for the others, as one optimizer."""

    def __init__(self, params, momentum, ns_steps):
        matrices, others = ([group for group in params if group["use_muon"] == use_muon] for use_muon in (True, False))
        self.muon = torch.optim.Muon(matrices, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, fused=True)

    def step(self):
        self.muon.step()
        self.adamw.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict):
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])

    @property
    def param_groups(self):
        return self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self):
        return {**self.muon.state, **self.adamw.state}
