"""A LLaMA-2-style transformer: Hugging Face's `ArceeForCausalLM` with hidden_act="relu2"."""
import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    block_size: int = 1024  # the longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class KVCache:
    """Keys and values of the tokens so far, (B, n_head, T, head_dim) for each attention layer.
    A class, since FSDP2 would copy a list or a dict."""

    def __init__(self):
        self.length, self.layers = 0, {}

    def append(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        return k, v


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        # FSDP2 gathers the gain in bfloat16; torch's fused kernel needs it in the dtype of x.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.q, self.k, self.v, self.o = (
            nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        heads = (*x.shape[:2], self.n_head, -1)  # x (B, T, n_embd), cos and sin (T, head_dim)
        q, k, v = (linear(x).view(heads).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # q, k, v (B, n_head, T, head_dim)
        if cache is not None:
            k, v = cache.append(self, k, v)
        # One new token after cached ones sees all of them; else each sees those before it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) == k.size(2))
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(h * h)  # h.square() would be float32 under autocast on CUDA


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))


def rotary(T: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_dim) for the pairs (i, i + head_dim/2): RoFormer, arXiv:2104.09864."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(T, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, n_head, T, head_dim)
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).type_as(x)


class GPT(nn.Module):
    """Decoder-only transformer: RMSNorm before each sublayer, rotary positions,
    MLP down(relu(up(x))²), no biases, input and output embeddings tied. Weights are float32; wrap
    calls in `torch.autocast` for bfloat16.
    Raises ValueError if the heads do not divide n_embd into parts of even width.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of twice n_head "
                             f"{config.n_head}: rotary embeddings turn pairs of a head's features")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=1e-5)
        self.softmax_ = softmax_  # train.py may compile it, as it does the blocks
        for name, p in self.named_parameters():
            self.initialize(name, p)

    def initialize(self, name: str, weight: Tensor) -> None:
        """Draws the first value of the parameter `name` into `weight`, as GPT-2 does: the matrices
        of the 2 n_layer sublayers that add to the residual stream start smaller."""
        if weight.ndim < 2:
            nn.init.ones_(weight)
        else:
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            sublayers = 2 * self.config.n_layer if residual else 1
            nn.init.normal_(weight, std=0.02 / math.sqrt(sublayers))

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """idx (B, T) int64, T <= block_size. Returns logits (B, T, vocab_size), or with targets
        (B, T) the mean cross-entropy in nats over those that are not -1, a float32 scalar.
        Once the cache holds tokens, idx is the next one, (B, 1). ValueError beyond block_size.
        """
        c = self.config
        first = 0 if cache is None else cache.length
        T = first + idx.size(1)
        if T > c.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {c.block_size}")
        cos, sin = (t[first:] for t in rotary(T, c.n_embd // c.n_head, idx.device))
        x = self.wte(idx)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length = T
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.wte.weight)
        x, W, targets = x.flatten(0, 1), self.wte.weight, targets.flatten()
        return linear_cross_entropy(x, W, targets, self.softmax_)  # the line for another loss

    def flops_per_token(self) -> int:
        """FLOPs of a forward and a backward pass: 6 for each weight of a matrix product, and
        attention's two products, counted in full as is customary, although half is masked."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def stream(self, idx: Tensor, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, vocab_size: int | None = None,
               generator: torch.Generator | None = None):
        """Continues idx (B, T) int64: yields one token after another, (B, 1) int64, without end.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens, top_p the
        fewest that together have at least this probability. vocab_size leaves out the padding of
        the vocabulary. The model sees the last block_size tokens.
        """
        cache = KVCache()
        while True:
            if idx.size(1) > self.config.block_size:  # from here on, each step moves every position
                cache = None
            first = -self.config.block_size if cache is None else cache.length
            # cuDNN's attention is left out: it builds a plan for every new number of keys.
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                              SDPBackend.MATH]):
                logits = self(idx[:, first:], cache=cache)[:, -1, :vocab_size].float()
            token = draw(logits, temperature, top_k, top_p, generator)
            yield token
            idx = torch.cat((idx, token), dim=1)

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """Continues idx (B, T) int64, returns (B, T + max_new_tokens). sampling: as in `stream`."""
        return torch.cat((idx, *islice(self.stream(idx, **sampling), max_new_tokens)), dim=1)


def draw(logits, temperature, top_k, top_p, generator) -> Tensor:
    """Draws one token for each row of logits (B, vocab_size): (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # all <= 0
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = F.softmax(logits, dim=-1)
    if top_p is not None:
        largest, order = p.sort(dim=-1, descending=True)
        excess = largest.cumsum(-1) - largest >= max(top_p, 1e-30)  # the likelier have it already
        p = p.masked_fill(excess.scatter(-1, order, excess), 0)
    return torch.multinomial(p, 1, generator=generator)


# ---- the loss

CHUNK = 4096  # tokens whose logits exist at the same time
IN_CACHE = 2**20  # logits of a slice that stays in a CPU's cache through all operations


def linear_cross_entropy(x: Tensor, W: Tensor, targets: Tensor, softmax_) -> Tensor:
    """Equals F.cross_entropy(F.linear(x, W), targets) over targets that are not -1; 0 without any.

    x (N, n_embd), W (vocab_size, n_embd), targets (N,) int64; a float32 scalar. The logits would be
    the largest tensor of a run: they exist in chunks, and their gradients overwrite them. (On a CPU
    thread torch 2.13's F.linear_cross_entropy took 7 times as long: 512 tokens, 16384 words.)
    """
    counted = targets >= 0
    shares = (counted / counted.sum().clamp(min=1))[:, None]  # of each loss in the mean, (N, 1)
    targets = targets.clamp(min=0)[:, None]
    rows = max(1, IN_CACHE // len(W)) if W.is_cpu else CHUNK
    losses, dx, dW = [], torch.empty_like(x), torch.zeros_like(W)
    training = torch.is_grad_enabled()
    with torch.no_grad():
        for xs, dxs, ts, ss in zip(*(t.split(CHUNK) for t in (x, dx, targets, shares))):
            logits = F.linear(xs, W)
            for z, target, share in zip(logits.split(rows), ts.split(rows), ss.split(rows)):
                # Before softmax_ overwrites z. Inside it, torch 2.11's compiler reads too late.
                at_target = z.gather(1, target)
                losses.append(softmax_(z, share) - at_target)
                if training:  # softmax - 1; inside softmax_ the compiler would copy the logits
                    z.scatter_(1, target, ((-losses[-1]).expm1() * share).to(z.dtype))
            if training:  # the logits now hold their gradients
                dxs.copy_(logits @ W)
                dW += logits.mT @ xs
            del logits, z  # before the next chunk's logits exist
    return WithGradients.apply((torch.cat(losses) * shares).sum(), x, W, dx, dW)


def softmax_(logits: Tensor, shares: Tensor) -> Tensor:
    """Overwrites logits (n, vocab_size) with shares (n, 1) · softmax(logits), the gradients of the
    losses but at their targets. Returns log Σ exp(logits), float32 (n, 1)."""
    z = logits.float()
    log_sum = z.logsumexp(1, keepdim=True)
    logits.copy_((z - log_sum).exp_().mul_(shares))
    return log_sum


class WithGradients(torch.autograd.Function):
    """A loss whose gradients with respect to x and W are known already: dx and dW."""

    @staticmethod
    def forward(ctx, loss, x, W, dx, dW):
        ctx.save_for_backward(dx, dW)
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss):
        dx, dW = ctx.saved_tensors
        return None, dx.mul_(dloss), dW.mul_(dloss), None, None
