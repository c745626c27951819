"""As noise_70k.py at 0.2M parameters and 4,096 tokens a step."""
import runpy
from pathlib import Path

frontier = runpy.run_path(str(Path(__file__).with_name("frontier_218k.py")))
base, tokens = frontier["base"], frontier["tokens"]
horizons, seeds, tuning_seeds = (4,), range(4), ()
short = dict(block_size=32, batch_size=128)
anytime = frontier["optimizers"]["anytime"]
optimizers = {
    "context_32": dict(anytime, **short),
    "context_32_twin": dict(anytime, **short, compile=False, seeds=range(2)),
    "context_128": dict(anytime, seeds=range(4)),
    "context_128_twin": dict(anytime, compile=False, seeds=range(2)),
}
