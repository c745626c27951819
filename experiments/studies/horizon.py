"""Is a rival badly treated? NorMuon's decay of 0.1 is the largest of settled.py's space, AdamW's of
0.02 the smallest of its own, and at 16x both tune only a rate there.

First other decays and schedules were tried at 16x on one tuning seed. NorMuon gained 0.02 from a
quarter of the decay and four times the rate; decay 0.2 and WSD were worse by 0.018 and 0.013 and
are left out. So NorMuon runs again for every length, with the product of rate and decay that the
recommended configuration has and a rate of its own for each (`normuon`; 16x was declared before its
runs, 1x and 4x after the first of them). First trials whose knobs a run of `normuon` needed have
its name now, and one such run at 16x, with decay 0.1, is a copy of settled.py's.

AdamW gained 0.012 from twice the rate and a linear schedule, so it runs again for every length too
(`adamw`, declared after the trials at 16x and before its other runs). Left out are a decay of 0.05
with WSD, worse than settled.py's by 0.006, and a linear schedule with the product that helped
NorMuon, worse than this by 0.004.
"""
import runpy
from pathlib import Path

settled, go = (runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
               for name in ("settled", "elsewhere_go"))
base = dict(settled["base"], eval_interval=692)
tokens, horizons, seeds = settled["tokens"], settled["horizons"], range(5)
tuning_seeds, tuning = settled["tuning_seeds"][:1], settled["tuning"]
normuon, adamw = go["optimizers"]["normuon"], go["optimizers"]["adamw"]


def decay(lr):  # times the rate is 0.001; rounded, as in the first trials
    return float(f"{0.000985 / lr:.3g}")


optimizers = {
    "normuon": dict(normuon, **settled["both"](decay), lr=[0.00985, 0.0197, 0.0394]),
    "adamw": dict(adamw, schedule="linear", lr=[0.0096, 0.0192, 0.0384]),
}
headline = {"hindsight.recommended": "SF-NorMuon, recommended",
            "settled.anytime": "SF-NorMuon, random search",
            "normuon": "NorMuon, hand-tuned", "settled.normuon": "NorMuon, random search",
            "settled.muon": "Muon, random search",
            "settled.amuse": "AMUSE, random search (T0 = 250)",
            "settled.schedulefree_plus": "ScheduleFree+, random search"}
