"""SF-NorMuon, the schedule-free spectral optimizer of "Anytime Training with Schedule-Free Spectral
Optimization" (arXiv:2605.23061, Algorithm 1). It needs only torch: copy it into any project.

Three sequences of weights: z, the fast iterate, takes the steps; x, the running average of z, is
the model you deploy; y, between them, is where gradients are taken. A hidden weight matrix of shape
(m, n) goes through, at t = 1, 2, ...

    g = ∇L(y)
    M ← μ M + (1-μ) g                              momentum
    P = polar(M)                                   Muon: all singular values near 1
    v ← β2 v + (1-β2) mean over columns of P⊙P     NorMuon: one second moment per row
    P̂ = P / (√v + ε)
    η_t = η min(1, t / T_warmup)
    u = η_t λ z + 0.2 η_t √(mn) / ‖P̂‖_F · P̂        decay at z, and a step of RMS 0.2 η_t
    z ← z - u
    x ← (1-c) x + c z,   c = η_t² / Σ_{i≤t} η_i²   Schedule-Free: the average replaces the schedule
    y = (1-β1) z + β1 x

from x = y = z, M = 0 and v = 0. There is no bias correction, since polar(M) and P̂ / ‖P̂‖_F do not
change with a common factor. Every other parameter (embeddings, output head, gains) takes AdamW's
step without the first moment (taking gradients at y does its part): v ← β2 v + (1-β2) g⊙g, then the
last lines with u = η_t λ z + η_t g / (√(v / (1-β2ᵗ)) + ε). The parameter holds y while training and
x while evaluating; the state holds z. test_optim.py opens with the same as an executable reference.
"""
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
else:
    DTensor = ()  # nothing is an instance of it


