"""The paper's ablations at the size of the small study, to 16x: decay at z, y and none (Fig. 2),
momentum and row normalization (Fig. 3). Rates are those that the small study chose, one seed.
"""
import runpy
from pathlib import Path

small = runpy.run_path(str(Path(__file__).with_name("small.py")))
base, tokens, tuning_seeds = small["base"], small["tokens"], ()
horizons, seeds = (16,), (0,)

sf_normuon = dict(optimizer="sf_normuon", lr=0.128)
sf_adamw = dict(small["optimizers"]["sf_adamw"], lr=0.032)
optimizers = {
    "sf_normuon_momentum_0": dict(sf_normuon, momentum=0.0, horizons=(4,)),
    "sf_normuon_no_rows": dict(sf_normuon, normalize_rows=False, horizons=(4,)),
    **{f"{knobs['optimizer']}_decay_at_{place}": dict(knobs, decay_at=place)
       for knobs in (sf_normuon, sf_adamw) for place in ("z", "y", "none")},
}

headline = {
    "sf_normuon_decay_at_z": "SF-NorMuon, decay at z (the method)",
    "sf_normuon_decay_at_y": "SF-NorMuon, decay at y",
    "sf_normuon_decay_at_none": "SF-NorMuon, no decay",
    "sf_normuon_momentum_0": "SF-NorMuon, no momentum",
    "sf_normuon_no_rows": "SF-NorMuon, rows not normalized",
    "sf_adamw_decay_at_z": "SF-AdamW, decay at z",
    "sf_adamw_decay_at_y": "SF-AdamW, decay at y"}
