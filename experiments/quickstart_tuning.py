"""Random search for the quickstart's learning rates and thresholds, on the validation split.

Every method gets the same number of trials, drawn from the ranges below, and the same seeds, at the
harder ratio (uniform: at 2 bits). The lowest mean validation loss wins; the test split is not read.

    python experiments/quickstart_tuning.py --out experiments/results/quickstart_tuning.json

About 20 minutes on two CPU cores; a stop costs one trial, the same command goes on. Expected: best
losses of 0.109 (uniform at 2 bits), 0.126 (learned signs), 0.131 (VQ) and 0.144 (fixed signs).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ssvq_jax.cli.quickstart import QuickstartCommand, compress, load_task, train_float
from ssvq_jax.plan import make_plan
from ssvq_jax.recipe import load_recipe
from ssvq_jax.report import provenance
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig

RECIPES = ("vq-26x-shared", "ssvq-fixed-26x-shared", "ssvq-26x-shared", "uniform-2bit")
RATES = {
    "dense": (5e-4, 5e-3),
    "codebook": (5e-4, 1e-2),
    "sign": (5e-4, 5e-3),
    "latent": (2e-4, 5e-3),
}
USED = {
    "vq-26x-shared": ("dense", "codebook"),
    "ssvq-fixed-26x-shared": ("dense", "codebook"),
    "ssvq-26x-shared": ("dense", "codebook", "sign"),
    "uniform-2bit": ("dense", "latent"),
}
# After eight trials the best of VQ and of fixed signs lay near the upper end for dense leaves: the
# later trials of all methods look above it.
LATER = {"from": 8, "dense": (3e-3, 2e-2)}
THRESHOLDS = ((0.2, 0.05), (0.1, 0.02), (0.05, 0.01))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the search.

    Attributes:
        out: results; trials found there are not run again.
        trials: draws a method.
        seeds: each draw is run with each.
    """

    out: Path = Path("experiments/results/quickstart_tuning.json")
    trials: int = 11
    seeds: tuple[int, ...] = (100, 101)


def draw(recipe: str, trial: int) -> OptimizerConfig:
    """One configuration, log-uniform in the ranges; a function of its arguments alone."""
    generator = np.random.default_rng([trial, RECIPES.index(recipe)])
    rates: dict[str, Any] = {}
    for name in USED[recipe]:
        later = trial >= LATER["from"] and name in LATER
        low, high = np.log(LATER[name] if later else RATES[name])
        rates[name] = float(f"{np.exp(generator.uniform(low, high)):.2g}")
    freeze = None
    if "sign" in rates:
        start, end = THRESHOLDS[generator.integers(len(THRESHOLDS))]
        freeze = FreezeConfig(every=50, start=start, end=end, momentum=0.02)
    return OptimizerConfig(**rates, freeze=freeze)


def main(config: Config) -> None:
    results = {**provenance(), "trials": {}}
    if config.out.exists():
        results["trials"] = json.loads(config.out.read_text())["trials"]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        command = QuickstartCommand(seed=seed)
        results["steps"], results["float_steps"] = command.steps, command.float_steps
        task, params = load_task(command, "validation"), None
        for recipe in RECIPES:
            for trial in range(config.trials):
                name = f"{recipe} trial {trial} seed {seed}"
                if name in results["trials"]:
                    continue
                if params is None:
                    params = train_float(command, task).packed.params
                optimizer = draw(recipe, trial)
                plan = make_plan(params, load_recipe(recipe))
                done = compress(command, task, plan, params, optimizer, name)
                results["trials"][name] = {
                    "recipe": recipe,
                    "seed": seed,
                    "optimizer": dataclasses.asdict(optimizer),
                    "validation_loss": done.after.loss,
                    "validation_accuracy": done.after.accuracy,
                    "signs": {
                        k: v for k, v in done.records[-1].items() if k in ("flipped", "frozen")
                    },
                    "seconds": sum(done.seconds.values()),
                }
                config.out.write_text(json.dumps(results, indent=1) + "\n")
    report(results["trials"])


def report(trials: dict[str, Any]) -> None:
    for recipe in RECIPES:
        by_config: dict[str, list[dict[str, Any]]] = {}
        for row in trials.values():
            if row["recipe"] == recipe:
                by_config.setdefault(json.dumps(row["optimizer"]), []).append(row)
        ranked = sorted(
            by_config.items(), key=lambda i: np.mean([r["validation_loss"] for r in i[1]])
        )
        for text, rows in ranked:
            loss = np.mean([row["validation_loss"] for row in rows])
            accuracy = np.mean([row["validation_accuracy"] for row in rows])
            chosen = {
                k: v for k, v in json.loads(text).items() if k in USED[recipe] or k == "freeze"
            }
            print(f"{recipe:24} loss {loss:.4f} accuracy {100 * accuracy:.2f} %  {chosen}")


if __name__ == "__main__":
    main(tyro.cli(Config))
