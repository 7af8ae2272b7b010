"""The parts of a run: beginning or resuming, training, judging, saving."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from ssvq_jax.plan import Plan
from ssvq_jax.training.average import check_decay, start_average
from ssvq_jax.training.batch_norm import reestimate_batch_norm
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.evaluation import Evaluation, make_evaluate
from ssvq_jax.training.layout import Layout, local_layout
from ssvq_jax.training.loop import fit
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.objective import Objective, Teacher, check_features, features_of
from ssvq_jax.training.step import Batch, CompressionState, Forward, make_train_step
from ssvq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with data to train and to judge it on.

    Attributes:
        forward: the model, e.g. from `ssvq_jax.training.step.linen_forward`.
        train_batches: called with a seed; gives endless batches. To be resumed, the iterator must
            have ``get_state`` and ``set_state``, as grain's have.
        eval_batches: called; gives one pass over the examples to judge by, with masks.
        objective: what training minimises.
        teacher: the model that the objective learns from, if it does.
    """

    forward: Forward
    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Iterable[Batch]]
    objective: Objective = dataclasses.field(default_factory=Objective)
    teacher: Teacher | None = None

    def check(self, params: PyTree, model_state: PyTree) -> None:
        """Raises ValueError if the objective cannot be evaluated; shapes of a model will do."""
        self.objective.check(self.teacher)
        if self.teacher is None or not self.objective.feature_weight:
            return
        batches = self.train_batches(0)
        images = next(batches)["image"]
        _close(batches)

        def features(
            forward: Forward, params: PyTree, state: PyTree, key: Any = None
        ) -> dict[str, Any]:
            return jax.eval_shape(
                lambda p, s, x, k: features_of(forward(p, s, x, k)[1]), params, state, images, key
            )

        check_features(
            features(self.forward, params, model_state or {}, jax.random.key(0)),
            features(*self.teacher),
        )


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run is carried out.

    Attributes:
        validate_every: steps between two validations on the evaluation data; each is saved, and
            the one with the least loss is kept as the best. None for none but the first and last.
        batch_norm_batches: training batches over which batch statistics are re-estimated before
            each evaluation; 0 keeps the running averages.
        average_decay: of the moving averages of the weights, by which the run is then judged and
            finalized, e.g. 0.999: an average over the last thousand updates; 0 for none. See
            `ssvq_jax.training.average`.
        remat: decode the weights again in the backward pass: less memory, more time; see
            `ssvq_jax.training.step.make_train_step`.
        layout: devices; by default all local ones.
    """

    validate_every: int | None = None
    batch_norm_batches: int = 0
    average_decay: int | float = 0.0
    remat: bool = False
    layout: Layout | None = None

    def check(self) -> None:
        """Raises ValueError for numbers out of range."""
        if self.validate_every is not None and self.validate_every < 1:
            raise ValueError(f"validate_every={self.validate_every}: give at least 1, or nothing")
        if self.batch_norm_batches < 0:
            raise ValueError(f"batch_norm_batches={self.batch_norm_batches}: give at least 0")
        check_decay(self.average_decay)


class Run:
    """What the parts of a run share. Its notes go into the checkpoints."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        name: str,
        seed: int,
        options: RunOptions,
        checkpoints: Checkpoints | None,
        metrics: MetricsFile | None,
        asked: dict[str, Any],
    ) -> None:
        self.task, self.plan, self.name, self.seed = task, plan, name, seed
        self.options, self.checkpoints, self.metrics = options, checkpoints, metrics
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
        if self.metrics is not None:
            expected = self.notes.get("records", 0)
            self.metrics.check(self.name, int(restored.state.step), expected)
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
        self, state: CompressionState, steps: int
    ) -> tuple[CompressionState, list[dict[str, Any]]]:
        """Runs the training loop."""
        step = make_train_step(
            self.plan,
            layout=self.layout,
            remat=self.options.remat,
            objective=self.task.objective,
            teacher=self.task.teacher,
            average_decay=self.options.average_decay,
        )
        return fit(
            state,
            step,
            self.batches,
            steps,
            name=self.name,
            metrics=self.metrics,
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
        # What was judged is what the run came to.
        state = state.averaged.replace(model_state=model_state)
        if state.average is not None:
            state = state.replace(average=start_average(state.params, model_state))
        self.keep(state, steps, loss=after.loss, force=True)
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return state

    def judge(self, state: CompressionState) -> tuple[Evaluation, PyTree]:
        """Evaluates the finalized model; returns the batch statistics it was done with, too."""
        state = state.averaged
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
        if self.metrics is not None:
            self.notes["records"] = self.metrics.count(self.name, step)
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
