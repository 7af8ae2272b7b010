"""Accuracy against bits on CIFAR-10: uniform QAT, VQ, MVQ and SSVQ in four forms, two networks.

    python experiments/compression_curve.py --data-dir DIR  # CIFAR-10, hours; goes on
    python experiments/compression_curve.py --quick         # embedded digits, minutes

Learning rates are those that `compression_tuning` chose for each method. Every row is a float
network of experiments/baselines compressed and fine-tuned on batches of 32 images, for 1,000
(transformer) or 3,000 updates; its accuracy on the test split is read once. One to two minutes a
row on one core; run two halves side by side with --part 1/2 and --part 2/2. Writes
experiments/results/compression_curve.json, and from it the tables and pictures of docs/results.md
(--only-report writes these alone).
Expected: learned signs above fixed signs and VQ, more so the fewer the bits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from compression_tuning import NAME as TUNING
from compression_tuning import draw, tuned
from methods import LEFT_OUT, METHODS
from protocol import (
    NETWORKS,
    Network,
    baseline,
    judge_float,
    quick_baseline,
    run_method,
)
from tables import Rows, deviation, differences, percent, select, signed
from units import Options, Unit, check_choice, conduct

from ssvq_jax.quantizers import to_json
from ssvq_jax.report.pages import markdown_table
from ssvq_jax.report.plots import new_figure
from ssvq_jax.training.optimizer import OptimizerConfig

NAME = "compression_curve"
LABELS = {
    "uniform": "uniform QAT (LSQ)",
    "vq": "VQ",
    "mvq": "MVQ",
    "ssvq-fixed": "SSVQ, fixed signs",
    "ssvq": "SSVQ, no freezing",
    "ssvq-freeze": "SSVQ, freezing",
    "ssvq-masked": "SSVQ + MVQ mask",
}
RATES: Mapping[str, tuple[float, ...]] = {
    "vit_cifar": (1.125, 1.25, 1.5, 2.0, 3.0),
    "resnet20_cifar": (1.25, 1.5, 2.0),
    "deit_digits": (1.25,),
}
UNIFORM = (2.0, 3.0, 4.0, 8.0)
BITS = (1.125, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings.

    Attributes:
        models: networks to compress.
        methods: by which.
        bits: nominal bits a weight, of those that a method has.
    """

    models: tuple[str, ...] = ("vit_cifar", "resnet20_cifar")
    methods: tuple[str, ...] = tuple(LABELS)
    bits: tuple[float, ...] = BITS


def rates(model: str, method: str) -> list[float]:
    """Nominal bits a weight at which a method is run."""
    if (model, method) in LEFT_OUT:
        return []
    wanted = UNIFORM if method == "uniform" else RATES[model]
    return [bits for bits in wanted if bits in METHODS[method]]


def units(config: Config) -> list[Unit]:
    """All rows; those of the first seed come first."""
    check_choice("models", config.models, NETWORKS)
    check_choice("methods", config.methods, LABELS)
    check_choice("bits", config.bits, BITS)
    tuning = Options().results(TUNING)
    weights = quick_baseline(config.data_dir) if config.quick else baseline
    models = ("deit_digits",) if config.quick else config.models
    found = []
    for seed in config.seeds[:1] if config.quick else config.seeds:
        for model in models:
            if seed == config.seeds[0]:
                found.append(float_unit(config, NETWORKS[model], weights))
            for method in config.methods:
                wanted = [bits for bits in rates(model, method) if bits in config.bits]
                if not wanted:
                    continue
                optimizer = draw(method, 0) if config.quick else tuned(tuning, model, method)
                found += [
                    unit(config, NETWORKS[model], method, bits, seed, optimizer, weights)
                    for bits in wanted
                ]
    return found


def unit(
    config: Config,
    network: Network,
    method: str,
    bits: float,
    seed: int,
    optimizer: OptimizerConfig,
    weights: Callable[[str], Any],
) -> Unit:
    """One network, method, rate and seed."""
    told = {"model": network.model, "method": method, "bits": bits, "seed": seed}
    name = f"{network.model} {method} {bits:g} bits seed {seed}"
    settings = {
        **told,
        "quantizer": to_json(METHODS[method][bits]),
        "steps": network.steps,
        "batch_size": network.batch_size,
        "optimizer": dataclasses.asdict(optimizer),
    }

    def run() -> dict[str, Any]:
        row, _ = run_method(
            network, METHODS[method][bits], optimizer, seed,
            data_dir=config.data_dir, test=True, name=name, weights=weights,
        )  # fmt: skip
        return {**told, **row}

    return Unit(name, settings, run)


