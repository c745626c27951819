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
see a common factor. Every other parameter (embeddings, output head, gains) takes AdamW's step
without a first moment, which y between z and x replaces: v ← β2 v + (1-β2) g⊙g, then the last lines
with u = η_t λ z + η_t g / (√(v / (1-β2ᵗ)) + ε). The parameter holds y while training and x while
evaluating, the state holds z. test_optim.py opens with the same as an executable reference.
"""
import functools
import math

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
else:
    DTensor = ()  # nothing is an instance of it


class SFNorMuon(torch.optim.Optimizer):
    """Schedule-free NorMuon, without schedule and horizon: opt = SFNorMuon(param_groups(model)).

    params: as for torch.optim, plain tensors or DTensors of `fully_shard` (then every process calls
        every method). A group may override lr, betas, momentum, weight_decay and eps.
        use_muon=True (default): hidden matrices (m, n) or stacks of them (E, m, n); False: the rest.
    lr: η, read at every step; at 0 nothing moves. momentum: μ. weight_decay: λ. eps: ε.
    betas: β1 in (0, 1], how far y is from z towards x; β2, of the second moments.
    adam_betas: the same for groups with use_muon=False that bring no betas of their own.
    warmup_steps: T_warmup. ns_steps, ns_dtype: steps and dtype of `newton_schulz`.
    decay_at: "z" (the method), "y" or "none" (paper, Fig. 2). normalize_rows: False: Fig. 3.
    averaging_power: r of Schedule-Free (arXiv:2405.15682), weights tʳ η_t² in the average.
    beta_power: p of AMUSE's rule for β (arXiv:2605.22432, its ρ): 1-β1 falls as (T_warmup / t)^p
        after the warm-up. The paper's method has r = p = 0.

    A parameter without a gradient is skipped, while its group's t goes on. Raises ValueError for
    parameters, gradients and values that no step can take, before anything moves; nothing for
    gradients that are not finite. Keep parameters in float32: bfloat16 loses small updates. Only
    Newton-Schulz is compiled; torch.compile(opt.step) would compile every step.
    """

    def __init__(self, params, lr=0.008, betas=(0.9, 0.95), adam_betas=(0.95, 0.99), momentum=0.8,
                 weight_decay=0.05, warmup_steps=2000, eps=1e-8, ns_steps=5, ns_dtype=None,
                 decay_at="z", normalize_rows=True, averaging_power=0.0, beta_power=0.0):
        super().__init__(params, dict(
            lr=lr, betas=betas, adam_betas=adam_betas, momentum=momentum, weight_decay=weight_decay,
            warmup_steps=warmup_steps, eps=eps, ns_steps=ns_steps, ns_dtype=ns_dtype,
            decay_at=decay_at, normalize_rows=normalize_rows, averaging_power=averaging_power,
            beta_power=beta_power, use_muon=True, step=0, weight_sum=0.0, train_mode=True))

    def add_param_group(self, group):
        if not group.get("use_muon", True):
            group.setdefault("betas", self.defaults["adam_betas"])
        super().add_param_group(group)
        group["beta"] = group["betas"][0]  # the β1 with which y was written
        check_group(group, "averaging_power", "beta_power")
        if not 0 < group["beta"] <= 1:  # x could not be recovered from y = z
            raise ValueError(f"beta1 must be in (0, 1], got {group['beta']}")
        if group["decay_at"] not in ("z", "y", "none"):
            raise ValueError(f'decay_at must be "z", "y" or "none", got {group["decay_at"]!r}')

    @torch.no_grad()
    def step(self, closure=None):
        """Moves every parameter that has a gradient. Returns the closure's loss, or None.

        Raises RuntimeError in eval mode: the gradient must have been taken at y.
        """
        loss = begin_step(self, closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in (p for p in params if not self.state.get(p)):
                self.state[p]["z"] = p.detach().clone()
                if group["use_muon"]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    self.state[p]["row_second_moment"] = torch.zeros_like(p[..., :1])  # (m, 1)
                else:
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if params and group["lr"] != 0:  # a step at 0 is how torch has the state made
                self._step_group(group, params)
        return loss

    def _step_group(self, group, params):
        """Algorithm 1 for the parameters of a group that have a gradient."""
        group["step"] += 1
        t, T = group["step"], max(1, group["warmup_steps"])
        eta = float(group["lr"]) * min(1.0, t / T)
        weight = t ** group["averaging_power"] * eta**2
        group["weight_sum"] += weight
        c = weight / group["weight_sum"] if group["weight_sum"] else 1.0
        beta1 = 1 - (1 - group["betas"][0]) * min(1.0, T / t) ** group["beta_power"]
        if beta1 != group["beta"]:  # parameters without a gradient get their y with the new β1
            skipped = [p for p in group["params"] if p.grad is None]
            towards_z(self, skipped, 1 - 1 / group["beta"], 1 - beta1)
        for bucket in same_shape(params):
            g = [local(p.grad) for p in bucket]  # (m, n) each, or this process's rows of it
            if group["use_muon"]:
                M = states(self, bucket, "momentum_buffer")  # (m, n)
                v = states(self, bucket, "row_second_moment")  # (m, 1)
                torch._foreach_lerp_(M, g, 1 - group["momentum"])
                directions = normuon_directions(M, v, bucket[0], group, group["betas"][1])
            else:
                v = states(self, bucket, "exp_avg_sq")
                directions = adamw_directions(g, v, t, group)
            for y, z, direction in zip(map(local, bucket), states(self, bucket, "z"), directions):
                x = y.lerp(z, 1 - 1 / group["beta"])  # x = y + (1 - 1/β1) (z - y)
                u = direction.mul_(eta)
                if group["decay_at"] != "none":
                    u.add_(z if group["decay_at"] == "z" else y, alpha=eta * group["weight_decay"])
                z.sub_(u)
                x.lerp_(z, c)
                torch.lerp(x, z, 1 - beta1, out=y)
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
        """For each matrix of two dimensions that has taken a step (paper, Section 3 and Fig. 4):

        rho: RMS(z). alpha: cosine between P̂ and the z it was subtracted from.
        predicted: 0.1 (-α + √(α² + 2ηλ)), the λρ at which ‖z‖ stands still, for decay_at="z".
        P̂ is computed again from the state, so with DTensors every process must call this.
        """
        found = {}
        for group in self.param_groups:
            eta = float(group["lr"]) * min(1.0, group["step"] / max(1, group["warmup_steps"]))
            matrices = [p for p in group["params"] if group["use_muon"] and p.ndim == 2]
            for bucket in same_shape([p for p in matrices if self.state.get(p)]):
                M = states(self, bucket, "momentum_buffer")
                v = states(self, bucket, "row_second_moment")
                directions = normuon_directions(M, v, bucket[0], group, beta2=1.0)  # v stays
                for p, z, D in zip(bucket, states(self, bucket, "z"), directions):
                    last = z + eta * D  # the z before this step, but for the factor 1 - ηλ
                    pairs = (z, z), (last, last), (D, D), (last, D)
                    sums = torch.stack([(a * b).sum() for a, b in pairs])
                    zz, ll, DD, lD = over_processes(sums, p).tolist()
                    alpha = lD / max(math.sqrt(ll * DD), 1e-30)
                    predicted = math.sqrt(alpha**2 + 2 * eta * group["weight_decay"]) - alpha
                    found[p] = dict(rho=math.sqrt(zz / p.numel()), alpha=alpha,
                                    predicted=0.1 * predicted)
        return found

    def __setstate__(self, state):
        """Fills in what older versions did not save. ValueError for another optimizer's state."""
        for group in state["param_groups"]:
            if not {"use_muon", "step", "weight_sum", "train_mode"} <= group.keys():
                raise ValueError("this is the state of an optimizer that is not schedule-free")
            added = {"averaging_power": 0.0, "beta_power": 0.0, "beta": group["betas"][0]}
            group.update(added | group)
        super().__setstate__(state)


