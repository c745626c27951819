"""The main claim of the small study at 0.47M parameters, one seed, 1x and 2x: some four core-hours,
and not run yet.
"""
import runpy
from pathlib import Path

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
base = dict(small["base"], n_layer=4, n_head=6, n_embd=96,  # 473,952 parameters
            batch_size=32, total_batch_tokens=4096, eval_interval=575, log_interval=575)
tokens = 2300 * 4096  # 1x
horizons, seeds, tuning_seeds = (1, 2), (0,), small["tuning_seeds"]
optimizers = {"adamw_cosine": dict(small["adamw"], schedule="cosine", lr=[0.008, 0.016, 0.032]),
              "sf_normuon": dict(small["sf_normuon"], lr=[0.032, 0.064, 0.128])}
