"""Whose gradient a codeword follows: cosines with its largest and its smallest members' gradients.

    python experiments/gradient_dominance.py --data-dir DIR
    python experiments/gradient_dominance.py --quick            # embedded digits

The paper's first table, on the networks of `compression_curve` at 1.5 bits a weight: VQ against
SSVQ, before and after fine-tuning. Each figure is a mean over eight training batches, weighted
by the members of the codewords; the definitions are those of `ssvq_jax.analysis`. Writes
experiments/results/gradient_dominance.json and from it the table and picture of docs/results.md
(--only-report writes these alone). The paper reports cosines of 0.66 with the top 5 % and 0.26 with
the bottom 60 % (VQ of MobileNet-V2; its exact definition is not known to us).
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from compression_tuning import NAME as TUNING
from compression_tuning import draw, tuned
from jaxtyping import Array, Float
from methods import METHODS
from protocol import (
    NETWORKS,
    Network,
    baseline,
    make_task,
    plan_of,
    quick_baseline,
    run_method,
)
from tables import Rows, deviation, mean_and_deviation, select
from units import Options, Unit, check_choice, conduct

from ssvq_jax.analysis import dense_gradients, gradient_dominance
from ssvq_jax.plan import Plan
from ssvq_jax.quantizers import to_json
from ssvq_jax.report.pages import markdown_table
from ssvq_jax.report.plots import new_figure
from ssvq_jax.training.finetune import encoding_key
from ssvq_jax.training.optimizer import OptimizerConfig
from ssvq_jax.training.run import Task
from ssvq_jax.tree import PyTree, Variables

NAME = "gradient_dominance"
BITS = 1.5
LABELS = {"vq": "VQ", "mvq": "MVQ", "ssvq": "SSVQ"}
FIGURES = ("top", "bottom", "top_norm_share", "agreement")
_BATCHES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings.

    Attributes:
        models: the networks.
        methods: to compare.
    """

    models: tuple[str, ...] = ("vit_cifar", "resnet20_cifar")
    methods: tuple[str, ...] = ("vq", "ssvq")


def units(config: Config) -> list[Unit]:
    """A unit for each network, method and seed."""
    check_choice("models", config.models, NETWORKS)
    check_choice("methods", config.methods, LABELS)
    if config.quick:
        weights = quick_baseline(config.data_dir)
        return [
            unit(config, NETWORKS["deit_digits"], method, config.seeds[0], 1.25, weights, None)
            for method in config.methods
        ]
    results = Options().results(TUNING)
    return [
        unit(config, NETWORKS[model], method, seed, BITS, baseline, tuned(results, model, method))
        for seed in config.seeds
        for model in config.models
        for method in config.methods
    ]


def unit(
    config: Config,
    network: Network,
    method: str,
    seed: int,
    bits: float,
    weights: Any,
    optimizer: OptimizerConfig | None,
) -> Unit:
    """Measures one compressed network at the start and at the end of its fine-tuning."""
    optimizer = optimizer or draw(method, 0)
    quantizer = METHODS[method][bits]
    told = {"model": network.model, "method": method, "bits": bits, "seed": seed}
    settings = {
        **told,
        "quantizer": to_json(quantizer),
        "steps": network.steps,
        "batch_size": network.batch_size,
        "optimizer": dataclasses.asdict(optimizer),
    }
    name = f"{network.model} {method} {bits:g} bits seed {seed}"

    def run() -> dict[str, Any]:
        params, model_state = weights(network.model)
        plan, task = plan_of(network, quantizer, params), make_task(network, config.data_dir)
        start = plan.init(encoding_key(jax.random.key(seed)), params)
        _, done = run_method(
            network, quantizer, optimizer, seed,
            data_dir=config.data_dir, test=False, name=name, weights=weights,
        )  # fmt: skip
        return {
            **told,
            "start": measure(task, plan, start, model_state),
            "end": measure(task, plan, done.state.variables, done.state.model_state),
        }

    return Unit(name, settings, run)


def measure(task: Task, plan: Plan, variables: Variables, model_state: PyTree) -> dict[str, float]:
    """Mean figures over batches and codebooks, the latter weighted by their members."""
    params = plan.decode(variables)

    def loss(params: PyTree, batch: Any) -> Float[Array, ""]:
        logits, _ = task.forward(params, model_state, batch["image"], None)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return found.mean()

    found: dict[str, list[float]] = {key: [] for key in FIGURES}
    for batch in itertools.islice(task.train_batches(0), _BATCHES):
        rows = gradient_dominance(plan, variables, dense_gradients(loss, params, [batch]))
        rows = [row for row in rows if row.codewords]
        for key in FIGURES:
            values = [getattr(row, key) for row in rows]
            found[key].append(np.average(values, weights=[row.members for row in rows]))
    return {key: round(float(np.mean(values)), 4) for key, values in found.items()}


def tables(rows: Rows) -> dict[str, str]:
    """The table of the page, by the name of its marker."""
    cells = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for when, label in (("start", "before"), ("end", "after")):
            for method, method_label in LABELS.items():
                own = select(rows, model=model, method=method)
                if own:
                    figures = [mean_and_deviation(row[when][key] for row in own) for key in FIGURES]
                    cells.append([model, label, method_label, *figures, str(len(own))])
    columns = [
        "network",
        "fine-tuning",
        "method",
        "cosine, top 5 %",
        "cosine, bottom 60 %",
        "norm of the top 5 %",
        "agreement",
        "runs",
    ]
    return {"gradient_dominance table": markdown_table(columns, cells)}


def plot(rows: Rows, folder: Path) -> None:
    """Draws the cosines with the largest and the smallest members after fine-tuning."""
    figure, axes = new_figure()
    models = list(dict.fromkeys(row["model"] for row in rows))
    bars = [
        (model, method)
        for model in models
        for method in LABELS
        if select(rows, model=model, method=method)
    ]
    for shift, key, label in ((-0.2, "top", "top 5 %"), (0.2, "bottom", "bottom 60 %")):
        values = [
            [row["end"][key] for row in select(rows, model=model, method=method)]
            for model, method in bars
        ]
        axes.bar(
            np.arange(len(bars)) + shift,
            [np.mean(found) for found in values],
            width=0.4,
            yerr=[deviation(found) for found in values],
            label=label,
        )
    names = [f"{model}\n{LABELS[method]}" for model, method in bars]
    axes.set_xticks(range(len(bars)), names, fontsize="x-small")
    axes.set(
        ylabel="cosine with the codeword's gradient", title="Whose gradient a codeword follows"
    )
    axes.set_ylim(top=1.0)  # room for the names
    axes.legend(fontsize="small")
    figure.savefig(folder / f"{NAME}.png")


if __name__ == "__main__":
    conduct(NAME, units, tables, plot, tyro.cli(Config))
