"""``ssvq train``: a float model on your own data."""

import dataclasses
from pathlib import Path

from ssvq_jax.cli.options import ModelOptions, TrainingOptions, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainingOptions, ModelOptions):
    """Train a float model, to be compressed afterwards.

    Stop it whenever you like: the same command goes on where it was, and ends with the same bits.
    """

    steps: int = 10_000
    """Batches to train on."""
    weights: Path | None = None
    """Weights to begin with: a run's folder, an orbax checkpoint or a msgpack file. By default
    those that the model comes with, else random ones."""
    learning_rate: float = 1e-3
    """Highest rate of AdamW; it rises linearly, then falls with a cosine."""
    weight_decay: float = 0.05
    """Of AdamW."""
    warmup_share: float = 0.05
    """Share of the run in which the rate rises."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    accumulate: int = 1
    """Batches an update."""

    def run(self) -> None:
        """Trains, and writes everything."""
        import jax

        from ssvq_jax.cli.session import carry_out
        from ssvq_jax.cli.setup import (
            Weights,
            checksum,
            open_images,
            open_model,
            open_weights,
            run_config,
        )
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome
        from ssvq_jax.training.optimizer import OptimizerConfig

        command = self.inherit(run_config(self.weights))
        command.check()
        command.check_training(command.steps)
        size = open_model(command, None).image_size
        images = open_images(command, size, command.augment)
        model = open_model(command, images.source.num_classes(images.train))
        shape = images.source.image_shape(images.train)
        if command.weights is None and model.variables is None:
            others = dict(model.init(jax.random.split(jax.random.key(command.seed))[0], shape))
            params = others.pop("params")
            origin = {"from": f"seed {command.seed}", "crc32": checksum((params, others))}
            weights = Weights(params, others, None, None, origin)
        else:
            weights = open_weights(command.weights, model, shape)
        if weights.plan is not None:
            raise ValueError(f"{command.weights} is compressed: go on with `ssvq finetune`")
        config = to_json(command, "train", weights=weights.origin)
        results = carry_out(
            command,
            config,
            model,
            images,
            weights,
            make_plan(weights.params, [(".*", None)]),
            steps=command.steps,
            batch_size=command.batch_size,
            seed=command.seed,
            optimizer=OptimizerConfig(
                dense=command.learning_rate,
                weight_decay=command.weight_decay,
                warmup_share=command.warmup_share,
                clip_norm=command.clip_norm,
                accumulate=command.accumulate,
                freeze=None,
            ),
            label="float",
        )
        print_outcome("float32", results)
        print(f"results, pictures and checkpoints are in {command.out}")
