"""One run of a training command: carried out, written down, shown."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.packed import PACKED, write_packed
from ssvq_jax.cli.run_folder import RunFolder
from ssvq_jax.cli.setup import Setup

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.finetune_language import LanguageSetup
    from ssvq_jax.cli.weights import Weights
    from ssvq_jax.plan import Plan
    from ssvq_jax.training.finetune import Finetuned
    from ssvq_jax.training.layout import Layout
    from ssvq_jax.training.optimizer import OptimizerConfig
    from ssvq_jax.training.run import Task

RUN = "model"  # name of a folder's only run


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a run learns from a teacher, in the terms of `ssvq_jax.training.objective.Objective`.

    Attributes:
        share: of the loss, of the teacher's logits.
        temperature: of both distributions.
        features: pattern of modules whose outputs are compared.
        feature_weight: of these in the loss.
        teacher: its weights.
    """

    share: float = 0.0
    temperature: float = 1.0
    features: str | None = None
    feature_weight: float = 1.0
    teacher: "Weights | None" = None


def carry_out(
    setup: "Setup[Any] | LanguageSetup",
    config: Mapping[str, Any],
    plan: "Plan",
    *,
    steps: int,
    optimizer: "OptimizerConfig",
    label: str,
    distillation: Distillation | None = None,
) -> dict[str, Any]:
    """Trains from where the folder's checkpoints are, and writes the results.

    Args:
        setup: of a command with `ssvq_jax.cli.options.TrainingOptions`.
        config: what the run was asked for, kept in its folder.
        plan: what is compressed.
        steps: batches to train on.
        optimizer: rates and freezing.
        label: name of the run in its metrics and pictures.
        distillation: what is learned from a teacher, if anything is.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: for options out of range, or a checkpoint of another run.
    """
    import jax

    from ssvq_jax.report import plot_accuracy, plot_signs, provenance
    from ssvq_jax.training.finetune import finetune
    from ssvq_jax.training.layout import local_layout
    from ssvq_jax.training.optimizer import make_optimizer
    from ssvq_jax.training.run import RunOptions

    options: Any = setup.options  # filled in
    weights = setup.weights
    layout = local_layout(options.devices, shard_state=options.shard_state)
    layout.check_batch(setup.batch_size)
    task = _learning_task(setup, layout.devices, distillation or Distillation())
    if options.remat and not plan.entries and not setup.blocks:
        raise ValueError(
            f"remat: model '{options.model}' has no blocks that are known here, and no weights "
            "are decoded: use flax.linen.remat in the model"
        )
    run_options = RunOptions(
        validate_every=options.validate_every or max(steps // 10, 1),
        batch_norm_batches=setup.batch_norm_batches,
        average_decay=options.average_decay,
        remat=options.remat,
        layout=layout,
    )
    # What these refuse, they refuse before there is a folder.
    make_optimizer(plan, steps, optimizer)
    run_options.check()
    task.check(weights.params, weights.model_state)
    if isinstance(setup, Setup):
        setup.model.check_training(setup.image_shape)
    task.train_batches(setup.seed)
    task.eval_batches()
    folder = RunFolder(options.out, config, resume=options.resume)
    with folder.checkpoints(RUN, options.save_seconds) as checkpoints:
        if checkpoints.last == steps:
            print(f"{folder.path} is finished: reading it back")
        elif checkpoints.last:
            print(f"resuming {folder.path} at step {checkpoints.last} of {steps}")
        done = finetune(
            task,
            plan,
            weights.params,
            key=jax.random.key(setup.seed),
            seed=setup.seed,
            steps=steps,
            optimizer=optimizer,
            name=label,
            model_state=weights.model_state,
            variables=weights.variables,
            metrics=folder.metrics,
            checkpoints=checkpoints,
            options=run_options,
        )
        best = checkpoints.best
    results = {
        "config": folder.config,
        **provenance(),
        **setup.splits,
        "steps": steps,
        "optimizer": dataclasses.asdict(optimizer),
        "objective": dataclasses.asdict(task.objective),
        "before": done.before._asdict(),
        **summary(plan, done),
        **pack(setup, folder, done),
        "best_step": best,
    }
    folder.write("plan.json", plan.to_json())
    folder.write("results.json", results)
    histories = {label: done.records}
    plot_accuracy(histories, folder.path / "accuracy.png")
    if plan.entries:
        plot_signs(histories, folder.path / "signs.png")
    return results


def _learning_task(
    setup: "Setup[Any] | LanguageSetup", devices: int, distillation: Distillation
) -> "Task":
    """The model with its data, and what it is to learn from them and from a teacher."""
    from ssvq_jax.training.objective import Objective, Teacher

    options: Any = setup.options
    features, source = distillation.features, distillation.teacher
    task = setup.task(devices, remat=options.remat, features=features)
    teacher = source and Teacher(task.forward, source.params, source.model_state)
    objective = Objective(
        label_smoothing=options.label_smoothing,
        distill=distillation.share,
        temperature=distillation.temperature,
        feature_weight=0.0 if features is None else distillation.feature_weight,
    )
    return dataclasses.replace(task, objective=objective, teacher=teacher)


def pack(
    setup: "Setup[Any] | LanguageSetup", folder: RunFolder, done: "Finetuned"
) -> dict[str, Any]:
    """Writes what a run came to as a packed file; gives the size of that."""
    told = {"split": setup.splits["eval_split"], **done.after._asdict()}
    state, config = done.state.model_state, folder.config | setup.told
    try:
        return write_packed(folder.path / PACKED, done.packed, state, config, told)
    except ValueError as error:  # of weights that are no numbers: the run's results say how bad
        print(f"no packed file: {error}")
        return {"not_packed": str(error)}


def judged_state(setup: Setup[Any], task: "Task", params: Any, layout: "Layout") -> Any:
    """A model's other collections as its run judged it: with batch statistics of these weights."""
    import jax

    from ssvq_jax.training.batch_norm import reestimate_batch_norm

    state = setup.weights.model_state
    if not setup.batch_norm_batches:
        return state
    key = jax.random.split(jax.random.key(setup.seed))[1]
    batches = task.train_batches(setup.seed)
    count = setup.batch_norm_batches
    return reestimate_batch_norm(task.forward, params, state, batches, count, key, layout)


def summary(plan: "Plan", done: "Finetuned") -> dict[str, Any]:
    """Figures of a finished run."""
    last = done.records[-1] if done.records else {}
    return {
        **sizes(plan),
        "after": done.after._asdict(),
        "signs": {key: last[key] for key in ("flipped", "frozen") if key in last},
        "seconds": sum(done.seconds.values()),
        "seconds_by_part": done.seconds,
    }


def sizes(plan: "Plan") -> dict[str, Any]:
    """What a plan stores, without the header of a file."""
    bits = plan.bits()
    figures: dict[str, Any] = {"stored_bytes": bits.stored_bytes}
    if plan.entries:
        figures["bits_per_weight"] = bits.main.bits_per_weight
        figures["compression_ratio"] = bits.main.compression_ratio
    return figures
