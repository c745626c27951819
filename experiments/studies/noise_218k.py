"""As noise_70k.py at 0.2M parameters and 4,096 tokens a step, at half of the rate."""
import runpy
from pathlib import Path

noise_70k = runpy.run_path(str(Path(__file__).with_name("noise_70k.py")))
base = dict(noise_70k["base"], n_layer=4, n_head=4, n_embd=64, batch_size=32,  # 217,664 parameters
            total_batch_tokens=4096, eval_interval=266, log_interval=266)
tokens = 1064 * 4096  # 1x: 20 for each parameter
horizons, seeds, tuning_seeds = (4,), range(4), ()
short = dict(block_size=32, batch_size=128)
recommended = dict(noise_70k["recommended"], lr=0.016, weight_decay=0.06, adam_weight_decay=0.06)
optimizers = {
    "context_32": dict(recommended, **short),
    "context_32_twin": dict(recommended, **short, compile=False, seeds=range(2)),
    "context_128": recommended,
    "context_128_twin": dict(recommended, compile=False, seeds=range(2)),
}
