"""The comparison at 772M on FineWeb: as 125m.py, with the sizes of configs/772m_*.py. This has not
been run.

    python experiments/sweep.py experiments/studies/772m.py --nproc_per_node=8
"""
import runpy
from pathlib import Path

study = runpy.run_path(str(Path(__file__).with_name("125m.py")))
base = dict(study["base"], n_layer=36, n_head=20, n_embd=1280, total_batch_tokens=1_048_576,
            eval_interval=1052)
tokens = 14728 * 1_048_576  # 1x: 20 for each of the 772M parameters
horizons, seeds = study["horizons"], (0,)
tuning_seeds, tuning = study["tuning_seeds"], study["tuning"]
optimizers = study["optimizers"] | {"recommended": study["recommended"](14728)}
