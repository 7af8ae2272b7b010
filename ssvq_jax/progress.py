"""Progress bars for long work on the host."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def make_bar() -> Any:
    """A bar with the rate and other figures in a column of their own, and the time left.

    Returns:
        A ``rich.progress.Progress``, whose tasks carry a text ``figures``.
    """
    from rich import progress as bars  # here, since importing rich is slow
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe or log has no width: do not cut
        console = Console(width=120)
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=12),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[figures]}"),
        bars.TimeRemainingColumn(compact=True),
        console=console,
    )


def bar_over(items: Iterable[T], name: str) -> Iterator[T]:
    """Goes through items and shows how far it is, and the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import track

    shown = Console().is_terminal
    yield from track(items, description=name, transient=True, disable=not shown)
