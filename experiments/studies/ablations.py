"""The paper's ablations in the setting of settled.py, to 4x: decay at z, y and none (Fig. 2),
momentum and row normalization (Fig. 3). Each has a rate of its own, chosen at 4x on one tuning
seed. Written before its runs, but for the method itself, which was settled.py's `paper` at first,
whose rate is chosen for 1x too. It describes and carries no claim. long.py has decay to 50x.
"""
import runpy
from pathlib import Path

settled = runpy.run_path(str(Path(__file__).with_name("settled.py")))
base, tokens = dict(settled["base"], eval_interval=692), settled["tokens"]
horizons, seeds = (4,), range(3)
tuning_seeds, tuning = settled["tuning_seeds"][:1], settled["tuning"]
paper = dict(optimizer="sf_normuon", warmup_steps=100, lr=[0.0565, 0.113])
optimizers = {
    "decay_at_z": paper,  # the method
    "decay_at_y": dict(paper, decay_at="y"),
    "decay_at_none": dict(paper, decay_at="none"),
    "momentum_0": dict(paper, momentum=0.0),
    "rows_not_normalized": dict(paper, normalize_rows=False),
}
headline = {
    "decay_at_z": "SF-NorMuon, the paper's",
    "decay_at_y": "decay at y",
    "decay_at_none": "no decay",
    "momentum_0": "no momentum",
    "rows_not_normalized": "rows not normalized",
}
