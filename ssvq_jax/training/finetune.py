"""A whole compression: encode, fine-tune, finalize, evaluate; resumed where it stopped."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jaxtyping import Array, Key

from ssvq_jax.plan import Packed, Plan
from ssvq_jax.training.batch_norm import reestimate_batch_norm
from ssvq_jax.training.checkpoint import Checkpoints, checksum
from ssvq_jax.training.layout import Layout, local_layout
from ssvq_jax.training.loop import fit
from ssvq_jax.training.metrics import MetricsFile
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
from ssvq_jax.tree import PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with data to train and to judge it on.

    Attributes:
        forward: the model, e.g. from `ssvq_jax.training.step.linen_forward`.
        train_batches: called with a seed; gives endless batches. To be resumed, the iterator must
            have ``get_state`` and ``set_state``, as grain's have.
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
        seconds: wall time by part: ``encode``, ``train`` (compilation included), ``evaluate``, and
            ``resume`` after a stop; of all sittings, but for work that was done again.
    """

    state: CompressionState
    packed: Packed
    before: Evaluation
    after: Evaluation
    records: list[dict[str, Any]]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run is carried out.

    Attributes:
        validate_every: steps between two validations on the evaluation data; each is saved, and
            the one with the least loss is kept as the best. None for none but the first and last.
        batch_norm_batches: training batches over which batch statistics are re-estimated before
            each evaluation; 0 keeps the running averages.
        remat: decode the weights again in the backward pass: less memory, more time; see
            `ssvq_jax.training.step.make_train_step`.
        layout: devices; by default all local ones.
    """

    validate_every: int | None = None
    batch_norm_batches: int = 0
    remat: bool = False
    layout: Layout | None = None

    def check(self) -> None:
        """Raises ValueError for numbers out of range."""
        if self.validate_every is not None and self.validate_every < 1:
            raise ValueError(f"validate_every={self.validate_every}: give at least 1, or nothing")
        if self.batch_norm_batches < 0:
            raise ValueError(f"batch_norm_batches={self.batch_norm_batches}: give at least 0")


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
    variables: Variables | None = None,
    metrics: MetricsFile | None = None,
    checkpoints: Checkpoints | None = None,
    options: RunOptions | None = None,
) -> Finetuned:
    """Compresses a model by a plan and fine-tunes what the plan calls learned.

    The plan that compresses nothing trains the float model. With ``checkpoints``, a run that was
    stopped goes on where the last checkpoint was written, and gives the same arrays to the bit as
    one that was not; a finished one is read back.

    Args:
        task: model and data.
        plan: made for ``params``.
        params: float parameters; shapes will do where ``variables`` are given.
        key: typed PRNG key, for clustering and dropout.
        seed: of the order and augmentation of the training data.
        steps: batches to train on; 0 compresses without training.
        optimizer: learning rates and freezing.
        name: label of the progress bar and the metrics.
        model_state: the model's other collections.
        variables: an encoding to begin with, of this plan; by default the parameters are encoded.
        metrics: file of records.
        checkpoints: where the run is saved, and found again.
        options: validation, batch statistics, memory, devices.

    Returns:
        The finalized model and its history.

    Raises:
        ValueError: for options out of range, a batch size that the devices do not divide, or a
            checkpoint of a run with other weights, plan, steps, optimizer, seed or key.
        OSError: if a checkpoint cannot be written.
    """
    options = options or RunOptions()
    options.check()
    tx = make_optimizer(plan, steps, optimizer)
    asked = {
        "steps": steps,
        "seed": seed,
        "batch_norm_batches": options.batch_norm_batches,
        "optimizer": dataclasses.asdict(optimizer),
        "key": jax.random.key_data(key).tolist(),
        "weights": checksum((params if variables is None else variables, model_state)),
    }
    run = _Run(task, plan, name, seed, options, checkpoints, asked)
    run_key = jax.random.split(key)[1]

    def begin(params: PyTree, variables: PyTree, model_state: PyTree) -> CompressionState:
        encoded = plan.init(encoding_key(key), params) if variables is None else variables
        return make_state(task.forward, encoded, tx, run_key, model_state)

    start = params, variables, model_state
    if checkpoints is not None and checkpoints.last is not None:
        state = run.resume(checkpoints, jax.eval_shape(begin, *start))
    else:
        state = run.begin(begin(*start), steps)
    if "after" in run.notes:
        records = metrics.resume(name, steps) if metrics else []
    else:
        state, records = run.train(state, steps, metrics)
        state = run.finish(state, steps)
    packed = plan.finalize(state.variables)
    before, after = (Evaluation(**run.notes[when]) for when in ("before", "after"))
    return Finetuned(state, packed, before, after, records, run.notes["seconds"])


def encoding_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key that `finetune` encodes the weights with."""
    return jax.random.split(key)[0]


