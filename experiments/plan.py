"""Which runs a study has left: draws, successive halving, grids of rates. sweep.py's header says
how a study is written."""
import json
import math
import random
import runpy
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

from checkpoint import MAY_CHANGE
from runs import DEFAULT, Refused, read_results

ROOT = Path(__file__).resolve().parents[1]
WIDENINGS = 6  # of a grid, at most: a loss that does not depend on the rate would widen it forever


def read_study(path: str) -> SimpleNamespace:
    try:
        study = SimpleNamespace(**{"draws": 12, "draw_seed": 0, "rungs": (), "tuning": {},
                                   **runpy.run_path(path), "name": Path(path).stem})
        for name, knobs in study.optimizers.items():
            method = {"horizons": study.horizons, "seeds": study.seeds, "draws": study.draws,
                      "space": {}, "lr": None, **study.base, **knobs}
            study.optimizers[name] = method
            check_method(study, name, method)
        check_claims(study)
    except FileNotFoundError:
        raise Refused(f"{path}: no such study")
    except Exception as e:
        raise Refused(f"{path} is not a study: {type(e).__name__}: {e}")
    study.file = ROOT / "experiments/results" / f"{study.name}.jsonl"
    study.runs = ROOT / "runs" / study.name
    return study


def check_method(study, name: str, method: dict) -> None:
    if {*method["seeds"]} & {*study.tuning_seeds}:
        raise ValueError(f"{name}: tuning_seeds must be other seeds than those reported")
    step = {**DEFAULT, **method}
    evaluated = step["total_batch_tokens"] * step["eval_interval"]
    if any(h * study.tokens % evaluated for h in method["horizons"]):
        raise ValueError(f"{name}: every horizon must be a multiple of total_batch_tokens times "
                         f"eval_interval, {evaluated} tokens, so that it is evaluated")
    configs = draw(method["space"], method["draws"], 0) or [{}]
    grid = isinstance(method["lr"], list) and not method["space"]
    rates = method["lr"] if grid else [method["lr"]]
    if not all(isinstance(c.get("lr", rate), (int, float)) for c in configs for rate in rates):
        raise ValueError(f"{name}: lr must be a number, a list of them, or a knob of the space")
    if not method["space"]:
        return
    if [*study.rungs[:1]] != [method["horizons"][0]]:
        raise ValueError(f"{name}: its first horizon must be the first of the rungs, {study.rungs}")
    if len(study.tuning_seeds) < 2:
        raise ValueError(f"{name}: a space needs at least two tuning_seeds")
    text = [{**DEFAULT, **method, **more} for more in ({}, study.tuning)]
    if not text[0]["eval_offset"] + text[0]["eval_tokens"] <= text[1]["eval_offset"]:
        raise ValueError(f"{name}: tuning must have an eval_offset beyond the reported text")


def check_claims(study) -> None:
    for claim in getattr(study, "claims", ()):
        *methods, h = claim
        if len(methods) != 2 or not {*methods} <= {*study.optimizers} or not all(
                h in study.optimizers[method]["horizons"] for method in methods):
            raise ValueError(f"the claim {claim} must name two methods and a horizon of both")
        if not hasattr(study, "margin"):
            raise ValueError("claims need a margin: the difference below which two are equal")


def draw(space: dict, draws: int, seed) -> list[dict]:
    """Configurations that spread every knob evenly over its values or range (a Latin hypercube)."""
    rng = random.Random(seed)  # only random() is the same in all versions of Python
    configs = [{} for _ in range(draws)]
    for knob, values in space.items():
        for i, config in enumerate(sorted(configs, key=lambda _: rng.random())):
            part = (i + rng.random()) / draws
            if isinstance(values, tuple):
                low, high = values
                value = float(f"{low * (high / low) ** part:.3g}")
            else:
                value = values[int(part * len(values))]
            config.update(value if isinstance(value, dict) else {knob: value})
    return configs


def choose(rates: list[float], score) -> float | None:
    """The best rate of a grid that grows until it is inside; None while a run is missing."""
    scores = {rate: score(rate) for rate in rates}
    while None not in scores.values():
        best = min(scores, key=scores.get)
        at_edge = {min(scores): best / 2, max(scores): best * 2}
        if best not in at_edge or math.isinf(scores[best]) or len(scores) == len(rates) + WIDENINGS:
            return best
        scores[at_edge[best]] = score(at_edge[best])


