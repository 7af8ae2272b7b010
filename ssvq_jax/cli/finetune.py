"""``ssvq finetune``: compress a trained model and train what the method learns."""

import dataclasses
from typing import Annotated

import tyro

from ssvq_jax.cli.options import ModelOptions, TrainingOptions
from ssvq_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneCommand(TrainingOptions, ModelOptions):
    """Fine-tune a compressed model: codebooks, signs, steps and what stays dense.

    Begins with a run of `ssvq compress`, or compresses float weights by --recipe first. Stop it
    whenever you like: the same command goes on where it was, and ends with the same bits.
    """

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
        from ssvq_jax.cli.setup import set_up
        from ssvq_jax.cli.weights import open_plan
        from ssvq_jax.report import print_outcome

        self.check_training(self.steps)
        optimizer = self.optimizer
        if not self.freezing:
            optimizer = dataclasses.replace(optimizer, freeze=None)
        setup = set_up(self, augment=self.augment)
        command, weights = setup.options, setup.weights
        plan = open_plan(command.recipe, weights)
        config = setup.config(
            "finetune",
            recipe=plan.to_json()["recipe"],
            optimizer=dataclasses.asdict(optimizer),
        )
        results = carry_out(
            setup,
            config,
            plan,
            steps=command.steps,
            optimizer=optimizer,
            label="finetune",
        )
        print_outcome("fine-tuned", results)
        print(f"results, pictures and checkpoints are in {command.out}")
