"""Search for the learning rates and thresholds of `compression_curve`, on validation data.

    python experiments/compression_tuning.py --data-dir DIR

Every method of a network gets the same draws, from the same ranges, with one seed that no
reported run has, at 1.25 bits a weight (uniform: 2 bits) and for 1,000 updates: as many as the
transformer's reported runs have, a third of the ResNet's; the least validation loss wins and is
used at every rate. The test split is not read.
About a minute a draw on one core; a stop costs one draw, the same command goes on.
"""

import dataclasses
from typing import Any

import numpy as np
import tyro
from methods import LEFT_OUT, METHODS
from protocol import NETWORKS, run_method
from search import SEED, spread
from units import Options, Results, Unit, check_choice, work

from ssvq_jax.quantizers import to_json
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig

NAME = "compression_tuning"
TUNED_AT = {"uniform": 2.0}  # else 1.25 bits a weight
RATES = {
    "dense": (3e-4, 1e-2),
    "codebook": (3e-4, 1e-2),
    "sign": (1e-4, 3e-3),
    "latent": (1e-4, 3e-3),
}
USED = {
    "uniform": ("dense", "latent"),
    "vq": ("dense", "codebook"),
    "mvq": ("dense", "codebook"),
    "ssvq-fixed": ("dense", "codebook"),
    "ssvq": ("dense", "codebook", "sign"),
    "ssvq-freeze": ("dense", "codebook", "sign"),
    "ssvq-masked": ("dense", "codebook", "sign"),
}
FREEZING = ("ssvq-freeze", "ssvq-masked")
THRESHOLDS = ((0.2, 0.05), (0.1, 0.02), (0.05, 0.01))
TRIALS = 6
STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings of the search.

    Attributes:
        models: networks to search for.
        methods: methods to search for.
        trials: draws a method.
    """

    models: tuple[str, ...] = ("vit_cifar", "resnet20_cifar")
    methods: tuple[str, ...] = tuple(USED)
    trials: int = TRIALS
    seeds: tuple[int, ...] = (SEED,)


def draw(method: str, trial: int, trials: int = TRIALS) -> OptimizerConfig:
    """One configuration; a function of its arguments alone.

    A Latin hypercube: each rate has one draw in every ``trials``-th part of its range, in the
    logarithm, and each choice of thresholds comes as often as the others. A trial has the same
    rates for all methods, as far as they have them.
    """
    rates: dict[str, Any] = {
        name: spread(name, bounds, trials)[trial]
        for name, bounds in RATES.items()
        if name in USED[method]
    }
    freeze = None
    if method in FREEZING:
        order = np.random.default_rng(SEED).permutation(trials)
        start, end = THRESHOLDS[order[trial] % len(THRESHOLDS)]
        freeze = FreezeConfig(every=50, start=start, end=end, momentum=0.02)
    return OptimizerConfig(**rates, freeze=freeze)


def units(config: Config) -> list[Unit]:
    """All draws; first the first ones of every method."""
    check_choice("models", config.models, NETWORKS)
    check_choice("methods", config.methods, USED)

    def unit(model: str, method: str, trial: int, seed: int) -> Unit:
        network = dataclasses.replace(NETWORKS[model], steps=STEPS)
        optimizer = draw(method, trial, config.trials)
        quantizer = METHODS[method][TUNED_AT.get(method, 1.25)]
        settings = {
            "model": model,
            "method": method,
            "bits": TUNED_AT.get(method, 1.25),
            "trial": trial,
            "trials": config.trials,
            "seed": seed,
            "quantizer": to_json(quantizer),
            "steps": network.steps,
            "batch_size": network.batch_size,
            "optimizer": dataclasses.asdict(optimizer),
        }
        name = f"{model} {method} trial {trial} seed {seed}"

        def run() -> dict[str, Any]:
            row, _ = run_method(
                network, quantizer, optimizer, seed,
                data_dir=config.data_dir, test=False, name=name,
            )  # fmt: skip
            return row

        return Unit(name, settings, run)

    return [
        unit(model, method, trial, seed)
        for model in config.models
        for trial in range(config.trials)
        for method in config.methods
        if (model, method) not in LEFT_OUT
        for seed in config.seeds
    ]


def ranking(rows: list[dict[str, Any]], model: str, method: str) -> list[dict[str, Any]]:
    """The draws of a method, best first."""
    own = [r for r in rows if (r["settings"]["model"], r["settings"]["method"]) == (model, method)]
    return sorted(own, key=lambda row: row["loss_validation"])


def tuned(results: Results, model: str, method: str) -> OptimizerConfig:
    """What the search chose.

    Raises:
        SystemExit: if it was not run to the end.
    """
    of_search = [
        row
        for row in results.rows()
        if row["settings"]["trials"] == TRIALS and row["settings"]["seed"] == SEED
    ]
    found = ranking(of_search, model, method)
    if len(found) < TRIALS:
        raise SystemExit(
            f"{results.file} has {len(found)} of {TRIALS} draws of '{method}' for '{model}': first "
            f"run experiments/compression_tuning.py --models {model} --methods {method} to the end"
        )
    best = dict(found[0]["settings"]["optimizer"])
    freeze = best.pop("freeze")
    return OptimizerConfig(**best, freeze=freeze and FreezeConfig(**freeze))


def main(config: Config) -> None:
    results = config.results(NAME)
    if config.quick:
        raise SystemExit("the search has no --quick: quick runs of the others take its first draw")
    rows = results.rows() if config.only_report else work(units(config), results, config)
    for model in config.models:
        for method in config.methods:
            for row in ranking(rows, model, method):
                told = row["settings"]["optimizer"]
                chosen = {name: told[name] for name in USED[method]}
                print(
                    f"{model} {method:12} trial {row['settings']['trial']:2} "
                    f"loss {row['loss_validation']:.4f} "
                    f"accuracy {100 * row['accuracy_validation']:.2f} {chosen}"
                )


if __name__ == "__main__":
    main(tyro.cli(Config))
