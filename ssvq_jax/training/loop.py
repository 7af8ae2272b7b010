"""The training loop: a progress bar, metrics as JSON lines, stops that lose nothing."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from ssvq_jax.progress import make_bar
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.step import Batch, CompressionState, TrainStep


@runtime_checkable
class Keeper(Protocol):
    """Saves a state; called after every record, and before the loop ends early."""

    def __call__(
        self, state: CompressionState, step: int, *, loss: float | None, force: bool
    ) -> None:
        """Saves if it is time to, or if forced; ``loss`` is on validation data, if just judged."""
        ...


def fit(
    state: CompressionState,
    step: TrainStep,
    batches: Iterator[Batch],
    steps: int,
    *,
    name: str,
    metrics: MetricsFile | None = None,
    validate: Callable[[CompressionState], dict[str, float]] | None = None,
    validate_every: int | None = None,
    keep: Keeper | None = None,
    log_every: int = 10,
) -> tuple[CompressionState, list[dict[str, Any]]]:
    """Trains up to a number of steps.

    Args:
        state: where to begin, at its ``step``; its buffers are donated.
        step: from `make_train_step`.
        batches: endless iterator of batches, at the state's step.
        steps: steps at the end of the run, those before ``state`` counted.
        name: label of the progress bar and of the metrics.
        metrics: file of records; those of a state's future are dropped from it.
        validate: judges a state on validation data; its figures, a ``validation_loss`` among them,
            go into the record.
        validate_every: steps between two validations; None for never. The last step is left to the
            caller, who judges the finished model anyway.
        keep: saves the state after a record; forced after a validation, and on Ctrl-C or a
            termination signal, which end the loop after the step in progress (unless it is the
            last).
        log_every: steps between two records; metrics are only fetched then, so that the device
            does not wait for the host in between.

    Returns:
        The final state and the records: ``step``, ``loss``, ``accuracy``, ``steps_per_second``,
        the step's other scalars, and what ``validate`` gave.

    Raises:
        ValueError: if the loss is no longer finite.
        KeyboardInterrupt: after a signal, the state being saved.
    """
    start = int(state.step)
    records = metrics.resume(name, start) if metrics else []
    progress = make_bar()
    with progress, _signals() as stopped:
        task = progress.add_task(name, total=steps, completed=start, figures="compiling")
        last_time, last_step = time.perf_counter(), start
        for done in range(start + 1, steps + 1):
            state, scalars = step(state, next(batches))
            judged = bool(validate_every) and done % validate_every == 0 and done < steps
            if not (done % log_every == 0 or done == steps or judged):
                progress.update(task, completed=done)
                if stopped:  # without a record, which a run that is not stopped would not have
                    if keep is not None:
                        keep(state, done, loss=None, force=True)
                    raise KeyboardInterrupt
                continue
            figures = {key: float(value) for key, value in scalars.items()}
            if not figures["loss"] < float("inf"):
                raise ValueError(
                    f"{name}: the loss is {figures['loss']} at step {done}: use lower learning "
                    "rates or a smaller clip_norm"
                )
            now = time.perf_counter()
            figures["steps_per_second"] = (done - last_step) / (now - last_time)
            last_time, last_step = now, done
            if judged and validate is not None:
                figures |= validate(state)
            records.append({"run": name, "step": done, **figures})
            if metrics is not None:
                metrics.append(records[-1])
            progress.update(task, completed=done, figures=_readable(records[-1]))
            if done == steps:
                break
            stop = bool(stopped)  # read once: a signal from here on ends the next step
            if keep is not None:
                loss = figures.get("validation_loss")
                keep(state, done, loss=loss, force=judged or stop)
            if stop:
                raise KeyboardInterrupt
    return state, records


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and termination signals; a second one takes its usual course."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, usual[number])

    try:
        for number in usual:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _readable(record: dict[str, Any]) -> str:
    rate = record["steps_per_second"]
    parts = [f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s", f"loss {record['loss']:.3f}"]
    parts += [
        f"{key} {100 * record[key]:.1f}%"
        for key in ("accuracy", "flipped", "frozen")
        if key in record
    ]
    return " ".join(parts)
