"""The progress bar of a clustering that runs on a device."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

T = TypeVar("T")

# Callbacks come from the runtime's own threads and know nothing but numbers. One bar at a time.
_shown: list[Any] = []


@contextlib.contextmanager
def bar(total: int) -> Iterator[None]:
    """Shows iterations, their rate, the time left and the objective while the body runs.

    Args:
        total: iterations of all starts together.
    """
    from rich import progress as bars  # here, since importing rich is slow

    with bars.Progress(
        bars.TextColumn("k-means"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[figures]}"),
        bars.TimeRemainingColumn(compact=True),
    ) as shown:
        task = shown.add_task("k-means", total=total, figures="compiling")
        _shown.append((shown, task))
        try:
            yield
            jax.effects_barrier()
        finally:
            _shown.pop()


def bar_over(items: Sequence[T], name: str) -> Iterator[T]:
    """Goes through items and shows how far it is, and the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import track

    shown = Console().is_terminal
    yield from track(items, description=name, transient=True, disable=not shown)


def advance(
    first: Int32[Array, ""],
    scale: Float32[Array, ""],
    done: Int32[Array, ""],
    objective: Float32[Array, ""],
) -> None:
    """Tells the bar, from within a compiled loop, how far it is.

    Args:
        first: iterations of earlier starts.
        scale: what the points were multiplied with.
        done: iterations made of this start.
        objective: mean squared error per scaled sub-vector.
    """
    jax.debug.callback(_advance, first + done, objective / jnp.square(scale))


def _advance(done: Array, objective: Array) -> None:
    if _shown:
        shown, task = _shown[-1]
        rate = shown.tasks[task].speed
        figures = f"objective {float(objective):.4g}" + (f" {rate:.2g}/s" if rate else "")
        shown.update(task, completed=int(done), figures=figures)