class SFNorMuon(torch.optim.Optimizer):
    """Schedule-free NorMuon, without schedule and horizon: opt = SFNorMuon(param_groups(model)).

    params: as for torch.optim. A group may override lr, betas, momentum, weight_decay and eps.
        use_muon=True (default): matrices (m, n), or stacks of them (E, m, n); False: the rest.
        If they are DTensors of `fully_shard`, every process must call every method.
    lr: η, read at every step; at 0 nothing moves. momentum: μ. weight_decay: λ. eps: ε.
    betas: β1 in (0, 1], which places y; β2 in [0, 1), the decay of the second moments.
    adam_betas: the betas of groups with use_muon=False that set none.
    warmup_steps: T_warmup. ns_steps, ns_dtype: steps and dtype of `newton_schulz`.
    decay_at: "z"; "y" and "none" are the ablations of Fig. 2, normalize_rows=False that of Fig. 3.
    averaging_power: r, for c = tʳ η_t² / Σ iʳ η_i² (Schedule-Free, arXiv:2405.15682).
    beta_power: p; after the warm-up 1-β1 falls as (T_warmup / t)^p. AMUSE (arXiv:2605.22432) has
        S^ρ here, and its S falls faster.
    step_norm: "rms"; "spectral" steps by √(m/n) η ‖P‖_F / ‖P̂‖_F · P̂ (m outputs, n inputs), whose
        best η hardly changes with the width (the spectral condition, arXiv:2310.17813).

    A parameter without a gradient is skipped, but its group's t advances: one that is unfrozen late
    steps up to 1 / √(1-β2) times too far at first if use_muon=False, so add it as a new group, with
    a t and a warm-up of its own. Parameters, gradients and values that no step can take raise
    ValueError before anything moves; non-finite gradients raise nothing. Keep parameters in
    float32: bfloat16 loses small updates. Only Newton-Schulz is compiled; do not compile opt.step,
    which would recompile at every step.
    """

    def __init__(self, params, lr=0.008, betas=(0.9, 0.95), adam_betas=(0.95, 0.99), momentum=0.8,
                 weight_decay=0.05, warmup_steps=2000, eps=1e-8, ns_steps=5, ns_dtype=None,
                 decay_at="z", normalize_rows=True, averaging_power=0.0, beta_power=0.0,
                 step_norm="rms"):
        super().__init__(params, dict(
            lr=lr, betas=betas, adam_betas=adam_betas, momentum=momentum, weight_decay=weight_decay,
            warmup_steps=warmup_steps, eps=eps, ns_steps=ns_steps, ns_dtype=ns_dtype,
            decay_at=decay_at, normalize_rows=normalize_rows, averaging_power=averaging_power,
            beta_power=beta_power, step_norm=step_norm, use_muon=True, step=0, weight_sum=0.0,
            train_mode=True))

    def add_param_group(self, group):
        group = own_group(group)
        if not group.get("use_muon", True):
            group.setdefault("betas", self.defaults["adam_betas"])
        super().add_param_group(group)
        self.param_groups.pop()  # until it has been checked
        group["beta"] = group["betas"][0]  # the β1 with which y was written
        check_group(group, "averaging_power", "beta_power")
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes a step and returns closure(). RuntimeError in eval mode: gradients belong at y."""
        loss = begin_step(self, closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state.get(p):
                    self.state[p]["z"] = p.detach().clone()
                    if group["use_muon"]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                        self.state[p]["row_second_moment"] = torch.zeros_like(p[..., :1])  # (m, 1)
                    else:
                        self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if params and group["lr"] != 0:  # torch's get_state_dict steps at 0 to create the state
                self._step_group(group, params)
        return loss

    def _step_group(self, group, params):
        """Algorithm 1 for the parameters of a group that have a gradient."""
        group["step"] += 1
        t, T = group["step"], max(1, group["warmup_steps"])
        eta = float(group["lr"]) * min(1.0, t / T)
        weight = t ** group["averaging_power"] * eta**2
        group["weight_sum"] += weight
        c = weight / group["weight_sum"] if group["weight_sum"] else 1.0  # η² may underflow
        beta1 = 1 - (1 - group["betas"][0]) * min(1.0, T / t) ** group["beta_power"]
        skipped = [p for p in group["params"] if p.grad is None]
        towards_z(self, skipped, 1 - beta1 / group["beta"])  # their y follows β1, x and z stay
        for bucket in same_shape(params):  # one batch for Newton-Schulz, one exchange
            g = [local(p.grad) for p in bucket]  # (m, n) each, or this process's rows of it
            if group["use_muon"]:
                M = [local(self.state[p]["momentum_buffer"]) for p in bucket]  # (m, n)
                v = [local(self.state[p]["row_second_moment"]) for p in bucket]  # (m, 1)
                torch._foreach_lerp_(M, g, 1 - group["momentum"])
                u = normuon_directions(M, v, bucket[0], group, group["betas"][1])
            else:
                v = [local(self.state[p]["exp_avg_sq"]) for p in bucket]
                u = adamw_directions(g, v, t, group)
            y, z = [local(p) for p in bucket], [local(self.state[p]["z"]) for p in bucket]
            x = torch._foreach_lerp(y, z, 1 - 1 / group["beta"])  # x = y + (1 - 1/β1) (z - y)
            torch._foreach_mul_(u, eta)
            if group["decay_at"] != "none":
                decayed = z if group["decay_at"] == "z" else y
                torch._foreach_add_(u, decayed, alpha=eta * group["weight_decay"])
            torch._foreach_sub_(z, u)
            torch._foreach_lerp_(x, z, c)
            torch._foreach_copy_(y, x)
            torch._foreach_lerp_(y, z, 1 - beta1)  # y = (1 - β1) z + β1 x
            del x, u  # free them before the next bucket is orthogonalized
        group["beta"] = beta1

    def train(self):
        """Makes the parameters y: before a training step's forward pass. In place, idempotent."""
        for group in self.param_groups:
            if not group["train_mode"]:
                towards_z(self, group["params"], 1 - group["beta"])  # y = x + (1-β1) (z - x)
            group["train_mode"] = True

    def eval(self):
        """Makes the parameters x: before evaluating, sampling or saving. In place, idempotent."""
        for group in self.param_groups:
            if group["train_mode"]:
                towards_z(self, group["params"], 1 - 1 / group["beta"])  # x = y + (1-1/β1) (z - y)
            group["train_mode"] = False

    @torch.no_grad()
    def diagnostics(self) -> dict[Tensor, dict[str, float]]:
        """For each matrix (m, n) that has taken a step (paper, Section 3 and Fig. 4): rho, RMS(z);
        alpha, cosine between P̂ and the z it was subtracted from; predicted, the λρ at which ‖z‖
        stands still with decay_at="z", ½ q (-α + √(α² + 2ηλ)) for steps of RMS q η (q = 0.2 by
        default). Call it on every process, and before lr changes.
        """
        found = {}
        for group in (group for group in self.param_groups if group["use_muon"]):
            eta = float(group["lr"]) * min(1.0, group["step"] / max(1, group["warmup_steps"]))
            params = [p for p in group["params"] if p.ndim == 2 and self.state.get(p)]
            for bucket in same_shape(params):
                M = [local(self.state[p]["momentum_buffer"]) for p in bucket]
                v = [local(self.state[p]["row_second_moment"]) for p in bucket]
                for p, D in zip(bucket, normuon_directions(M, v, bucket[0], group, beta2=1)):
                    z = local(self.state[p]["z"])
                    last = z + eta * D  # the z before this step, already decayed
                    pairs = (z, z), (last, last), (D, D), (last, D)
                    sums = torch.stack([(a * b).sum() for a, b in pairs])
                    zz, ll, DD, lD = (over_processes(sums, p) / p.numel()).tolist()
                    alpha = lD / max(math.sqrt(ll * DD), 1e-30)
                    root = math.sqrt(alpha**2 + 2 * eta * group["weight_decay"])
                    found[p] = dict(rho=math.sqrt(zz), alpha=alpha,
                                    predicted=0.5 * math.sqrt(DD) * (root - alpha))
        return found

    def __setstate__(self, state):
        """Fills in what older versions did not save. ValueError for another optimizer's state."""
        for group in state["param_groups"]:
            if "decay_at" not in group:
                raise ValueError("this is not the state of the schedule-free SFNorMuon")
            added = dict(averaging_power=0.0, beta_power=0.0, step_norm="rms")
            group.update(added | {"beta": group["betas"][0]} | group)
        super().__setstate__(state)


