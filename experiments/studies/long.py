"""The long run: 50x, 1,000 tokens for each parameter, some 20 minutes a run, one seed. Two claims
of the literature stand or fall here: decay at z is what stays stable (Fig. 2 of the paper, which
sees y ahead up to some 12x at 125M), and schedule-free averaging wins at 1,000 tokens for each
parameter (ScheduleFree+).

AdamW's and the paper's configurations are those of settled.py for 16x, NorMuon's that of
horizon.py, AMUSE's `amuse_late` of hindsight.py, its T0 about the share of the run that it has for
its authors. SF-AdamW's and ScheduleFree+'s are of earlier runs with contexts of 128. The paper's
also runs at a quarter of its rate. The logs hold RMS(z) ("rho"), the loss at x ("val_loss") and the
training loss at y ("loss"). Written before any of its runs; it describes and carries no claim.
Methods without a schedule are read at 4x and 16x too.
"""
import runpy
from pathlib import Path

settled, hindsight, go = (runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
                          for name in ("settled", "hindsight", "elsewhere_go"))
base = dict(settled["base"], eval_interval=692)
tokens, horizons, seeds, tuning_seeds = settled["tokens"], (4, 16, 50), (0,), ()

paper = dict(optimizer="sf_normuon", warmup_steps=100)
recommended, adamw = hindsight["recommended"], go["optimizers"]["adamw"]
optimizers = {
    **{f"paper_decay_at_{at}": dict(paper, lr=0.113, decay_at=at) for at in ("z", "y", "none")},
    **{f"paper_slow_decay_at_{at}": dict(paper, lr=0.028, decay_at=at) for at in ("z", "y")},
    **{f"recommended_decay_at_{at}": dict(recommended, decay_at=at) for at in ("z", "y")},
    "sf_adamw": dict(optimizer="sf_adamw", lr=0.032, betas=(0.95, 0.99), warmup_steps=100),
    "amuse": dict(hindsight["amuse"], warmup_steps=12_000, seeds=seeds),  # of 34,600
    "schedulefree_plus": dict(optimizer="schedulefree_plus", lr=0.25, **settled["both"](20),
                              grad_clip=0, warmup_steps=100, averaging_start=200, polyak_beta=0.9,
                              sf_beta=0.5),
    "normuon_linear": dict(go["optimizers"]["normuon_by_hand"], horizons=(50,)),
    "adamw_linear": dict(adamw, schedule="linear", horizons=(50,)),
    "adamw_wsd": dict(adamw, horizons=(50,)),
}
headline = {
    "recommended_decay_at_y": "SF-NorMuon, recommended",
    "normuon_linear": "NorMuon, linear",
    "adamw_linear": "AdamW, linear",
    "adamw_wsd": "AdamW, WSD",
    "amuse": "AMUSE",
    "sf_adamw": "SF-AdamW",
    "schedulefree_plus": "ScheduleFree+",
    "paper_decay_at_z": "SF-NorMuon, the paper's",
    "paper_slow_decay_at_z": "the paper's, a quarter of its rate",
}
