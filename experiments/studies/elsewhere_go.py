"""The configurations that settled.py chose, nothing tuned, on text that nobody had looked at: the
sources of Go. elsewhere_english.py and elsewhere_148k.py are the same on Webster's dictionary and
at twice the size. NorMuon and AdamW know the length. This file was written before any of its runs,
but for `normuon_by_hand` and `adamw_by_hand`, which were added when horizon.py had found better
knobs on the kernel's C: they carry no claim.
"""
import runpy
from pathlib import Path

settled, hindsight = (runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
                      for name in ("settled", "hindsight"))
base = dict(settled["base"], data_dir="data/go")
tokens, horizons, seeds, tuning_seeds = settled["tokens"], (1, 4), range(5), ()

margin, both = settled["margin"], settled["both"]
claims = [("recommended", rival, 4) for rival in ("normuon", "amuse", "adamw")]
headline = {"recommended": "SF-NorMuon, recommended", "anytime": "SF-NorMuon, random search",
            "normuon_by_hand": "NorMuon, hand-tuned", "normuon": "NorMuon, random search",
            "adamw_by_hand": "AdamW, hand-tuned", "adamw": "AdamW, random search",
            "amuse": "AMUSE, random search"}


optimizers = {
    "recommended": hindsight["recommended"],
    "anytime": dict(optimizer="sf_normuon", lr=0.0134, **both(0.0125), betas=(0.6, 0.95),
                    adam_betas=(0.6, 0.99), momentum=0.9, warmup_steps=100, decay_at="y",
                    averaging_power=1.0, seeds=range(3)),  # carries no claim
    "amuse": dict(optimizer="amuse", lr=0.0495, betas=(0.6, 0.999), adam_betas=(0.6, 0.999),
                  momentum=0.9, warmup_steps=250, rho=0.3),
    "adamw": dict(optimizer="adamw", lr=0.0096, **both(0.02), betas=(0.8, 0.95),
                  warmup_steps=200, schedule="wsd"),
    "normuon": dict(optimizer="normuon", lr=0.0197, **both(0.1), adam_betas=(0.8, 0.95),
                    momentum=0.9, warmup_steps=50, schedule="linear"),
}
optimizers["normuon_by_hand"] = dict(optimizers["normuon"], lr=0.0394, **both(0.025))
optimizers["adamw_by_hand"] = dict(optimizers["adamw"], lr=0.0192, schedule="linear")
