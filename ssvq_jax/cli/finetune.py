"""``ssvq finetune``: compress a trained model and train what the method learns."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ssvq_jax.cli.options import ModelOptions, TrainingOptions, to_json
from ssvq_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneCommand(TrainingOptions, ModelOptions):
    """Fine-tune a compressed model: codebooks, signs, steps and what stays dense.

    Begins with a run of `ssvq compress`, or compresses float weights first by --recipe. Stop it
    whenever you like: the same command goes on where it was, and ends with the same bits.
    """

    weights: Path | None = None
    """A run of compress, train or finetune, an orbax checkpoint or a msgpack file; by default the
    weights that the model comes with. Model and data are those of the run."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_FILE")] = None
    """Preset (ssvq-21x, vq-21x, uniform-8bit, ...) or JSON file; by default that of the run."""
    steps: int = 2_000
    """Batches to train on."""
    freezing: bool = True
    """Freeze signs that oscillate; --no-freezing lets all flip to the end."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.AvoidSubcommands] = dataclasses.field(
        default_factory=OptimizerConfig
    )
    """Learning rates and freezing."""

    def run(self) -> None:
        """Fine-tunes, and writes everything."""
        from ssvq_jax.cli.session import carry_out
        from ssvq_jax.cli.setup import open_images, open_model, open_plan, open_weights, run_config
        from ssvq_jax.report import print_outcome

        command = self.inherit(run_config(self.weights))
        command.check()
        command.check_training(command.steps)
        optimizer = command.optimizer
        if not command.freezing:
            optimizer = dataclasses.replace(optimizer, freeze=None)
        images = open_images(command, open_model(command, None).image_size, command.augment)
        model = open_model(command, images.source.num_classes(images.train))
        weights = open_weights(command.weights, model, images.source.image_shape(images.train))
        plan = open_plan(command.recipe, weights)
        config = to_json(
            command,
            "finetune",
            weights=weights.origin,
            recipe=plan.to_json()["recipe"],
            optimizer=dataclasses.asdict(optimizer),
        )
        results = carry_out(
            command,
            config,
            model,
            images,
            weights,
            plan,
            steps=command.steps,
            batch_size=command.batch_size,
            seed=command.seed,
            optimizer=optimizer,
            label="finetune",
        )
        print_outcome("fine-tuned", results)
        print(f"results, pictures and checkpoints are in {command.out}")
