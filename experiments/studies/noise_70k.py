"""How far seeds, and the same seed twice, are apart at 0.07M parameters, with contexts of 128 and
of 32 tokens: the anytime configuration to 4x. The twin is not compiled, so that it is the same run
but for rounding.
"""
import runpy
from pathlib import Path

frontier = runpy.run_path(str(Path(__file__).with_name("frontier.py")))
base, tokens = frontier["base"], frontier["tokens"]
horizons, seeds, tuning_seeds = (4,), range(8), ()
short = dict(block_size=32, batch_size=64)
anytime = frontier["anytime"]
optimizers = {
    "context_32": dict(anytime, **short),
    "context_32_twin": dict(anytime, **short, compile=False, seeds=range(4)),
    "context_128": anytime,
    "context_128_twin": dict(anytime, compile=False, seeds=range(4)),
}