def param_groups(model: nn.Module) -> list[dict]:
    """Two groups for `SFNorMuon` and its like: hidden matrices, and with use_muon=False the rest.

    Hidden matrices have two dimensions and are neither an nn.Embedding's nor an output head's: tied
    to an embedding, or an nn.Linear outside the blocks with as many outputs as an embedding has
    rows. Blocks are what an nn.ModuleList holds.
    """
    modules = list(model.modules())
    embeddings = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    sizes = {m.num_embeddings for m in embeddings}
    blocks = [block for m in modules if isinstance(m, nn.ModuleList) for block in m]
    # A Linear that stands in a ModuleList by itself may be one of several heads.
    inside = {m for block in blocks for m in block.modules() if m is not block}
    linears = [m for m in modules if isinstance(m, nn.Linear) and m not in inside]
    heads = [m for m in linears if m.out_features in sizes]
    ids = {id(m.weight) for m in embeddings + heads}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ids]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in ids]
    return [{"params": matrices}, {"params": rest, "use_muon": False}]


# ---- the two directions: NorMuon's for matrices, AdamW's for everything else

def normuon_directions(Ms, vs, like, group, beta2) -> list[Tensor]:
    """0.2 √(mn) / ‖P̂‖_F · P̂ for the momenta Ms of matrices of the shape of the parameter `like`,
    or with step_norm="spectral" √(m/n) ‖P‖_F / ‖P̂‖_F · P̂.

    vs: the second moments of the rows, (m, 1) each, updated in place; beta2=1 leaves them.
    """
    m, n = like.shape[-2:]
    P = polar(Ms, like, group["ns_steps"], group["ns_dtype"])  # (B, m, n)
    length = 0.2 * math.sqrt(m * n)
    if group["step_norm"] == "spectral":
        length = math.sqrt(m / n) * norms(P, like)
    if group["normalize_rows"]:
        row_means = torch.linalg.vector_norm(P, dim=-1, keepdim=True) ** 2 / n  # P⊙P, (B, m, 1)
        torch._foreach_lerp_(vs, row_means.unbind(), 1 - beta2)
        P.div_(torch.stack(vs).sqrt() + group["eps"])  # now P̂
    return P.mul_(length / norms(P, like).clamp(min=1e-19)).unbind()  # zero stays zero


def norms(P, like) -> Tensor:
    """‖P‖_F of each matrix, (B, 1, 1), or of each matrix of a stack, (B, E, 1, 1)."""
    squares = torch.linalg.matrix_norm(P, keepdim=True) ** 2
    if like.ndim == 2:  # a stack is cut between its matrices
        squares = over_processes(squares, like)
    return squares.sqrt()


