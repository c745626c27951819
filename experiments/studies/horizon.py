"""Is NorMuon at 16x badly treated? settled.py tunes only its rate there, from what was best at 4x.
Its decay of 0.1 is the largest of its space. Here the decay is halved and doubled too, and the
schedule is WSD, on one tuning seed and the tuning text; what is better by more than 0.005 nats gets
the other seed, by hand. Written after the rates of settled.py were tuned, before any of its runs.
"""
import runpy
from pathlib import Path

settled, go = (runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
               for name in ("settled", "elsewhere_go"))
base, tokens, horizons, seeds = settled["base"], settled["tokens"], (16,), ()
tuning_seeds, tuning = settled["tuning_seeds"][:1], settled["tuning"]
normuon = dict(go["optimizers"]["normuon"], lr=[0.00985, 0.0197])
optimizers = {
    "decay_0.05": dict(normuon, weight_decay=0.05, adam_weight_decay=0.05),
    "decay_0.2": dict(normuon, weight_decay=0.2, adam_weight_decay=0.2),
    "wsd": dict(normuon, schedule="wsd"),
}