class _Run:
    """What the parts of a run share. Its notes go into the checkpoints."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        name: str,
        seed: int,
        options: RunOptions,
        checkpoints: Checkpoints | None,
        asked: dict[str, Any],
    ) -> None:
        self.task, self.plan, self.name, self.seed = task, plan, name, seed
        self.options, self.checkpoints = options, checkpoints
        self.layout = options.layout or local_layout()
        self.batches: Any = task.train_batches(seed)
        if checkpoints is not None and not hasattr(self.batches, "set_state"):
            raise ValueError(
                "train_batches gives an iterator without get_state and set_state, so that it "
                "cannot be resumed: use ssvq_jax.data.train_batches or another grain iterator"
            )
        if self.layout.devices > 1:
            first = self._other_batches()
            self.layout.check_batch(len(next(first)["label"]))
            _close(first)
        self.evaluate = make_evaluate(task.forward, self.layout)
        self.notes: dict[str, Any] = {"asked": asked, "seconds": {}}
        self._last = time.perf_counter()

    def resume(self, checkpoints: Checkpoints, shapes: CompressionState) -> CompressionState:
        """Reads the last checkpoint."""
        checkpoints.check_asked(self.notes["asked"])
        restored = checkpoints.restore(self.layout.shapes(shapes), self.plan)
        self.notes = restored.notes
        self.batches.set_state(restored.data)
        self._lap("resume")
        return restored.state

    def begin(self, state: CompressionState, steps: int) -> CompressionState:
        """Judges what came of the encoding, and saves it."""
        state = self.layout.place(jax.block_until_ready(state))
        self._lap("encode")
        self.notes["before"] = self.judge(state)[0]._asdict()
        self._lap("evaluate")
        if steps:
            self.keep(state, 0, loss=None, force=True)
        return state

    def train(
        self, state: CompressionState, steps: int, metrics: MetricsFile | None
    ) -> tuple[CompressionState, list[dict[str, Any]]]:
        """Runs the training loop."""
        step = make_train_step(self.plan, layout=self.layout, remat=self.options.remat)
        return fit(
            state,
            step,
            self.batches,
            steps,
            name=self.name,
            metrics=metrics,
            validate=self.validate,
            validate_every=self.options.validate_every,
            keep=self.keep,
        )

    def finish(self, state: CompressionState, steps: int) -> CompressionState:
        """Judges the finalized model, and saves it with the verdict."""
        jax.block_until_ready(state)
        self._lap("train")
        after, model_state = self.judge(state)
        self.notes["after"] = after._asdict()
        self._lap("evaluate")
        state = state.replace(model_state=model_state)
        self.keep(state, steps, loss=after.loss, force=True)
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return state

    def judge(self, state: CompressionState) -> tuple[Evaluation, PyTree]:
        """Evaluates the finalized model; returns the batch statistics it was done with, too."""
        params = self.plan.finalize(state.variables).decode()
        model_state = state.model_state
        count = self.options.batch_norm_batches
        if count:
            batches = self._other_batches()
            model_state = reestimate_batch_norm(
                self.task.forward, params, model_state, batches, count, state.key, self.layout
            )
            _close(batches)
        return self.evaluate(params, model_state, self.task.eval_batches()), model_state

    def _other_batches(self) -> Iterator[Batch]:
        """Training batches from the first on, apart from those of the loop."""
        return self.task.train_batches(self.seed)

    def validate(self, state: CompressionState) -> dict[str, float]:
        """Judges a state in the middle of the run."""
        self._lap("train")
        found, _ = self.judge(state)
        self._lap("evaluate")
        return {"validation_loss": found.loss, "validation_accuracy": found.accuracy}

    def keep(self, state: CompressionState, step: int, *, loss: float | None, force: bool) -> None:
        """Saves the state if it is time to."""
        if self.checkpoints is None or not (force or self.checkpoints.due(step)):
            return
        self._lap("train")
        data = self.batches.get_state()
        self.checkpoints.save(step, state, self.plan, data=data, notes=self.notes, loss=loss)

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        seconds = self.notes["seconds"]
        seconds[part] = seconds.get(part, 0.0) + now - self._last
        self._last = now


def _close(batches: Any) -> None:
    """Ends what prepares batches in the background, where the iterator knows how to."""
    if hasattr(batches, "close"):
        batches.close()
