"""A whole compression: encode, fine-tune, finalize, evaluate; resumed where it stopped."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Key

from ssvq_jax.plan import Packed, Plan
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.evaluation import Evaluation
from ssvq_jax.training.identity import checksum
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.optimizer import OptimizerConfig, make_optimizer
from ssvq_jax.training.run import Run, RunOptions, Task
from ssvq_jax.training.step import CompressionState, make_state
from ssvq_jax.tree import PyTree, Variables


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
            ``resume`` after a stop; what a stop lost and was done again is not counted twice.
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
        ValueError: for options out of range, an objective that lacks its teacher or features, a
            batch size that the devices do not divide, or a checkpoint of a run with other weights,
            plan, steps, objective, optimizer, seed or key.
        OSError: if a checkpoint cannot be written.
    """
    options = options or RunOptions()
    options.check()
    task.check(params, model_state)
    tx = make_optimizer(plan, steps, optimizer)
    asked = {
        "steps": steps,
        "seed": seed,
        "batch_norm_batches": options.batch_norm_batches,
        "average_decay": options.average_decay,
        "objective": dataclasses.asdict(task.objective),
        "teacher": task.teacher and checksum((task.teacher.params, task.teacher.model_state)),
        "optimizer": dataclasses.asdict(optimizer),
        "key": jax.random.key_data(key).tolist(),
        "weights": checksum((params if variables is None else variables, model_state)),
    }
    run = Run(task, plan, name, seed, options, checkpoints, metrics, asked)
    run_key = jax.random.split(key)[1]

    def begin(params: PyTree, variables: PyTree, model_state: PyTree) -> CompressionState:
        encoded = (
            plan.init(encoding_key(key), params, progress=True) if variables is None else variables
        )
        average = options.average_decay > 0
        return make_state(task.forward, encoded, tx, run_key, model_state, average=average)

    start = params, variables, model_state
    if checkpoints is not None and checkpoints.last is not None:
        state = run.resume(checkpoints, jax.eval_shape(begin, *start))
    else:
        state = run.begin(begin(*start), steps)
    if "after" in run.notes:
        records = metrics.resume(name, steps) if metrics else []
    else:
        state, records = run.train(state, steps)
        state = run.finish(state, steps)
    packed = plan.finalize(state.variables)
    before, after = (Evaluation(**run.notes[when]) for when in ("before", "after"))
    return Finetuned(state, packed, before, after, records, run.notes["seconds"])


def encoding_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key that `finetune` encodes the weights with."""
    return jax.random.split(key)[0]
