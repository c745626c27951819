"""The runs of experiments/continual.py, at a small size: who starts from what, and what is kept."""
import importlib
import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from config import Config
from conftest import BATCH, REPO, TINY
from data import write_shard

sys.path.insert(0, str(REPO / "experiments"))
continual, runs = map(importlib.import_module, ("continual", "runs"))


def test_each_method_goes_on_in_its_own_way(tmp_path, data, tokens, monkeypatch):
    new = tmp_path / "new"
    new.mkdir()
    (new / "meta.json").write_text((data / "meta.json").read_text())
    for split, part in ("val", tokens[:5000]), ("train", tokens[5000:50000]):
        write_shard(new / f"x_{split}_000000.bin", 255 - part)
    known = tmp_path / "settled.jsonl"
    for study, named in {
            "settled": {"tune_adamw_4x_c0_lr0.5_seed9": dict(lr=0.5),
                        "sf_adamw_4x_lr0.5_seed0": dict(lr=0.5),
                        "adamw_4x_lr0.01_seed0": dict(optimizer="adamw", schedule="linear",
                                                      lr=0.01)},
            "hindsight": {"recommended_lr0.02_seed0": {}}}.items():
        known.with_stem(study).write_text("".join(json.dumps(dict(
            name=name, evals=[], train=[], config=asdict(Config(
                **{**TINY, "warmup_steps": 1, "eval_interval": 2, **knobs})))) + "\n"
            for name, knobs in named.items()))
    monkeypatch.setattr(continual, "settled", SimpleNamespace(
        file=known, tokens=2 * BATCH, runs=tmp_path / "runs/settled"))
    for name, value in dict(OLD=str(data), NEW=str(new), BEFORE=2, AFTER=(1,),
                            FILE=tmp_path / "continual.jsonl").items():
        monkeypatch.setattr(continual, name, value)
    results = {}
    continual.run_all(results)
    continual.draw(results)
    folders, kept = tmp_path / "runs/continual", runs.read_results(tmp_path / "continual.jsonl")
    assert kept == results and [*kept] == [
        f"{method}_{h}x" for method in ("anytime", "restart", "fresh", "cosine", "wsd")
        for h in (0, 1) if h or method not in ("restart", "fresh")]
    step = lambda name: torch.load(folders / name / "ckpt.pt", weights_only=True)["step"]
    assert [step(name) for name in ("anytime_0x", "anytime", "restart", "cosine_1x", "fresh")] == [
        4, 6, 2, 2, 2]
    for name, run in kept.items():
        method, config = name.split("_")[0], run["config"]
        assert config["optimizer"] == ("adamw" if method in ("cosine", "wsd") else "sf_normuon")
        assert config["schedule"] == (method if method in ("cosine", "wsd") else "constant")
        assert config["lr"] == (0.01 if method in ("cosine", "wsd") else 0.02)
        again = method in ("cosine", "wsd", "restart") and not name.endswith("0x")
        first = "anytime" if method == "restart" else method
        weights = os.path.relpath(folders / f"{first}_0x/ckpt.pt", REPO)
        assert config["init_from"] == weights * again
        assert config["change_data"] == (method == "anytime" and not name.endswith("0x"))
        assert config["data_dir"] == str(data if name.endswith("0x") else new)
    # the losses: on both corpora, of the model that the run left
    for name, key, at in [("anytime_0x", "val_loss", new), ("anytime_0x", "old_loss", data),
                          ("cosine_1x", "val_loss", new), ("cosine_1x", "old_loss", data)]:
        text = continual.train_py(folders / name, eval_only=True, **{
            **TINY, "data_dir": at, "out_dir": folders / name})
        assert f" {kept[name]['evals'][0][key]:.6f} nats" in text
    svg = (tmp_path / "continual.svg").read_text()
    assert all(f">{label}<" in svg for label in continual.LABELS.values())

    def nothing(*args, **knobs):
        raise AssertionError("it ran again")

    monkeypatch.setattr(continual, "train_py", nothing)
    continual.run_all(kept)
    known.write_text("")
    with pytest.raises(SystemExit, match="settled.jsonl has no run adamw_4x_"):
        continual.run_all({})
