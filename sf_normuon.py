"""SF-NorMuon, the schedule-free spectral optimizer of "Anytime Training with Schedule-Free Spectral Optimization"
(arXiv:2605.23061, Algorithm 1). This file needs nothing but torch: copy it into any project.

Three sequences of weights: z, the fast iterate, takes the steps; x, the running average of z, is the model you deploy;
y, between them, is where gradients are taken. A hidden weight matrix W of shape (m, n) goes through, at t = 1, 2, ...

    g = ∇L(y)
    M ← μ M + (1-μ) g                                   momentum
    P = polar(M)                                        Muon: all singular values near 1
    v ← β2 v + (1-β2) mean over columns of P⊙P          NorMuon: one second moment per row
    P̂ = P / (√v + ε)
    η_t = η min(1, t / T_warmup)
    u = η_t λ z + 0.2 η_t √(mn) / ‖P̂‖_F · P̂             decay at the fast iterate, and a step of RMS 0.2 η_t
    z ← z - u
    x ← (1-c) x + c z,   c = η_t² / Σ_{i≤t} η_i²        Schedule-Free: the average replaces the schedule
    y = (1-β1) z + β1 x

from x = y = z, M = 0 and v = 0, without bias correction: polar(M) and P̂ / ‖P̂‖_F do not see a common factor.
Every other parameter (embeddings, output head, gains) takes AdamW's step without a first moment, since y between z and x
does that work: v ← β2 v + (1-β2) g⊙g, u = η_t λ z + η_t g / (√(v / (1-β2ᵗ)) + ε), and then the last three lines.
Only two of x, y and z are stored: the parameter holds y while training and x while evaluating, the state holds z.
"""
import functools
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

BETAS, ADAMW_BETAS = (0.9, 0.95), (0.95, 0.99)  # defaults for the matrices, and for everything else


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The approximate polar factor UVᵀ of G = USVᵀ: singular values above about 0.01 ‖G‖_F land in [0.68, 1.14].

    G: (..., m, n), any scale. Returns G's shape and dtype; zero gives zero. Computes in `dtype`, by default bfloat16
    on CUDA and float32 elsewhere. The quintic iteration and its coefficients are Muon's (Jordan et al. 2024).
    """
    if G.numel() == 0:
        return G.clone()
    iterate = _compiled() if G.is_cuda else _iterate
    X = G.to(dtype or _default_dtype(G))
    X = iterate(X.reshape(-1, *G.shape[-2:]), steps).reshape(G.shape)
    return X.to(G.dtype, memory_format=torch.contiguous_format).contiguous()  # one copy at most


def _default_dtype(G: Tensor) -> torch.dtype:
    return torch.bfloat16 if G.is_cuda else torch.float32


def _iterate(X: Tensor, steps: int) -> Tensor:  # (B, m, n)
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = X.size(-2) > X.size(-1)
    if tall:  # the products X Xᵀ are then of the smaller size
        X = X.mT.contiguous()
    tiny = torch.finfo(X.dtype).tiny
    # The largest entry first, because the squares of small or large gradients leave the range of the dtype.
    X = X / X.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    X /= torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=tiny)
    if 2 * X.size(-2) <= X.size(-1):
        # The same in m x m (Gram Newton-Schulz). Rounding errors of A grow twelvefold in a step: begin anew after three.
        for done in range(0, steps, 3):
            X = _polynomial(_symmetric(X, X.mT), min(3, steps - done), a, b, c) @ X
    else:
        for _ in range(steps):  # X ← a X + b (XXᵀ) X + c (XXᵀ)² X
            A = _symmetric(X, X.mT)
            B = _symmetric(A, A, A, b, c)
            X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def _polynomial(A: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    """Q of X ← Q X in `steps` iterations, from A = XXᵀ alone: p = aI + bA + cA², X ← pX, and so A ← pAp."""
    Q = None
    for left in reversed(range(steps)):
        p = _symmetric(A, A, A, b, c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = p if Q is None else _symmetric(p, Q)
        A = _symmetric(p, A @ p) if left else A
    return Q


def _symmetric(A: Tensor, B: Tensor, C: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """β C + α A B, known to be symmetric, so that a quarter of it need not be computed."""
    m, h = A.size(-2), A.size(-2) // 2
    # Joining the pieces costs more than they save if they are small, and on a GPU (counted, not measured) always.
    if A.is_cuda or m < 256:
        return A @ B if C is None else torch.baddbmm(C, A, B, beta=beta, alpha=alpha)
    if C is None:
        C = A.new_zeros(()).expand(len(A), m, m)
    top = torch.baddbmm(C[:, :h], A[:, :h], B, beta=beta, alpha=alpha)
    corner = torch.baddbmm(C[:, h:, h:], A[:, h:], B[:, :, h:], beta=beta, alpha=alpha)
    return torch.cat([top, torch.cat([top[:, :, h:].mT, corner], -1)], -2)


@functools.cache
def _compiled():  # not when this file is imported, since it changes a setting of the whole process
    compiled = torch.compile(_iterate, fullgraph=True, dynamic=False)
    # It compiles once for each shape, of which a model may have more than torch allows by default.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return compiled


def local(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: its own rows of a DTensor, or all of a plain tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def same_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in groups that can be stacked; on a CPU a large one is by itself, as it then stays in the cache."""
    groups = {}
    for p in params:
        sharding = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        alone = id(p) if p.device.type == "cpu" and not sharding and p.numel() > 2**18 else None
        groups.setdefault((p.shape, p.dtype, p.device, sharding, alone), []).append(p)
    return list(groups.values())


