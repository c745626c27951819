"""Is a rival badly treated at 16x? settled.py tunes only the rate there, from what was best at 4x,
and NorMuon's decay of 0.1 is the largest of its space, AdamW's of 0.02 the smallest of its own.

Here other decays and schedules are tried on one tuning seed and the tuning text. NorMuon gained
0.02 from a quarter of the decay and twice the rate, and runs again on five reported seeds
(`normuon`, written before its runs). Decay 0.2 (two rates) and WSD were worse by 0.02 and are left
out. The recommended configuration is tried in the same way, with half of its decay.
"""
import runpy
from pathlib import Path

settled, hindsight, go = (runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
                          for name in ("settled", "hindsight", "elsewhere_go"))
base = dict(settled["base"], eval_interval=692)
tokens, horizons, seeds = settled["tokens"], (16,), ()
tuning_seeds, tuning = settled["tuning_seeds"][:1], settled["tuning"]

both, recommended = go["both"], hindsight["recommended"]
normuon, adamw = go["optimizers"]["normuon"], go["optimizers"]["adamw"]
optimizers = {
    "decay_0.05": dict(normuon, **both(0.05), lr=[0.0197, 0.0394], horizons=(4,)),
    "decay_0.025": dict(normuon, **both(0.025), lr=[0.0197, 0.0394]),
    "decay_0.0125": dict(normuon, **both(0.0125), lr=[0.0394, 0.0788]),
    "normuon": dict(normuon, **both(0.025), lr=0.0394, seeds=range(5)),
    "recommended_decay_0.015": dict(recommended, **both(0.015), lr=[0.032, 0.064]),
    "adamw_decay_0.05": dict(adamw, **both(0.05), lr=[0.0096]),
    "adamw_linear_0.1": dict(adamw, **both(0.1), schedule="linear", lr=[0.012, 0.024]),
    "adamw_linear_0.02": dict(adamw, **both(0.02), schedule="linear", lr=[0.012]),
}
