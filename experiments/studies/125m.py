"""The comparison at 125M on FineWeb, 1x to 8x. With its tuning it takes 48 times 2.5B tokens for
each optimizer without a schedule, and 90 times for each with one. 8x needs 20B tokens of data:
prepare_fineweb.py --shards 205.

    python experiments/sweep.py experiments/studies/125m.py --nproc_per_node=8

This has not been run: the grids and everything else that is not the paper's are this repository's
choices. The schedules fall linearly to zero: at 0.07M linear or WSD won every search (settled.py).
"""
import runpy
from pathlib import Path

base = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, eval_interval=393)
tokens = 4716 * 524288  # 1x: 20 for each of the 124M parameters
horizons = 1, 2, 4, 8
seeds = 0, 1, 2
tuning_seeds = 100,
tuning = dict(eval_offset=10_485_760)  # validation text that is not reported

hindsight = runpy.run_path(str(Path(__file__).with_name("hindsight.py")))


def recommended(steps):  # of 1x; its rate was the same at widths 64 to 256 (width.py)
    decay = lambda lr: 1 / (lr * steps)
    return dict(hindsight["recommended"], step_norm="spectral", lr=[0.01, 0.02, 0.04],
                weight_decay=decay, adam_weight_decay=decay, warmup_steps=steps // 7)


optimizers = {
    "adamw": dict(optimizer="adamw", schedule="linear", betas=(0.9, 0.95), weight_decay=0.1,
                  adam_weight_decay=0.1, lr=[0.00075, 0.0015, 0.003]),
    "sf_normuon": dict(optimizer="sf_normuon", lr=[0.004, 0.008, 0.016]),
    "recommended": recommended(4716),
    "sf_adamw": dict(optimizer="sf_adamw", betas=(0.95, 0.99), lr=[0.0015, 0.003, 0.006]),
    "normuon": dict(optimizer="normuon", schedule="linear", momentum=0.95, adam_betas=(0.9, 0.95),
                    lr=[0.002, 0.004, 0.008]),
}