def polar(Ms: list[Tensor], steps: int, dtype: torch.dtype | None) -> Tensor:
    """Polar factors of B matrices of one shape (m, n), stacked: (B, m, n), or (B, rows, n) of this process's rows.

    The only place that needs whole matrices, so the only exchange: DTensors sharded by rows are redistributed so that
    each process holds its share of the B matrices whole (an all-to-all), and back. All processes must call it.
    """
    M, stack = Ms[0], torch.stack(local(Ms))
    if not isinstance(M, DTensor):
        return newton_schulz(stack, steps, dtype)
    rows = [Shard(1) if p.is_shard() else p for p in M.placements]
    whole = [Shard(0)] * len(rows)

    def exchange(tensor, source, target):
        shape = torch.Size([len(Ms), *M.shape])
        tensor = DTensor.from_local(tensor.contiguous(), M.device_mesh, source, run_check=False,
                                    shape=shape, stride=(shape[1] * shape[2], shape[2], 1))
        return tensor.redistribute(placements=target).to_local()

    mine = exchange(stack.to(dtype or _default_dtype(stack)), rows, whole)
    return exchange(newton_schulz(mine, steps, dtype), whole, rows).to(stack.dtype)


def matrix_sum(T: Tensor, like: Tensor) -> Tensor:
    """Sums (B, rows, n) over whole matrices: (B, 1, 1), over all processes where `like` is sharded."""
    total = T.sum((-2, -1), keepdim=True)
    if isinstance(like, DTensor):
        placements = [Partial() if p.is_shard() else p for p in like.placements]
        total = DTensor.from_local(total, like.device_mesh, placements, run_check=False).full_tensor()
    return total


def normuon_direction(Ms: list[Tensor], vs: list[Tensor], beta2: float, eps: float, steps: int,
                      dtype: torch.dtype | None, normalize_rows: bool) -> Tensor:
    """0.2 √(mn) / ‖P̂‖_F · P̂ for B matrices of one shape, stacked: (B, rows, n), with a root mean square of 0.2.

    Ms: momenta, (m, n) each. vs: second moments of the rows, (m, 1) each, updated in place (beta2=1 keeps them).
    """
    P = polar(Ms, steps, dtype)
    squares = torch.linalg.vector_norm(P, dim=-1, keepdim=True).square()  # of each row of P, then of P̂
    factor = 0.2 * math.sqrt(Ms[0].numel())
    if normalize_rows:
        vs = local(vs)
        torch._foreach_lerp_(vs, list((squares / P.size(-1)).unbind()), 1 - beta2)
        root = torch.stack(vs).sqrt() + eps
        squares, factor = squares / root.square(), factor / root
    norm = matrix_sum(squares, Ms[0]).sqrt()
    return P.mul_(factor / norm.clamp(min=torch.finfo(P.dtype).tiny ** 0.5))


