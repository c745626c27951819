"""How far seeds, and the same seed twice, are apart at 0.07M parameters, with contexts of 128 and
of 32 tokens: the recommended configuration to 4x. The twin is not compiled, so that it is the same
run but for rounding.
"""
import runpy
from pathlib import Path

settled, hindsight = (runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
                      for name in ("settled", "hindsight"))
base, tokens = dict(settled["base"], block_size=128, batch_size=16), settled["tokens"]
horizons, seeds, tuning_seeds = (4,), range(8), ()
short, recommended = dict(block_size=32, batch_size=64), hindsight["recommended"]
optimizers = {
    "context_32": dict(recommended, **short),
    "context_32_twin": dict(recommended, **short, compile=False, seeds=range(4)),
    "context_128": recommended,
    "context_128_twin": dict(recommended, compile=False, seeds=range(2)),
}
