"""As elsewhere_go.py, on Webster's dictionary. No tuning saw it; the recommended configuration was
read there before, with contexts of 128 and three seeds."""
import runpy
from pathlib import Path

go = runpy.run_path(str(Path(__file__).with_name("elsewhere_go.py")))
globals().update(go, base=dict(go["base"], data_dir="data/english"))
