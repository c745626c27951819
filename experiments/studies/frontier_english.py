"""The frontier on a corpus that its tuning never saw: experiments/corpora.py says how to get it.
NorMuon's rate is tuned here for every length; the anytime configurations and the paper's method
stay as they are.
"""
import runpy
from pathlib import Path

frontier = runpy.run_path(str(Path(__file__).with_name("frontier.py")))
base = dict(frontier["base"], data_dir="data/english")
tokens, horizons = frontier["tokens"], frontier["horizons"]
seeds, tuning_seeds = (0, 1, 2), frontier["tuning_seeds"]
names = "normuon_linear", "anytime", "first", "paper"
optimizers = {name: frontier["optimizers"][name] for name in names}
for name in "first", "paper":
    optimizers[name] = dict(optimizers[name], seeds=(0, 1))

headline = {"anytime": "SF-NorMuon, anytime", "paper": "SF-NorMuon, the paper's",
            "normuon_linear": "NorMuon, linear, tuned"}
