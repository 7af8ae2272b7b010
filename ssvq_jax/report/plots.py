"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]


def plot_accuracy(runs: Mapping[str, Records], file: Path) -> None:
    """Draws training accuracy over updates, a line a run.

    Args:
        runs: records of `ssvq_jax.training.loop.fit` by run name.
        file: where to write the picture; the ending decides the format.
    """
    figure, axes = new_figure()
    for name, records in runs.items():
        axes.plot([r["step"] for r in records], _smooth(records, "accuracy"), label=name)
    axes.set(xlabel="update", ylabel="training accuracy, running mean", title="Fine-tuning")
    axes.legend(fontsize="small")
    figure.savefig(file)


def plot_signs(runs: Mapping[str, Records], file: Path) -> None:
    """Draws the shares of signs flipped and frozen over updates, for the runs that have signs.

    Args:
        runs: records by run name.
        file: where to write the picture.
    """
    figure, axes = new_figure()
    for name, records in runs.items():
        if not records or "flipped" not in records[0]:
            continue
        steps = [r["step"] for r in records]
        (line,) = axes.plot(steps, [100 * r["flipped"] for r in records], label=f"{name} flipped")
        frozen = [100 * r["frozen"] for r in records]
        axes.plot(steps, frozen, "--", color=line.get_color(), label=f"{name} frozen")
    axes.set(
        xlabel="update", ylabel="share of signs, %", title="Signs flipped at least once, frozen"
    )
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(file)


def plot_tradeoff(results: Mapping[str, Any], file: Path) -> None:
    """Draws test accuracy against bits per weight, with standard errors.

    Args:
        results: the content of ``results.json``.
        file: where to write the picture.
    """
    figure, axes = new_figure()
    base = results["float"]
    axes.axhline(100 * base["accuracy"], color="grey", linestyle=":", label="float32")
    for name, row in results["methods"].items():
        point = row["bits_per_weight"], 100 * row["accuracy_after"]
        axes.errorbar(*point, yerr=100 * row["standard_error"], fmt="o", capsize=3, label=name)
    axes.set(
        xscale="log",
        xlabel="stored bits per weight of the compressed leaves",
        ylabel="test accuracy, % (± standard error)",
        title="What the bits buy",
    )
    axes.legend(fontsize="small")
    figure.savefig(file)


def new_figure() -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    return figure, figure.subplots()


def _smooth(records: Records, key: str, share: float = 0.2) -> list[float]:
    """Exponential running mean; a record sees one batch and is noisy."""
    values: list[float] = []
    for record in records:
        last = values[-1] if values else record[key]
        values.append((1 - share) * last + share * record[key])
    return values
