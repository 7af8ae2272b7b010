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
        from ssvq_jax.cli.session import carry_out
        from ssvq_jax.cli.setup import set_up
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome
        from ssvq_jax.training.optimizer import OptimizerConfig

        self.check_training(self.steps)
        setup = set_up(self, augment=self.augment, initial=True, compressed=False)
        command = setup.options
        results = carry_out(
            setup,
            setup.config("train"),
            make_plan(setup.weights.params, [(".*", None)]),
            steps=command.steps,
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
