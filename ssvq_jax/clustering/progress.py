"""The progress bar of a clustering that runs on a device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array, Float32, Int32

from ssvq_jax.progress import make_bar

# Callbacks come from the runtime's own threads and know nothing but numbers. One bar at a time.
_shown: list[Any] = []


@contextlib.contextmanager
def bar(total: int) -> Iterator[None]:
    """Shows iterations, their rate, the time left and the objective while the body runs.

    Args:
        total: iterations of all starts together.
    """
    with make_bar() as shown:
        task = shown.add_task("k-means", total=total, figures="compiling")
        _shown.append((shown, task))
        try:
            yield
            jax.effects_barrier()
            shown.update(task, total=shown.tasks[task].completed)  # after an early stop
        finally:
            _shown.pop()


def advance(done: Int32[Array, ""], objective: Float32[Array, ""]) -> None:
    """Tells the bar, from within a compiled loop, how far it is.

    Args:
        done: iterations made of all starts.
        objective: mean squared error per sub-vector.
    """
    jax.debug.callback(_advance, done, objective)


def _advance(done: Array, objective: Array) -> None:
    if _shown:
        shown, task = _shown[-1]
        rate = shown.tasks[task].speed
        figures = f"objective {float(objective):.4g}" + (f" {rate:.2g}/s" if rate else "")
        shown.update(task, completed=int(done), figures=figures)
