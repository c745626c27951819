"""The frontier at a model size and a batch that the first configuration's tuning never saw: three
times the parameters, twice the tokens a step. NorMuon's rate is tuned here for every length, that
of `first` once for all of them; the paper's method stays. beta_power and decay of `anytime` were
chosen here, on the tuning seed.
"""
import runpy
from pathlib import Path

frontier = runpy.run_path(str(Path(__file__).with_name("frontier.py")))
base = dict(frontier["base"], n_layer=4, n_head=4, n_embd=64, batch_size=32,  # 217,664 parameters
            total_batch_tokens=4096, eval_interval=266, log_interval=266)
tokens = 1064 * 4096  # 1x: 20 for each parameter
horizons, seeds, tuning_seeds = (1, 2, 4), (0, 1), frontier["tuning_seeds"]
names = "normuon_linear", "anytime", "first", "paper"
optimizers = {name: frontier["optimizers"][name] for name in names}
optimizers["first"] = dict(optimizers["first"], lr=[0.008, 0.016, 0.032], seeds=(0,))
optimizers["paper"] = dict(optimizers["paper"], seeds=(0,))
optimizers["anytime"] = dict(optimizers["anytime"], lr=0.016,  # lr * decay as before
                             weight_decay=0.06, adam_weight_decay=0.06)
