"""The frontier at a model size and a batch that no tuning saw, 0.12M parameters and 1,024 tokens a
step. NorMuon's rate is tuned for every length; the anytime configuration and the paper's method
stay as they are at 0.07M.
"""
import runpy
from pathlib import Path

frontier = runpy.run_path(str(Path(__file__).with_name("frontier.py")))
base = dict(frontier["base"], n_layer=2, n_head=4, n_embd=64, batch_size=8, total_batch_tokens=1024,
            eval_interval=575, log_interval=575)  # 119,104 parameters
tokens = 2300 * 1024  # 1x: 19.8 for each parameter
horizons, seeds, tuning_seeds = (1, 2), (0,), frontier["tuning_seeds"]
optimizers = {name: frontier["optimizers"][name] for name in ("normuon_linear", "anytime", "paper")}