def param_groups(model: nn.Module) -> list[dict]:
    """Two groups for `SFNorMuon` and its like: hidden matrices, and with use_muon=False the rest.

    Hidden matrices have two dimensions and are neither embeddings nor output heads: tied to an
    embedding, or an nn.Linear outside the blocks with as many outputs as an embedding has rows.
    Blocks are what an nn.ModuleList holds.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inside = {m for blocks in lists for block in blocks for m in block.modules() if m is not block}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    sizes = {m.num_embeddings for m in embeddings}
    heads = [m for m in model.modules()
             if isinstance(m, nn.Linear) and m.out_features in sizes and m not in inside]
    ids = {id(m.weight) for m in embeddings + heads}
    matrices, rest = [], []
    for p in model.parameters():
        (matrices if p.ndim == 2 and id(p) not in ids else rest).append(p)
    return [{"params": matrices}, {"params": rest, "use_muon": False}]


# ---- the two directions: of matrices (m, n), or this process's rows; of stacks (E, m, n)

def normuon_directions(Ms, vs, like, group, beta2) -> list[Tensor]:
    """0.2 √(mn) / ‖P̂‖_F · P̂ for the momenta Ms of matrices of the shape of the parameter `like`.

    vs: the second moments of the rows, (m, 1) each, updated in place.
    """
    Ps = polar(Ms, like, group["ns_steps"], group["ns_dtype"])
    if group["normalize_rows"]:
        for P, v in zip(Ps, vs):
            v.lerp_(torch.linalg.vector_norm(P, dim=-1, keepdim=True) ** 2 / P.size(-1), 1 - beta2)
            P.div_(v.sqrt() + group["eps"])  # now P̂
    squares = torch.stack([torch.linalg.matrix_norm(P, keepdim=True) ** 2 for P in Ps])
    norms = over_processes(squares, like).sqrt().clamp(min=1e-19)  # zero stays zero
    factors = 0.2 * math.sqrt(like.shape[-2] * like.shape[-1]) / norms
    return [P.mul_(factor) for P, factor in zip(Ps, factors)]


def adamw_directions(gs, vs, t, group):
    """g / (√(v / (1-β2ᵗ)) + ε) for each gradient, after v ← β2 v + (1-β2) g⊙g in place."""
    beta2 = group["betas"][1]
    for g, v in zip(gs, vs):
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        yield g / (v / (1 - beta2**t)).sqrt_().add_(group["eps"])


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The approximate polar factor UVᵀ of G = USVᵀ: singular values above 0.01 ‖G‖_F end in
    [0.68, 1.14]. The quintic iteration and its coefficients are Muon's (Jordan et al. 2024).

    G: (..., m, n), of any scale whose squares fit in float32. Returns G's shape and dtype; zero
    gives zero. Computes in `dtype`, by default bfloat16 on CUDA and float32 elsewhere.
    """
    if G.numel() == 0:
        return G.clone()
    if G.ndim > 2 and not G.is_cuda:  # on a CPU, products of two dimensions are the fast ones
        return torch.stack([newton_schulz(M, steps, dtype) for M in G])
    dtype = dtype or (torch.bfloat16 if G.is_cuda else torch.float32)
    if G.is_cuda:
        P = compile_iteration()(G.reshape(-1, *G.shape[-2:]), steps, dtype).reshape(G.shape)
    else:
        P = iteration(G, steps, dtype)
    return P.to(G.dtype).contiguous()


