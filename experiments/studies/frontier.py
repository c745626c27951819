"""Configurations without a horizon against NorMuon with a linear schedule that is tuned for every
length, 1x to 8x, at the size of the small study: `anytime`, the `first` one, single steps back from
that, and the paper's method. experiments/README.md is the report.
"""
import runpy
from pathlib import Path

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
base = dict(small["base"], compile=True)  # faster on a CPU too
tokens, seeds, tuning_seeds = small["tokens"], small["seeds"], small["tuning_seeds"]
horizons = 1, 2, 4, 8

paper = dict(optimizer="sf_normuon", lr=0.128)  # the rate that the small study chose
first = dict(optimizer="sf_normuon", lr=0.032, decay_at="y",  # tuned at this size
             weight_decay=0.03, adam_weight_decay=0.03, betas=(0.4, 0.95), adam_betas=(0.4, 0.99),
             momentum=0.9, averaging_power=2.0, beta_power=0.5)
anytime = dict(first, beta_power=0.3)  # after a look at 0.2M parameters
step = dict(horizons=(1, 2, 4), seeds=(0,))  # carries no claim

optimizers = {
    "normuon_linear": dict(small["normuon"], schedule="linear", lr=[0.016, 0.032, 0.064]),
    "anytime": anytime,
    "first": first,
    "paper": paper,
    "paper_decay_at_y": dict(paper, decay_at="y", **step),
    "first_decay_at_z": dict(first, decay_at="z", **step),
    "first_average_uniform": dict(first, averaging_power=0.0, **step),
    "first_beta_constant": dict(first, beta_power=0.0, **step),
    "first_beta_paper": dict(first, betas=(0.9, 0.95), adam_betas=(0.95, 0.99), **step),
    "first_momentum_0.8": dict(first, momentum=0.8, **step),
    "first_weight_decay_0.05": dict(first, weight_decay=0.05, adam_weight_decay=0.05, **step),
}

headline = {"anytime": "SF-NorMuon, anytime", "paper": "SF-NorMuon, the paper's",
            "small.adamw_cosine": "AdamW, cosine, tuned",
            "normuon_linear": "NorMuon, linear, tuned"}
