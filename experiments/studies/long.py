"""The long run: 50x, 1,000 tokens for each parameter, about 20 minutes a run. Two claims of the
literature stand or fall here: decay at z is what stays stable (Fig. 2 of the paper, which sees y
ahead up to some 12x at 125M), and schedule-free averaging wins at 1,000 tokens for each parameter
(ScheduleFree+).

The rates are those of the small study and of the frontier, which had contexts of 128; put those of
settled.py in their place when it has run. The logs hold RMS(z) ("rho"), the loss at x ("val_loss")
and the training loss at y ("loss"). This file was written before any of its runs.
"""
import runpy
from pathlib import Path

settled = runpy.run_path(str(Path(__file__).with_name("settled.py")))
base = dict(settled["base"], eval_interval=692, log_interval=173, warmup_steps=100)
tokens, horizons, tuning_seeds = settled["tokens"], (50,), ()
seeds = 0,  # describes; rows with a claim have three
three = dict(seeds=(0, 1, 2))

margin = 0.015  # nats
claims = [("paper_decay_at_z", "paper_decay_at_y", 50),
          ("anytime_decay_at_z", "anytime_decay_at_y", 50),
          ("schedulefree_plus", "adamw_linear", 50),
          ("anytime_decay_at_y", "normuon_linear", 50)]


def both(decay):
    return dict(weight_decay=decay, adam_weight_decay=decay)


paper = dict(optimizer="sf_normuon")
anytime = dict(optimizer="sf_normuon", lr=0.016, **both(0.06), betas=(0.4, 0.95),
               adam_betas=(0.4, 0.99), momentum=0.9, averaging_power=2.0, beta_power=0.3)
adamw = dict(optimizer="adamw", lr=0.008, betas=(0.9, 0.95), **both(0.1))
optimizers = {
    **{f"paper_decay_at_{at}": dict(paper, lr=0.128, decay_at=at, **three) for at in ("z", "y")},
    "paper_decay_at_none": dict(paper, lr=0.128, decay_at="none"),
    **{f"paper_low_decay_at_{at}": dict(paper, lr=0.032, decay_at=at) for at in ("z", "y", "none")},
    **{f"anytime_decay_at_{at}": dict(anytime, decay_at=at, **three) for at in ("z", "y")},
    "sf_adamw": dict(optimizer="sf_adamw", lr=0.032, betas=(0.95, 0.99)),
    "amuse": dict(optimizer="amuse", lr=0.04, betas=(0.6, 0.999), adam_betas=(0.6, 0.999),
                  momentum=0.95, grad_clip=0.5, warmup_steps=12_000),  # of 34,600; authors: 6 of 16
    "schedulefree_plus": dict(optimizer="schedulefree_plus", lr=0.25, **both(20), grad_clip=0,
                              averaging_start=200, polyak_beta=0.9, sf_beta=0.5, **three),
    "normuon_linear": dict(optimizer="normuon", schedule="linear", lr=0.016, momentum=0.95,
                           adam_betas=(0.9, 0.95), **three),
    "adamw_linear": dict(adamw, schedule="linear", **three),
    "adamw_wsd": dict(adamw, schedule="wsd"),
}