def adam_denominator(v: list[Tensor], g: list[Tensor], beta2: float, t: int, eps: float) -> list[Tensor]:
    """√(v / (1-β2ᵗ)) + ε, after v ← β2 v + (1-β2) g², in place, for step t = 1, 2, ... of each local tensor."""
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    denominator = torch._foreach_div(v, 1 - beta2**t)
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, eps)
    return denominator


def check_not_negative(group: dict, *names: str) -> None:
    for name in names:
        if not group.get(name, 0) >= 0:
            raise ValueError(f"{name} must not be negative, got {group[name]}")


def check_group(group: dict) -> None:
    """Raises ValueError for a parameter group that none of the optimizers here can take."""
    check_not_negative(group, "lr", "weight_decay", "eps", "warmup_steps")
    if not (len(group["betas"]) == 2 and 0 <= group["betas"][1] < 1):
        raise ValueError(f"betas must be two numbers, the second one in [0, 1), got {group['betas']}")
    if not 0 <= group.get("momentum", 0) < 1:
        raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
    if not (isinstance(group.get("ns_steps", 1), int) and group.get("ns_steps", 1) >= 1):
        raise ValueError(f"ns_steps must be a whole number of at least 1, got {group['ns_steps']}")
    for p in group["params"]:
        if p.is_complex() or p.layout != torch.strided:
            raise ValueError(f"parameters must be real and dense, got {p.dtype}, {p.layout} of shape {tuple(p.shape)}")
        if not group["use_muon"]:
            continue
        if p.ndim != 2:
            raise ValueError(f"use_muon=True wants matrices, got a parameter of shape {tuple(p.shape)}: "
                             "put it into a group with use_muon=False")
        if isinstance(p, DTensor) and any(q not in (Shard(0), Replicate()) for q in p.placements):
            raise ValueError(f"matrices must be sharded by rows, Shard(0), got {p.placements}")