def iteration(G: Tensor, steps: int, dtype: torch.dtype) -> Tensor:  # (m, n), on CUDA (B, m, n)
    a, b, c = 3.4445, -4.7750, 2.0315
    addmm = torch.addmm if G.ndim == 2 else torch.baddbmm  # fewer passes over memory
    norm = torch.linalg.matrix_norm(G.to(torch.promote_types(G.dtype, torch.float32)), keepdim=True)
    X = (G / norm.clamp(min=1e-19)).to(dtype)
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
                p.diagonal(dim1=-2, dim2=-1).add_(a)
                Q = p if Q is None else p @ Q
                A = p @ A @ p if left else None
            X = Q @ X
    return X.mT if m > n else X


# ---- many processes

def local(t: Tensor) -> Tensor:
    """What this process holds: its own rows of a DTensor, or all of a plain tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def over_processes(sums: Tensor, like: Tensor) -> Tensor:
    """Adds up what each process has summed over its rows of the parameter `like`."""
    if not isinstance(like, DTensor) or like.ndim > 2:  # a stack is cut between matrices
        return sums
    placements = [Partial() if p.is_shard() else p for p in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements, run_check=False).full_tensor()


def polar(Ms: list[Tensor], like: Tensor, steps: int, dtype: torch.dtype | None) -> list[Tensor]:
    """Polar factors of B matrices of the shape (m, n) of `like`: rows of each go in and come out.

    The only place that needs whole matrices, so the only exchange: DTensors sharded by rows are
    redistributed (an all-to-all) so that each process holds its share of the B matrices, and back.
    """
    if not isinstance(like, DTensor) or like.ndim > 2:
        if Ms[0].is_cuda:
            return newton_schulz(torch.stack(Ms), steps, dtype).unbind()
        return [newton_schulz(M, steps, dtype) for M in Ms]
    m, n = like.shape
    rows = [Shard(1) if p.is_shard() else p for p in like.placements]
    split = [p if p.is_shard() else Shard(0) for p in rows]  # first, each replica takes its share
    whole = [Shard(0)] * len(rows)
    wrap = functools.partial(DTensor.from_local, device_mesh=like.device_mesh, run_check=False,
                             shape=torch.Size([len(Ms), m, n]), stride=(m * n, n, 1))
    dtype = dtype or (torch.bfloat16 if Ms[0].is_cuda else torch.float32)
    stack = wrap(torch.stack(Ms).to(dtype), placements=rows)
    stack = stack.redistribute(placements=split).redistribute(placements=whole)
    stack = wrap(newton_schulz(stack.to_local(), steps, dtype), placements=whole)
    stack = stack.redistribute(placements=rows)
    return stack.to_local().to(Ms[0].dtype).unbind()


# ---- speed

def same_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in lists whose Newton-Schulz can be done at once."""
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

