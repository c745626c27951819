"""The models of others that bench.py trains beside model.py's."""
import torch
from torch import nn
from torch.nn import functional as F

from model import GPTConfig


class GPT2(nn.Module):
    """In the manner of nanoGPT: learned positions, LayerNorm, GELU, one matrix for q, k and v."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.c, n = c, c.n_embd
        self.wte, self.wpe = nn.Embedding(c.vocab_size, n), nn.Embedding(c.block_size, n)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(n), qkv=nn.Linear(n, 3 * n), o=nn.Linear(n, n),
            norm2=nn.LayerNorm(n), up=nn.Linear(n, 4 * n), down=nn.Linear(4 * n, n),
        )) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(n)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for b in self.blocks:
            q, k, v = (t.unflatten(-1, (self.c.n_head, -1)).transpose(1, 2)
                       for t in b.qkv(b.norm1(x)).chunk(3, dim=-1))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b.o(attended.transpose(1, 2).flatten(2))
            x = x + b.down(F.gelu(b.up(b.norm2(x))))
        logits = F.linear(self.norm(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def hugging_face(c: GPTConfig) -> nn.Module:
    from transformers import ArceeConfig, ArceeForCausalLM
    return ArceeForCausalLM(ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
        max_position_embeddings=c.block_size, hidden_act="relu2", tie_word_embeddings=True))
