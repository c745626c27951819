"""What a step takes on many GPUs, by count: 125M, 772M, 7B on 1, 8, 64. Nothing is run.

    python experiments/scaling.py

An H100: 989 TFLOP/s of bfloat16 products, of which half is reached; 3.35 TB/s of memory, of which
0.8; between GPUs 450 GB/s each way inside a node of 8, of which 0.7, and 50 GB/s beyond it, of
which 0.7.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import table
from model import GPT, GPTConfig
from sf_normuon import param_groups

SIZES = {"125m": (12, 12, 768), "772m": (36, 20, 1280), "7b": (32, 32, 4096)}


def main() -> None:
    flops, memory, inside, between = 0.5 * 989e12, 0.8 * 3.35e12, 0.7 * 450e9, 0.7 * 50e9
    rows = []
    for size, (layers, heads, width) in SIZES.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(50304, 1024, layers, heads, width))
        n = sum(p.numel() for p in model.parameters())
        hidden = sum(p.numel() for p in param_groups(model)[0]["params"])
        tokens = 524288 if size == "125m" else 1048576
        # In units of width³: a square matrix takes 5 x 3 products; one of 4:1, restarted once, 4
        # with its long side and 14.
        newton_schulz = layers * (4 * 5 * 3 + 2 * (4 * 4 + 14)) * 2 * width**3
        for gpus in (1, 8, 64):
            wire = inside if gpus <= 8 else between
            passes = tokens * model.flops_per_token() / flops / gpus
            accumulation = max(1, tokens // (gpus * 16 * 1024))
            # gathered twice in bfloat16, reduced in float32
            moved = accumulation * (2 + 2 + 4) * n * (gpus - 1) / gpus / wire
            # to whole matrices and back, in bfloat16
            exchange = 2 * 2 * hidden / gpus * (gpus - 1) / gpus / wire
            # and 20 passes over float32
            optimizer = newton_schulz / flops / gpus + 4 * 20 * n / gpus / memory + exchange
            total = max(passes, moved) + optimizer
            rows.append([size, str(gpus), 1e3 * passes, 1e3 * moved, 1e3 * optimizer,
                         100 * optimizer / total, f"{tokens / total:,.0f}"])
    table("Expected of a step on H100s, by count",
          ["", "GPUs", "passes, ms", "exchange of weights and gradients beside them, ms",
           "optimizer, ms", "optimizer, %", "tokens/s"], rows)


if __name__ == "__main__":
    main()