class Plan:
    """The runs that are left: `ready`, (name, knobs of train.py), and `later`, (title, knobs),
    those whose configuration the others choose."""

    def __init__(self, study):
        self.study, self.results = study, read_results(study.file)
        self.ready, self.later = [], []
        for name, method in study.optimizers.items():
            self.add(name, **method)
        # Short runs first, then seed by seed: an interrupted study compares methods already.
        self.ready.sort(key=lambda run: (run[1]["max_tokens"], run[1]["seed"]))

    def add(self, name, horizons, seeds, draws, space, lr, **knobs) -> None:
        rates = lr if isinstance(lr, list) else None
        config, tag = {**knobs, "lr": lr}, ""
        drawn = draw(space, draws, f"{self.study.draw_seed} {name}")
        scheduled = any({**DEFAULT, **knobs, **values}["schedule"] != "constant"
                        for values in drawn or [{}])
        left = [(f"_c{i}", {**config, **values}) for i, values in enumerate(drawn)]  # best first
        for targets in [[h] for h in horizons] if scheduled else [horizons]:
            title = f"{name}_{targets[0]}x" if scheduled else name
            rungs = [h for h in targets if space and h in self.study.rungs]
            for rung in rungs:
                if rung != self.study.rungs[0]:
                    left = left[:math.ceil(len(left) / 3)]
                left = self.sort(title, left, [h for h in targets if h <= rung])
                tag, config = left[0]
            if rates and not rungs:
                rate = choose(rates, lambda rate: self.score(
                    title + tag, rate and {**config, "lr": rate}, targets))
                config = rate and {**config, "lr": rate}
            if rates or space:  # the next horizon starts from here
                rates = [config["lr"] * k for k in (0.5, 1, 2)] if config else [None] * 3
            for seed in seeds:
                self.loss(title, config, seed, targets)

    def sort(self, title: str, configs: list[tuple], horizons: list[int]) -> list[tuple]:
        """The (tag, config) by score, best first; all ("", None) while a run is missing."""
        scores = {tag: self.score(title + tag, config, horizons) for tag, config in configs}
        if None in scores.values():
            return [("", None)] * len(configs)
        return sorted(configs, key=lambda candidate: scores[candidate[0]])

    def score(self, title: str, config: dict | None, horizons: list[int]) -> float | None:
        losses = [self.loss(title, config, seed, horizons) for seed in self.study.tuning_seeds]
        return None if None in losses else mean(losses)

    def loss(self, title: str, config: dict | None, seed: int, horizons: list[int]) -> float | None:
        """Mean validation loss of a run at these horizons, inf if it diverged before one of them.
        A run without a result goes on the list."""
        tuning = seed in self.study.tuning_seeds
        knobs = {**(config or {}), **(self.study.tuning if tuning else {}),
                 "seed": seed, "max_tokens": max(horizons) * self.study.tokens}
        if config is None:
            self.later.append((title, knobs))
            return None
        knobs = {k: v(config["lr"]) if callable(v) else v for k, v in knobs.items()}
        name = f"{'tune_' * tuning}{title}_lr{config['lr']:g}_seed{seed}"
        run = self.results.get(name)
        if run is None or run["config"]["max_tokens"] < knobs["max_tokens"]:
            self.ready.append((name, knobs))
            return None
        check_same(self.study, run, knobs)
        losses = {line["tokens"]: line["val_loss"] for line in run["evals"]}
        return mean(losses.get(h * self.study.tokens, math.inf) for h in horizons)


def check_same(study, run: dict, knobs: dict) -> None:
    knobs = json.loads(json.dumps({**DEFAULT, **knobs}))
    for key, value in knobs.items():
        kept = run["config"].get(key, DEFAULT[key])  # an old run lacks knobs that came later
        filled_in = key == "dtype" and not value  # by train.py, with the device's default
        # a scheduled run of another length has another rate at every step
        length = key == "max_tokens" and knobs["schedule"] != "constant"
        if (key not in MAY_CHANGE or length) and kept != value and not filled_in:
            raise Refused(f"{study.file.relative_to(ROOT)}: {run['name']} has {key} {kept}, the "
                          f"study says {value}: rename the method or delete the line")