def adamw_directions(gs, vs, t, group) -> list[Tensor]:
    """g / (√(v / (1-β2ᵗ)) + ε) for each gradient, after v ← β2 v + (1-β2) g⊙g in place."""
    beta2 = group["betas"][1]
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, value=1 - beta2)
    scales = torch._foreach_div(vs, 1 - beta2**t)
    torch._foreach_sqrt_(scales)
    torch._foreach_add_(scales, group["eps"])
    return torch._foreach_div(gs, scales)


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The approximate polar factor UVᵀ of G = USVᵀ: singular values above 0.01 ‖G‖_F end in
    [0.68, 1.14]. The quintic iteration and its coefficients are Muon's (Jordan et al. 2024).

    G: (..., m, n), of any scale whose squares fit in float32. Returns G's shape and dtype; zero
    gives zero. Computes in `dtype`, by default bfloat16 on CUDA and float32 elsewhere.
    """
    if G.numel() == 0:
        return G.clone()
    if G.ndim > 2 and not G.is_cuda:  # on a CPU, 2-D products are faster than batched ones
        return torch.stack([newton_schulz(M, steps, dtype) for M in G])
    dtype = dtype or (torch.bfloat16 if G.is_cuda else torch.float32)
    if G.is_cuda:
        stack = G.reshape(-1, *G.shape[-2:])
        torch._dynamo.maybe_mark_dynamic(stack, 0)  # fewer matrices may have a gradient next time
        P = compile_iteration()(stack, steps, dtype).reshape(G.shape)
    else:
        P = iteration(G, steps, dtype)
    return P.to(G.dtype).contiguous()


def iteration(G: Tensor, steps: int, dtype: torch.dtype) -> Tensor:  # (m, n), on CUDA (B, m, n)
    a, b, c = 3.4445, -4.7750, 2.0315
    addmm = torch.addmm if G.ndim == 2 else torch.baddbmm  # fewer passes over memory
    X = G.to(torch.promote_types(G.dtype, torch.float32))  # the norm's squares need float32
    X = (X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-19)).to(dtype)
    m, n = G.shape[-2:]
    if m > n:  # so that X Xᵀ is of the smaller size
        X = X.mT
    if max(m, n) < 2 * min(m, n):
        for _ in range(steps):
            A = X @ X.mT
            B = addmm(A, A, A, beta=b, alpha=c)  # b A + c A²
            X = addmm(X, B, X, beta=a)  # a X + b (XXᵀ) X + c (XXᵀ)² X
    else:
        # Gram Newton-Schulz (Zhang, Amsel, Chen and Dao 2026), in the smaller size: X ← pX means
        # A ← pAp for A = XXᵀ, so the polynomials p are multiplied before they meet X. Rounding
        # errors of A grow twelvefold in a step, hence a new A after three.
        for done in range(0, steps, 3):
            A, Q = X @ X.mT, None
            for left in reversed(range(min(3, steps - done))):
                p = addmm(A, A, A, beta=b, alpha=c)
                p.diagonal(dim1=-2, dim2=-1).add_(a)  # p = a I + b A + c A²
                Q = p if Q is None else p @ Q
                A = p @ A @ p if left else None
            X = Q @ X
    return X.mT if m > n else X


# ---- many processes

def local(t: Tensor) -> Tensor:
    """What this process holds: its own rows of a DTensor, or all of a plain tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def over_processes(sums: Tensor, like: Tensor) -> Tensor:
    """Adds up what each process has summed over its part of the parameter `like`."""
    if not isinstance(like, DTensor):
        return sums
    placements = [Partial() if p.is_shard() else p for p in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements, run_check=False).full_tensor()


def polar(Ms: list[Tensor], like: Tensor, steps: int, dtype: torch.dtype | None) -> Tensor:
    """Polar factors, (B, m, n), of B matrices Ms of the shape (m, n) of `like`. Each process passes
    its rows of every matrix and gets the same rows back.

    The only place that needs whole matrices, so the only exchange: DTensors sharded by rows are
    redistributed (an all-to-all) so that each process holds its share of the B matrices, and back.
    """
    if not isinstance(like, DTensor) or like.ndim > 2:
        return newton_schulz(torch.stack(Ms), steps, dtype)
    m, n = like.shape
    rows = [Shard(1) if p.is_shard() else p for p in like.placements]
    split = [p if p.is_shard() else Shard(0) for p in rows]  # DTensor's direct plan would gather
    whole = [Shard(0)] * len(rows)
    wrap = functools.partial(DTensor.from_local, device_mesh=like.device_mesh, run_check=False,
                             shape=torch.Size([len(Ms), m, n]), stride=(m * n, n, 1))
    dtype = dtype or (torch.bfloat16 if Ms[0].is_cuda else torch.float32)
    stack = wrap(torch.stack(Ms).to(dtype), placements=rows)
    mine = stack.redistribute(placements=split).redistribute(placements=whole).to_local()
    stack = wrap(newton_schulz(mine, steps, dtype), placements=whole).redistribute(placements=rows)
    return stack.to_local().to(Ms[0].dtype)


