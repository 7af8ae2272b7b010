"""What freezing signs does: interval, target, thresholds, warm-up, and the latents' scale.

    python experiments/ablation_freezing.py --data-dir DIR
    python experiments/ablation_freezing.py --quick            # embedded digits, minutes

SSVQ of the CIFAR-10 ResNet at 1.25 bits a weight. All rows have the rates that the search of
`compression_tuning` chose for SSVQ with freezing. The thresholds that it chose freeze one sign in a
thousand; what is frozen to, when and how often is therefore changed at low thresholds. 3,000
updates of 32 images, one to two minutes a row on one core. Writes
experiments/results/ablation_freezing.json and from it the table and picture of docs/results.md
(--only-report writes these alone). The paper reports, at 21x on ImageNet: intervals 100, 200, 500,
1000 give 60.9, 61.5, 61.9, 61.6 %, no freezing about 54 %, the sign of an average 60.8 %.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from compression_tuning import NAME as TUNING
from compression_tuning import draw, tuned
from methods import METHODS
from protocol import NETWORKS, SIGN_FIGURES, baseline, quick_baseline, run_method
from tables import Rows, differences, percent, select, signed
from units import Options, Unit, check_choice, conduct

import ssvq_jax as ssvq
from ssvq_jax.quantizers import to_json
from ssvq_jax.report.pages import markdown_table
from ssvq_jax.report.plots import new_figure
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig

NAME = "ablation_freezing"
BITS = 1.25
TUNED = "as tuned"
LOW = {"start": 0.05, "end": 0.01}  # thresholds at which one sign in 16 freezes
LOW_NAME = "thresholds 0.05 to 0.01"  # what rows of this prefix are compared with
LOW_PREFIX = "low thresholds, "
# Changes of the freezing that the search chose; None for no freezing.
FREEZING: dict[str, dict[str, Any] | None] = {
    TUNED: {},
    "no freezing": None,
    "thresholds 0.2 to 0.05": {"start": 0.2, "end": 0.05},
    "thresholds 0.1 to 0.02": {"start": 0.1, "end": 0.02},
    LOW_NAME: LOW,
    f"{LOW_PREFIX}every 25 updates": {**LOW, "every": 25},
    f"{LOW_PREFIX}every 250 updates": {**LOW, "every": 250},
    f"{LOW_PREFIX}to the sign of an average": {**LOW, "freeze_to": "average"},
    f"{LOW_PREFIX}to the current sign": {**LOW, "freeze_to": "current"},
    f"{LOW_PREFIX}in the last half": {**LOW, "warmup_share": 0.5},
}
ALPHAS = (0.5, 2.0)
_RECORD_EVERY = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings.

    Attributes:
        model: the network.
        only: variants to run, by their names; by default all.
    """

    model: str = "resnet20_cifar"
    only: tuple[str, ...] = ()


def variants(base: OptimizerConfig) -> dict[str, tuple[OptimizerConfig, float]]:
    """Optimizer and alpha of every row; those that change nothing are left out."""
    freeze = base.freeze or FreezeConfig()
    found: dict[str, tuple[OptimizerConfig, float]] = {}
    for name, changes in FREEZING.items():
        changed = None if changes is None else dataclasses.replace(freeze, **changes)
        if name == TUNED or changed != freeze:
            found[name] = dataclasses.replace(base, freeze=changed), 1.0
    for alpha in ALPHAS:
        found[f"alpha {alpha:g}"] = dataclasses.replace(base, freeze=freeze), alpha
    return found


def units(config: Config) -> list[Unit]:
    """All rows; those of the first seed come first."""
    names = [*FREEZING, *(f"alpha {alpha:g}" for alpha in ALPHAS)]
    check_choice("only", config.only, names)
    if config.quick:
        network, weights = NETWORKS["deit_digits"], quick_baseline(config.data_dir)
        base, seeds = draw("ssvq-freeze", 0), config.seeds[:1]
    else:
        network, weights, seeds = NETWORKS[config.model], baseline, config.seeds
        base = tuned(Options().results(TUNING), config.model, "ssvq-freeze")

    def unit(name: str, optimizer: OptimizerConfig, alpha: float, seed: int) -> Unit:
        quantizer = METHODS["ssvq"][BITS]
        assert isinstance(quantizer, ssvq.SignSplit)
        quantizer = dataclasses.replace(quantizer, alpha=alpha)
        told = {"model": network.model, "variant": name, "bits": BITS, "seed": seed}
        settings = {
            **told,
            "alpha": alpha,
            "quantizer": to_json(quantizer),
            "steps": network.steps,
            "batch_size": network.batch_size,
            "optimizer": dataclasses.asdict(optimizer),
        }

        def run() -> dict[str, Any]:
            row, done = run_method(
                network, quantizer, optimizer, seed,
                data_dir=config.data_dir, test=True, name=name, weights=weights,
            )  # fmt: skip
            kept = [r for r in done.records if r["step"] % _RECORD_EVERY == 0]
            curves = {key: [float(f"{r[key]:.3g}") for r in kept] for key in SIGN_FIGURES}
            return {**told, **row, "curves": {"step": [r["step"] for r in kept], **curves}}

        return Unit(f"{network.model} {name} seed {seed}", settings, run)

    return [
        unit(name, optimizer, alpha, seed)
        for seed in seeds
        for name, (optimizer, alpha) in variants(base).items()
        if not config.only or name in config.only
    ]


def tables(rows: Rows) -> dict[str, str]:
    """The table of the page, by the name of its marker; rows are compared with what they change."""
    names = list(dict.fromkeys([*FREEZING, *(r["variant"] for r in rows)]))
    cells = []
    for name in names:
        own = select(rows, variant=name)
        if own:
            base = LOW_NAME if name.startswith(LOW_PREFIX) else TUNED
            others = select(rows, variant=base) or select(rows, variant=TUNED)
            gap = differences(own, others, "accuracy_test") if name != TUNED else []
            cells.append(
                [
                    name,
                    *(percent(own, key) for key in ("flipped", "frozen")),
                    percent(own, "accuracy_validation"),
                    percent(own, "accuracy_test"),
                    signed(gap),
                    str(len(own)),
                ]
            )
    columns = ["variant", "flipped", "frozen", "validation", "test", "test, to its base", "runs"]
    return {"ablation_freezing table": markdown_table(columns, cells)}


def plot(rows: Rows, folder: Path) -> None:
    """Draws how many signs oscillate and are frozen over the run, of the first seed's rows."""
    figure, axes = new_figure()
    shown = (TUNED, "no freezing", "thresholds 0.05 to 0.01", "alpha 0.5", "alpha 2")
    first = min(row["seed"] for row in rows)
    for name in shown:
        for row in select(rows, variant=name, seed=first):
            steps, curves = row["curves"]["step"], row["curves"]
            percentages = [[100 * x for x in curves[key]] for key in ("oscillation", "frozen")]
            (line,) = axes.plot(steps, percentages[0], label=f"{name}: oscillating an update")
            axes.plot(steps, percentages[1], "--", color=line.get_color())
    axes.set(
        xlabel="update",
        ylabel="share of signs, % (dashed: frozen)",
        title="Oscillating and frozen signs",
    )
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0, top=1000)  # room for the names
    axes.legend(fontsize="small")
    figure.savefig(folder / f"{NAME}.png")


if __name__ == "__main__":
    conduct(NAME, units, tables, plot, tyro.cli(Config))
