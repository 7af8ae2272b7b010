"""Random search for the quickstart's learning rates and thresholds, on the validation split.

Every method gets the same number of trials, drawn from the ranges below, and the same seeds, at the
harder ratio (uniform: at 2 bits), with short runs. The four best of each method by mean validation
loss then run at the quickstart's own length, and the lowest loss wins. The test split is not read.

    python experiments/quickstart_tuning.py --out experiments/results/quickstart_tuning.json

About 30 minutes on two CPU cores; a stop costs one trial, the same command goes on. Expected: among
the finalists learned signs reach a lower loss than VQ, and VQ a lower one than fixed signs.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ssvq_jax.cli.quickstart import QuickstartCommand, compress, load_task, train_float
from ssvq_jax.json_files import read_json
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
        short: updates of the float model and of each short trial.
        finalists: best draws of a method that run at full length.
        final_seed: seed of the full-length runs.
    """

    out: Path = Path("experiments/results/quickstart_tuning.json")
    trials: int = 11
    seeds: tuple[int, ...] = (100, 101)
    short: tuple[int, int] = (6000, 800)
    finalists: int = 4
    final_seed: int = 102


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
    results: dict[str, Any] = {"trials": {}, "finals": {}}
    if config.out.exists():
        results |= read_json(config.out)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        draws = [(recipe, i, draw(recipe, i)) for recipe in RECIPES for i in range(config.trials)]
        command = QuickstartCommand(seed=seed, float_steps=config.short[0], steps=config.short[1])
        run(command, draws, results, "trials", config.out)
    finalists = []
    for recipe in RECIPES:
        best = ranking(results["trials"], recipe)[: config.finalists]
        finalists += [(recipe, i, draw(recipe, i)) for i, _ in best]
    run(QuickstartCommand(seed=config.final_seed), finalists, results, "finals", config.out)
    for stage in ("trials", "finals"):
        for recipe in RECIPES:
            for trial, loss in ranking(results[stage], recipe):
                chosen = {k: getattr(draw(recipe, trial), k) for k in USED[recipe]}
                print(f"{stage} {recipe:22} trial {trial:2} loss {loss:.4f} {chosen}")


def run(
    command: QuickstartCommand,
    draws: list[tuple[str, int, OptimizerConfig]],
    results: dict[str, Any],
    stage: str,
    out: Path,
) -> None:
    """Runs the draws that have no result yet; the float model is trained once."""
    task, params = load_task(command, "validation"), None
    for recipe, trial, optimizer in draws:
        name = f"{recipe} trial {trial} seed {command.seed}"
        if name in results[stage]:
            continue
        if params is None:
            params = train_float(command, task).packed.params
        plan = make_plan(params, load_recipe(recipe))
        done = compress(command, task, plan, params, optimizer, name)
        last = done.records[-1]
        results[stage][name] = {
            "recipe": recipe,
            "trial": trial,
            "seed": command.seed,
            "float_steps": command.float_steps,
            "steps": command.steps,
            "optimizer": dataclasses.asdict(optimizer),
            "validation_loss": done.after.loss,
            "validation_accuracy": done.after.accuracy,
            "signs": {k: v for k, v in last.items() if k in ("flipped", "frozen")},
            "seconds": sum(done.seconds.values()),
            **provenance(),
        }
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def ranking(rows: dict[str, Any], recipe: str) -> list[tuple[int, float]]:
    """Trials of a recipe with their mean validation losses, best first."""
    losses: dict[int, list[float]] = {}
    for row in rows.values():
        if row["recipe"] == recipe:
            losses.setdefault(row["trial"], []).append(row["validation_loss"])
    return sorted(((i, float(np.mean(values))) for i, values in losses.items()), key=lambda x: x[1])


if __name__ == "__main__":
    main(tyro.cli(Config))