# ---- speed

def same_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """Lists of parameters of one shape, dtype, device and sharding."""
    buckets = {}
    for p in params:
        sharding = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        buckets.setdefault((p.shape, p.dtype, p.device, sharding), []).append(p)
    return list(buckets.values())


@functools.cache
def compile_iteration():  # not on import, since it changes a setting of the whole process
    # It compiles once for each shape, of which a model may have more than torch allows by default.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(iteration, fullgraph=True, dynamic=False)


# ---- what the optimizers of this repository share

def own_group(group: dict) -> dict:
    """A copy of the caller's group, for our counters. An iterator becomes a list in both, since it
    can be read only once."""
    if isinstance(group["params"], Iterator):
        group["params"] = list(group["params"])
    return dict(group)


def begin_step(optimizer, closure):
    """The closure's loss, or None. RuntimeError in eval mode, ValueError for a bad tensor."""
    if not all(group.get("train_mode", True) for group in optimizer.param_groups):
        raise RuntimeError("step() in eval mode: call .train() before the forward pass")
    with torch.enable_grad():
        loss = None if closure is None else closure()
    kind = lambda t: (tuple(t.shape), t.dtype, t.device, t.layout)
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        expected = kind(p)
        for name, t in {"gradient": p.grad, **optimizer.state.get(p, {})}.items():
            alike = kind(t) == expected or name == "row_second_moment"  # it has a shape of its own
            if not alike or t.dtype == torch.float16:
                raise ValueError(f"{name} {kind(t)} must be like its parameter {expected}, and not "
                                 "float16")
    return loss


@torch.no_grad()
def towards_z(optimizer, params, weight: float) -> None:
    """w ← w + weight (z - w), in place, for each parameter w that has a state."""
    for p in params:
        if optimizer.state.get(p):
            local(p).lerp_(local(optimizer.state[p]["z"]), weight)


def check_group(group: dict, *names: str) -> None:
    """Raises ValueError for a group that no step can take. `names`: more that must be >= 0."""
    least = dict.fromkeys(("lr", "weight_decay", "warmup_steps", *names), 0)
    least |= {"ns_steps": 1, "eps": 1e-37}  # which float32 and bfloat16 still hold
    for name, value in least.items():
        if not value <= group.get(name, value) < math.inf:
            raise ValueError(f"{name} must be at least {value} and finite, got {group[name]}")
    below_1 = dict(beta2=group["betas"][1], adam_beta2=group.get("adam_betas", (0, 0))[1],
                   momentum=group.get("momentum", 0))
    for name, value in below_1.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    beta1s = dict(beta1=group.get("beta", 1), adam_beta1=group.get("adam_betas", (1, 0))[0])
    for name, value in beta1s.items():
        if not 0 < value <= 1:  # at 0, y = z and x could not be recovered
            raise ValueError(f"{name} must be in (0, 1], got {value}")
    for name, known in (("decay_at", ("z", "y", "none")), ("step_norm", ("rms", "spectral"))):
        if group.get(name, known[0]) not in known:
            raise ValueError(f"{name} must be one of {known}, got {group[name]!r}")
    for p in group["params"]:
        what, placements = f"parameter of shape {tuple(p.shape)}", getattr(p, "placements", ())
        if p.is_complex() or p.layout != torch.strided or p.dtype == torch.float16:  # ε is 0 there
            raise ValueError(f"{what}: must be real and dense, not float16: {p.dtype}, {p.layout}")
        if group["use_muon"] and p.ndim not in (2, 3):
            raise ValueError(f"{what} is no matrix or stack of them: give the parameter of a view, "
                             "or put it into a group with use_muon=False")
        if group["use_muon"] and any(q not in (Shard(0), Replicate()) for q in placements):
            raise ValueError(f"{what} must be sharded by rows, Shard(0), got {placements}")
