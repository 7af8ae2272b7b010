"""The training loop: progress bar on the terminal, metrics as JSON lines."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssvq_jax.training.step import Batch, CompressionState, TrainStep


def fit(
    state: CompressionState,
    step: TrainStep,
    batches: Iterator[Batch],
    steps: int,
    *,
    name: str,
    metrics_file: Path | None = None,
    log_every: int = 10,
) -> tuple[CompressionState, list[dict[str, Any]]]:
    """Trains for a number of updates.

    Args:
        state: where to begin; its buffers are donated.
        step: from `make_train_step`.
        batches: endless iterator of batches.
        steps: number of updates.
        name: label of the progress bar and of the metrics.
        metrics_file: JSON lines are appended to it.
        log_every: updates between two records; metrics are only fetched then, so that the device
            does not wait for the host in between.

    Returns:
        The final state and the records: ``step``, ``loss``, ``accuracy``, ``steps_per_second`` and
        the step's other scalars.

    Raises:
        ValueError: if the loss is no longer finite.
    """
    records: list[dict[str, Any]] = []
    progress = _progress()
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress)
        file = stack.enter_context(metrics_file.open("a")) if metrics_file else None
        task = progress.add_task(name, total=steps, figures="compiling")
        last_time, last_step = time.perf_counter(), 0
        for done in range(1, steps + 1):
            state, metrics = step(state, next(batches))
            if done % log_every and done != steps:
                progress.update(task, completed=done)
                continue
            figures = {key: float(value) for key, value in metrics.items()}
            if not figures["loss"] < float("inf"):
                raise ValueError(
                    f"{name}: the loss is {figures['loss']} at step {done}: use lower learning "
                    "rates or a smaller clip_norm"
                )
            now = time.perf_counter()
            rate = (done - last_step) / (now - last_time)
            last_time, last_step = now, done
            records.append({"run": name, "step": done, **figures, "steps_per_second": rate})
            if file is not None:
                file.write(json.dumps(records[-1]) + "\n")
                file.flush()
            progress.update(task, completed=done, figures=_readable(records[-1]))
    return state, records


def _progress() -> Any:
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


def _readable(record: dict[str, Any]) -> str:
    parts = [f"{record['steps_per_second']:.0f}/s", f"loss {record['loss']:.3f}"]
    parts += [
        f"{key} {100 * record[key]:.1f}%"
        for key in ("accuracy", "flipped", "frozen")
        if key in record
    ]
    return " ".join(parts)