def float_unit(config: Config, network: Network, weights: Callable[[str], Any]) -> Unit:
    """The float network itself."""
    told = {"model": network.model, "method": "float", "bits": 32.0, "seed": 0}

    def run() -> dict[str, Any]:
        return {**told, **judge_float(network, weights, config.data_dir)}

    return Unit(f"{network.model} float", told, run)


def tables(rows: Rows) -> dict[str, str]:
    """The tables of the page, by the name of their markers."""
    found: dict[str, str] = {}
    for model in sorted({row["model"] for row in rows}):
        own = select(rows, model=model)
        found |= {f"{NAME} {model} table": _curve(own), f"{NAME} {model} claims": _claims(own)}
    return found


def _curve(rows: Rows) -> str:
    """All methods at all rates."""
    cells = []
    for method, label in {"float": "float32", **LABELS}.items():
        of_method = select(rows, method=method)
        for bits in sorted({row["bits"] for row in of_method}):
            own = select(of_method, bits=bits)
            cells.append(
                [
                    label,
                    f"{own[0]['bits_per_weight']:.3f}",
                    f"{own[0]['compression_ratio']:.1f}x",
                    f"{own[0]['stored_ratio']:.1f}x",
                    percent(own, "accuracy_validation"),
                    percent(own, "accuracy_test"),
                    str(len(own)),
                ]
            )
    columns = ["method", "bits/weight", "ratio", "whole model", "validation", "test", "runs"]
    return markdown_table(columns, cells)


CLAIMS = {
    "SSVQ less VQ": ("ssvq-freeze", "vq"),
    "SSVQ less MVQ": ("ssvq-freeze", "mvq"),
    "learned less fixed signs": ("ssvq", "ssvq-fixed"),
    "mask and signs less signs": ("ssvq-masked", "ssvq-freeze"),
}


def _claims(rows: Rows) -> str:
    """Differences of test accuracy at equal nominal bits, by seed."""
    rates = sorted({row["bits"] for row in rows if row["method"] == "vq"})
    cells = []
    for label, (one, other) in CLAIMS.items():
        gaps = [
            differences(
                select(rows, method=one, bits=bits),
                select(rows, method=other, bits=bits),
                "accuracy_test",
            )
            for bits in rates
        ]
        if any(gaps):
            cells.append([label, *map(signed, gaps)])
    whole = select(rows, method="float")
    cells.append(["share of VQ's loss recovered", *(_recovered(rows, whole, b) for b in rates)])
    return markdown_table(["points of test accuracy", *(f"{b:g} bits" for b in rates)], cells)


def _recovered(rows: Rows, whole: Rows, bits: float) -> str:
    """(SSVQ - VQ) / (float - VQ), of the means."""
    means = []
    for method in ("ssvq-freeze", "vq"):
        own = select(rows, method=method, bits=bits)
        if not own or not whole:
            return "-"
        means.append(sum(row["accuracy_test"] for row in own) / len(own))
    lost = whole[0]["accuracy_test"] - means[1]
    return f"{100 * (means[0] - means[1]) / lost:.0f} %" if lost > 0 else "nothing was lost"


def plot(rows: Rows, folder: Path) -> None:
    """Draws a picture of every network."""
    for model in sorted({row["model"] for row in rows}):
        _plot(rows, model, folder / f"{NAME}_{model}.png")


def _plot(rows: Rows, model: str, file: Path) -> None:
    """Draws test accuracy against stored bits."""
    figure, axes = new_figure()
    own = select(rows, model=model)
    for row in select(own, method="float"):
        axes.axhline(100 * row["accuracy_test"], color="grey", linestyle=":", label="float32")
    for method, label in LABELS.items():
        of_method = select(own, method=method)
        rates = sorted({row["bits"] for row in of_method})
        at = [select(of_method, bits=bits) for bits in rates]
        if at:
            axes.errorbar(
                [each[0]["bits_per_weight"] for each in at],
                [np.mean([100 * row["accuracy_test"] for row in each]) for each in at],
                yerr=[deviation([100 * row["accuracy_test"] for row in each]) for each in at],
                marker="o", capsize=3, label=label,
            )  # fmt: skip
    axes.set(
        xscale="log",
        xlabel="stored bits per weight of the compressed leaves",
        ylabel="test accuracy, %",
        title=model,
    )
    axes.set_xticks([1, 1.5, 2, 3, 4, 8], ["1", "1.5", "2", "3", "4", "8"])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(file)


if __name__ == "__main__":
    conduct(NAME, units, tables, plot, tyro.cli(Config))