class ScheduleFree(torch.optim.Optimizer):
    """What schedule-free optimizers share: the parameter holds y while training and x while evaluating, the state z.

    A subclass has step(), made of _begin and _moving, and _init_state(p, use_muon); one that uses _move_all also has
    _matrix_direction(group, params), the directions of matrices of one shape. Its groups have use_muon, train_mode, step,
    warmup_steps, averaging_power, weight_sum and beta: the β with which y was written last, which gives x back. It may move.
    """

    def train(self) -> None:
        """Makes the parameters y, where gradients are taken. In place, idempotent, not a collective."""
        self._switch(True)

    def eval(self) -> None:
        """Makes the parameters x, the averaged weights, which are the model. In place, idempotent, not a collective."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train_mode):
        for group in self.param_groups:
            params = [p for p in group["params"] if p in self.state]
            if group["train_mode"] != train_mode and params:
                beta = group["beta"]
                weight = 1 - beta if train_mode else 1 - 1 / beta  # y = x + (1-β) (z-x), x = y + (1-1/β) (z-y)
                torch._foreach_lerp_(local(params), local(self._states(params, "z")), weight)
            group["train_mode"] = train_mode

    def _set_beta(self, group, beta, moving):
        """β belongs to the group: parameters that skip this step get their y with the new one here, others in _move."""
        if beta != group["beta"]:
            moving = set(moving)
            still = [p for p in group["params"] if p in self.state and p not in moving]
            if still:
                y, z = local(still), local(self._states(still, "z"))
                torch._foreach_lerp_(y, z, 1 - 1 / group["beta"])  # x
                torch._foreach_lerp_(y, z, 1 - beta)
        group["beta"] = beta

    def _begin(self, closure):
        """What step() starts with: returns the closure's loss, or None."""
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("step() in eval mode: call .train() before the forward pass of a training step")
        with torch.enable_grad():
            return closure and closure()

    def _moving(self):
        """Each group that a step moves, with its parameters that have a gradient, their state made."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self._init_state(p, group["use_muon"])
            if params and group["lr"] != 0:  # at 0 only the state is made: torch's get_optimizer_state_dict steps so
                yield group, params

    def _warmed_up_lr(self, group):
        return float(group["lr"]) * min(1.0, group["step"] / max(1, group["warmup_steps"]))

    def _next_average_weight(self, group, lr):
        """c = w / Σw, w = tʳ lr²: the part of z in the average at this step, which weight_sum now counts."""
        w = group["step"] ** group["averaging_power"] * lr * lr
        group["weight_sum"] += w
        return w / group["weight_sum"] if group["weight_sum"] else 1.0

    def _states(self, params, name):
        return [self.state[p][name] for p in params]

    def _adamw_direction(self, group, params):
        """g / (√v̂ + ε)."""
        g, v = local([p.grad for p in params]), local(self._states(params, "exp_avg_sq"))
        return torch._foreach_div(g, adam_denominator(v, g, group["betas"][1], group["step"], group["eps"]))

    def _move_all(self, group, params, lr, c, beta):
        old_beta = group["beta"]
        self._set_beta(group, beta, params)
        for bucket in same_shape(params) if group["use_muon"] else [params]:
            direction = self._matrix_direction if group["use_muon"] else self._adamw_direction
            self._move(group, bucket, direction(group, bucket), lr, c, old_beta)

    def _move(self, group, params, direction, lr, c, old_beta):
        """z ← z - u with u = η_t (λ z + direction), x and y, with x eliminated: the parameter goes from y to y."""
        y, z, beta = local(params), local(self._states(params, "z")), group["beta"]
        decay_at = group.get("decay_at", "z")
        if decay_at != "none":
            torch._foreach_add_(direction, z if decay_at == "z" else y, alpha=group["weight_decay"])  # now u / η_t
        # y ← k y + (1-k) z - (1 - β (1-c)) u, with the old z and k = (1-c) β / β_old, which is 1-c while β stands still
        torch._foreach_lerp_(y, z, 1 - (1 - c) * beta / old_beta)
        torch._foreach_add_(y, direction, alpha=-lr * (1 - beta * (1 - c)))
        torch._foreach_add_(z, direction, alpha=-lr)


class SFNorMuon(ScheduleFree):
    """Schedule-free NorMuon (arXiv:2605.23061, Algorithm 1). Needs no schedule and no horizon.

        opt = SFNorMuon([{"params": matrices}, {"params": rest, "use_muon": False}])
        opt.train()  # the parameters are y: before the forward pass of every training step
        opt.step()
        opt.eval()   # the parameters are x: before evaluating, sampling or saving the model

    params: as for torch.optim, plain tensors or DTensors from `fully_shard` (then every process calls every method).
        A group may carry use_muon (default True: hidden weight matrices, ndim 2; False: everything else, embeddings and
        the output head included) and its own lr, betas, momentum, weight_decay, eps.
    lr: η, also of the groups with use_muon=False. Read at every step; at 0 nothing moves.
    betas: β1, how far y is from z towards x, in (0, 1]; β2, of the second moments. Groups with use_muon=False have
        (0.95, 0.99) unless betas is given, here or there.
    momentum: μ, of the matrices only. weight_decay: λ. eps: ε.
    warmup_steps: T_warmup. ns_steps, ns_dtype: of `newton_schulz`.
    decay_at: "z" (the method), "y" or "none", the ablation of the paper's Fig. 2; for every group.
    normalize_rows: False leaves the row normalization out, the ablation of Fig. 3.
    averaging_power: r, of weights tʳ η_t² in the average: above 0, it forgets its beginning sooner.
    beta_power: p, of 1-β1, which falls as (T_warmup / t)^p after the warm-up: the gradient moves from near z to x.
        Neither is in the paper, whose method is r = p = 0 (experiments/results/frontier.md says what they do).

    Keep the parameters in float32: updates of RMS 0.2 η would be lost in the rounding of bfloat16 weights.
    A parameter without a gradient is skipped, but t counts the steps of its group: where the first gradient comes late,
    AdamW's first step is longer, up to η / √(1-β2). Gradients that are not finite raise nothing here.
    Raises ValueError for values out of range, for use_muon=True with anything but matrices, and for sparse or complex
    parameters.
    """

    def __init__(self, params, lr=0.008, betas=BETAS, momentum=0.8, weight_decay=0.05, warmup_steps=2000, eps=1e-8,
                 ns_steps=5, ns_dtype=None, decay_at="z", normalize_rows=True, averaging_power=0.0, beta_power=0.0):
        if decay_at not in ("z", "y", "none"):
            raise ValueError(f'decay_at must be "z", "y" or "none", got {decay_at!r}')
        super().__init__(params, dict(
            lr=lr, betas=betas, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps, eps=eps,
            ns_steps=ns_steps, ns_dtype=ns_dtype, decay_at=decay_at, normalize_rows=normalize_rows,
            averaging_power=averaging_power, beta_power=beta_power, use_muon=True, step=0, weight_sum=0.0, train_mode=True))

    def add_param_group(self, group):
        if not group.get("use_muon", True) and self.defaults["betas"] is BETAS:  # betas was left at its default
            group.setdefault("betas", ADAMW_BETAS)
        super().add_param_group(group)
        group["beta"] = group["betas"][0]
        check_group(group)
        check_not_negative(group, "averaging_power", "beta_power")
        if not 0 < group["betas"][0] <= 1:  # x could not be recovered from y = z
            raise ValueError(f"beta1 must be in (0, 1], got {group['betas'][0]}")

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient. Returns the closure's loss, if there is a closure.

        Raises RuntimeError in eval mode, because the gradient must have been taken at y.
        """
        loss = self._begin(closure)
        for group, params in self._moving():
            group["step"] += 1
            lr = self._warmed_up_lr(group)
            c = self._next_average_weight(group, lr)
            fall = min(1.0, max(1, group["warmup_steps"]) / group["step"]) ** group["beta_power"]  # of 1-β; 1 in the paper
            self._move_all(group, params, lr, c, beta=1 - (1 - group["betas"][0]) * fall)
        return loss

    def _init_state(self, p, use_muon):
        state = self.state[p]
        state["z"] = p.detach().clone()
        if use_muon:
            state["momentum_buffer"] = torch.zeros_like(p)
            state["row_second_moment"] = torch.zeros_like(p[:, :1])  # (m, 1), sharded like p
        else:
            state["exp_avg_sq"] = torch.zeros_like(p)

    def _matrix_direction(self, group, params):
        Ms = self._states(params, "momentum_buffer")
        torch._foreach_lerp_(local(Ms), local([p.grad for p in params]), 1 - group["momentum"])
        return list(self._direction(group, params, group["betas"][1]).unbind())

    def _direction(self, group, params, beta2):
        return normuon_direction(
            self._states(params, "momentum_buffer"), self._states(params, "row_second_moment"), beta2, group["eps"],
            group["ns_steps"], group["ns_dtype"], group["normalize_rows"])

    @torch.no_grad()
    def diagnostics(self) -> dict[Tensor, dict[str, float]]:
        """For each matrix that has taken a step, as the paper's Fig. 4 plots them (Section 3):

        rho: RMS(z). alpha: ⟨z, P̂⟩ / (‖z‖ ‖P̂‖), of the last P̂ and the z that it was subtracted from.
        predicted: 0.1 (-α + √(α² + 2ηλ)), the λρ at which ‖z‖ stands still, for decay_at="z".
        P̂ is computed anew from the state, so with DTensors every process must call this.
        """
        result = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p in self.state and group["use_muon"]]
            for bucket in same_shape(params):
                lr = self._warmed_up_lr(group)
                z, D = torch.stack(local(self._states(bucket, "z"))), self._direction(group, bucket, beta2=1.0)
                before = z + lr * D  # z before the last step, up to the factor 1 - ηλ; D is P̂ at an RMS of 0.2
                zz, bb, DD, bD = (matrix_sum(a * b, bucket[0]).flatten()
                                  for a, b in ((z, z), (before, before), (D, D), (before, D)))
                rho = (zz / bucket[0].numel()).sqrt()
                alpha = bD / (bb * DD).sqrt().clamp(min=torch.finfo(zz.dtype).tiny)
                predicted = 0.1 * (-alpha + (alpha**2 + 2 * lr * group["weight_decay"]).sqrt())
                for p, *values in zip(bucket, rho.tolist(), alpha.tolist(), predicted.tolist()):
                    result[p] = dict(zip(("rho", "alpha", "predicted"), values))
        return result
