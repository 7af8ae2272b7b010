"""A whole compression: encode, fine-tune, finalize, evaluate."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key

from ssvq_jax.plan import Packed, Plan
from ssvq_jax.training.loop import fit
from ssvq_jax.training.optimizer import OptimizerConfig, make_optimizer
from ssvq_jax.training.step import (
    Batch,
    CompressionState,
    Evaluation,
    Forward,
    make_evaluate,
    make_state,
    make_train_step,
)
from ssvq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with data to train and to judge it on.

    Attributes:
        forward: the model, e.g. from `ssvq_jax.training.step.linen_forward`.
        train_batches: called with a seed; gives endless batches.
        eval_batches: called; gives one pass over the examples to judge by, with masks.
    """

    forward: Forward
    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """Outcome of `finetune`.

    Attributes:
        state: final training state.
        packed: the finalized model.
        before: quality right after encoding, of the finalized model.
        after: quality after fine-tuning, of the finalized model.
        records: metrics over the run; see `ssvq_jax.training.loop.fit`.
        seconds: wall time by part: ``encode``, ``train`` (compilation included), ``evaluate``.
    """

    state: CompressionState
    packed: Packed
    before: Evaluation
    after: Evaluation
    records: list[dict[str, Any]]
    seconds: dict[str, float]


def finetune(
    task: Task,
    plan: Plan,
    params: PyTree,
    *,
    key: Key[Array, ""],
    seed: int,
    steps: int,
    optimizer: OptimizerConfig,
    name: str,
    model_state: PyTree | None = None,
    metrics_file: Path | None = None,
) -> Finetuned:
    """Compresses a model by a plan and fine-tunes what the plan calls learned.

    The plan that compresses nothing trains the float model.

    Args:
        task: model and data.
        plan: made for ``params``.
        params: float parameters.
        key: typed PRNG key, for clustering and dropout.
        seed: of the order and augmentation of the training data.
        steps: updates; 0 compresses without training.
        optimizer: learning rates and freezing.
        name: label of the progress bar and the metrics.
        model_state: the model's other collections.
        metrics_file: JSON lines are appended to it.

    Returns:
        The finalized model and its history.
    """
    clock = _Clock()
    init_key, run_key = jax.random.split(key)
    variables = jax.block_until_ready(plan.init(init_key, params))
    clock.lap("encode")
    evaluate = make_evaluate(task.forward)
    before = evaluate(plan.finalize(variables).decode(), model_state or {}, task.eval_batches())
    clock.lap("evaluate")
    tx = make_optimizer(plan, max(steps, 1), optimizer)
    state = make_state(task.forward, variables, tx, run_key, model_state)
    step = make_train_step(plan)
    batches = task.train_batches(seed)
    state, records = fit(state, step, batches, steps, name=name, metrics_file=metrics_file)
    clock.lap("train")
    packed = plan.finalize(state.variables)
    after = evaluate(packed.decode(), state.model_state, task.eval_batches())
    clock.lap("evaluate")
    return Finetuned(state, packed, before, after, records, clock.seconds)


class _Clock:
    """Adds up wall time by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