def begin_step(optimizer, closure):
    """The closure's loss, or None. RuntimeError in eval mode, ValueError for a bad tensor."""
    if not all(group.get("train_mode", True) for group in optimizer.param_groups):
        raise RuntimeError("step() in eval mode: call .train() before the forward pass")
    with torch.enable_grad():
        loss = None if closure is None else closure()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in (p for p in params if p.grad is not None):
        tensors = {"gradient": p.grad, **(optimizer.state.get(p) or {})}
        for name, t in ((n, t) for n, t in tensors.items() if n != "row_second_moment"):
            like = (t.layout, t.shape, t.dtype, t.device) == (p.layout, p.shape, p.dtype, p.device)
            if not like or t.dtype == torch.float16:
                raise ValueError(f"{name} of the parameter of shape {tuple(p.shape)} must be dense, "
                                 f"like it and not float16: {t.layout}, {t.dtype}, "
                                 f"{tuple(t.shape)}, {t.device}")
    return loss


def states(optimizer, params, name: str) -> list[Tensor]:
    return [local(optimizer.state[p][name]) for p in params]


@torch.no_grad()
def towards_z(optimizer, params, *weights: float) -> None:
    """w ← w + weight (z - w), for each weight in turn, of the parameters w that have a state."""
    params = [p for p in params if optimizer.state.get(p)]
    for w, z in zip(map(local, params), states(optimizer, params, "z")):
        for weight in weights:
            w.lerp_(z, weight)


def check_group(group: dict, *names: str) -> None:
    """Raises ValueError for a group that no step can take. `names`: more that must not be < 0."""
    least = dict.fromkeys(("lr", "weight_decay", "eps", "warmup_steps", *names), 0)
    for name, value in {**least, "ns_steps": 1}.items():
        if not group.get(name, value) >= value:
            raise ValueError(f"{name} must be at least {value}, got {group[name]}")
    for name, value in (("beta2", group["betas"][1]), ("momentum", group.get("momentum", 0))):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    for p in group["params"]:
        what = f"the parameter of shape {tuple(p.shape)}"
        placements = getattr(p, "placements", ())
        if p.is_complex() or p.layout != torch.strided or p.dtype == torch.float16:
            raise ValueError(f"{what} must be real and dense, and not float16, where ε and squares "
                             f"are 0: it is {p.dtype}, {p.layout}")
        if group["use_muon"] and p.ndim not in (2, 3):
            raise ValueError(f"{what} is no matrix or stack of them: make its group use_muon=False")
        if group["use_muon"] and any(q not in (Shard(0), Replicate()) for q in placements):
            raise ValueError(f"{what} must be sharded by rows, Shard(0), got {placements}")
