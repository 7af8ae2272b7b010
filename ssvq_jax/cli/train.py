"""``ssvq train``: a float model on your own data."""

import dataclasses

from ssvq_jax.cli.options import ModelOptions, TrainingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainingOptions, ModelOptions):
    """Train a float model, to be compressed afterwards.

    Stop it whenever you like: the same command goes on where it was, and ends with the same bits.
    """

    steps: int = 10_000
    """Batches to train on."""
    preset: str = "adamw"
    """Training recipe that fills in what is left out: adamw, sgd, deit, resnet, cifar-deit or
    cifar-resnet."""
    learning_rate: float | None = None
    """Highest rate; it rises linearly, then falls with a cosine."""
    weight_decay: float | None = None
    """Of all weights."""
    warmup_share: float | None = None
    """Share of the run in which the rate rises."""
    clip_norm: float | None = None
    """Largest global gradient norm; inf clips nothing."""
    accumulate: int = 1
    """Batches an update."""

    def run(self) -> None:
        """Trains, and writes everything."""
        from ssvq_jax.cli.session import carry_out
        from ssvq_jax.cli.setup import set_up
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome
        from ssvq_jax.training.presets import training_preset

        self.check_training(self.steps)
        preset = training_preset(self.preset)
        filled = self.fill(
            {
                "augment": preset.augment,
                "label_smoothing": preset.objective.label_smoothing,
                "average_decay": preset.average_decay,
                "learning_rate": preset.optimizer.dense,
                "weight_decay": preset.optimizer.weight_decay,
                "warmup_share": preset.optimizer.warmup_share,
                "clip_norm": preset.optimizer.clip_norm,
            }
        )
        if filled.clip_norm == float("inf"):
            filled = dataclasses.replace(filled, clip_norm=None)
        setup = set_up(filled, augment=filled.augment, initial=True, compressed=False)
        command = setup.options
        results = carry_out(
            setup,
            setup.config("train"),
            make_plan(setup.weights.params, [(".*", None)]),
            steps=command.steps,
            optimizer=dataclasses.replace(
                preset.optimizer,
                dense=command.learning_rate,
                weight_decay=command.weight_decay,
                warmup_share=command.warmup_share,
                clip_norm=command.clip_norm,
                accumulate=command.accumulate,
            ),
            label="float",
        )
        print_outcome("float32", results)
        print(f"results, pictures and checkpoints are in {command.out}")
