"""A LLaMA-2-style transformer: Hugging Face's `ArceeForCausalLM` with hidden_act="relu2", in one short file."""
import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOSS_CHUNK = 4096  # tokens whose logits exist at the same time while the loss is computed
CACHED_LOGITS = 2**20  # how many of them a CPU takes through all operations at a time, so that they stay in its cache


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    block_size: int = 1024  # the longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class KVCache:
    """Keys and values of the tokens so far, (B, n_head, T, head_dim) for each block. A class, since FSDP2 copies lists."""

    def __init__(self):
        self.length, self.blocks = 0, {}

    def append(self, block: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if block in self.blocks:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.blocks[block], (k, v)))
        self.blocks[block] = k, v
        return k, v


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        # Sharded, the gain comes in bfloat16, with which torch has no fused kernel for a float32 x.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.q, self.k, self.v, self.o = (nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        heads = (*x.shape[:2], self.n_head, -1)  # x (B, T, n_embd), cos and sin (T, head_dim)
        q, k, v = (linear(x).view(heads).transpose(1, 2) for linear in (self.q, self.k, self.v))  # (B, n_head, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) == k.size(2))
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(h * h)  # autocast on CUDA would make a float32 tensor of h.square()


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))


def rotary(T: int, head_dim: int, device: torch.device, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle by which position t turns each pair of features (i, i + head_dim/2): (T, head_dim)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(T, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, n_head, T, head_dim)
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)


class GPT(nn.Module):
    """Decoder-only transformer: RMSNorm before each sublayer, rotary positions, MLP down(relu(up(x))²), no biases,
    input and output embeddings tied. Weights are float32; wrap calls in `torch.autocast` for bfloat16.

    Raises ValueError if the heads do not divide n_embd into parts of even width.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of twice n_head {config.n_head}: "
                             "the heads share it, and rotary embeddings turn pairs of features")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=1e-5)
        self.cross_entropy = cross_entropy  # train.py may compile it, as it does the blocks
        for name, p in self.named_parameters():
            self.initialize(name, p)

    def initialize(self, name: str, weight: Tensor) -> None:
        """Draws the first value of the parameter `name` into `weight`, which need not be that parameter."""
        if weight.ndim == 2:  # as GPT-2: what adds to the residual stream starts smaller, the more layers there are
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        else:
            nn.init.ones_(weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """idx: (B, T) int64, T <= block_size. Returns logits (B, T, vocab_size), or with targets, (B, T) int64, the mean
        cross-entropy in nats over the targets that are not -1, a float32 scalar. A cache that is not empty holds the
        tokens before idx, which is then a single one, (B, 1)."""
        first = 0 if cache is None else cache.length
        T = first + idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}")
        cos, sin = (t[first:] for t in rotary(T, self.config.n_embd // self.config.n_head, idx.device))
        x = self.wte(idx)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = T
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.wte.weight)
        return MeanCrossEntropy.apply(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.cross_entropy,
                                      torch.is_grad_enabled())  # inside it always is off

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the blocks, for which Muon and its relatives are made."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    def flops_per_token(self) -> int:
        """Of a forward and a backward pass: 6 for each weight of a matrix product, and attention's two products of
        (T, head_dim) matrices, counted in full as is customary although half of them is masked."""
        c = self.config
        weights = sum(p.numel() for p in self.hidden_matrices()) + self.wte.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def stream(self, idx: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
               vocab_size: int | None = None, generator: torch.Generator | None = None):
        """Yields one token after another, (B, 1) int64, that continue idx (B, T) int64, without end.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens, top_p the fewest that together have
        at least this probability. vocab_size leaves out the padding of the vocabulary; generator makes the samples
        reproducible. Each token is drawn from what the model says after the block_size tokens before it.
        """
        cache = KVCache()
        while True:
            if idx.size(1) > self.config.block_size:  # every token has a new position, so nothing can be kept
                cache = None
            new = idx[:, cache.length:] if cache is not None else idx[:, -self.config.block_size:]
            token = draw(self(new, cache=cache)[:, -1, :vocab_size].float(), temperature, top_k, top_p, generator)
            yield token
            idx = torch.cat((idx, token), dim=1)

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """Continues idx (B, T) int64 and returns (B, T + max_new_tokens). sampling: as for `stream`."""
        return torch.cat((idx, *islice(self.stream(idx, **sampling), max_new_tokens)), dim=1)


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """One token for each row of logits (B, vocab_size): (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # largest 0: nothing overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = F.softmax(logits, dim=-1)
    if top_p is not None:
        largest, order = p.sort(dim=-1, descending=True)
        enough = largest.cumsum(-1) - largest >= top_p  # the tokens before this one are
        p = p.masked_fill(enough.scatter(-1, order, enough), 0)
    return torch.multinomial(p, 1, generator=generator)


class MeanCrossEntropy(torch.autograd.Function):
    """x (N, n_embd), weight (vocab_size, n_embd), targets (N,), -1 where there is none: the mean loss, a float32 scalar.

    The logits of 50304 words would be the largest tensor of the run, so they exist for LOSS_CHUNK tokens at a time; and
    so that none is computed twice, the forward pass makes the gradients too, unless they are not wanted.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cross_entropy, grad):
        losses, dx, dW = [], torch.empty_like(x) if grad else None, None
        valid, targets = targets >= 0, targets.clamp(min=0)[:, None]
        shares = (valid / valid.sum().clamp(min=1))[:, None]  # of each loss in the mean
        at_once = max(1, CACHED_LOGITS // weight.size(0)) if x.device.type == "cpu" else LOSS_CHUNK
        for first in range(0, x.size(0), LOSS_CHUNK):
            rows = slice(first, first + LOSS_CHUNK)
            logits = F.linear(x[rows], weight)
            for part, target, share in zip(*(t.split(at_once) for t in (logits, targets[rows], shares[rows]))):
                loss, dtarget = cross_entropy(part, target, share, grad)
                losses.append(loss)
                if grad:  # here, since the compiler would make a copy of the logits for it
                    part.scatter_(-1, target, dtarget)
            if grad:  # the logits are now their gradient
                dx[rows] = logits @ weight
                product = logits.mT @ x[rows]
                dW = product.to(weight.dtype) if dW is None else dW.add_(product)
        ctx.save_for_backward(dx, dW)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, dloss):
        dx, dW = ctx.saved_tensors
        return dx.mul_(dloss), dW.mul_(dloss), None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, shares: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the losses times their shares (N, 1), a float32 scalar. With grad, its gradient overwrites the logits
    (N, vocab_size), but for those of the targets (N, 1), whose gradient is returned."""
    logp = logits.float().log_softmax(-1)
    logp_target = logp.gather(-1, targets)
    loss = -(logp_target * shares).sum()
    if not grad:
        return loss, None
    logits.copy_(logp.exp_().mul_(shares))
    return loss, (logp_target.expm1() * shares).to(logits.dtype)
