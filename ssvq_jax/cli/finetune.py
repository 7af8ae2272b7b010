"""``ssvq finetune``: compress a trained model and train what the method learns."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ssvq_jax.cli.options import ModelOptions, TextOptions, TrainingOptions
from ssvq_jax.training.optimizer import OptimizerConfig

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.setup import Setup
    from ssvq_jax.cli.weights import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneCommand(TrainingOptions, TextOptions, ModelOptions):
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
    distill: float = 0.0
    """Share of the loss that is the distance from the logits of a teacher: of the float model."""
    temperature: float = 1.0
    """What logits are divided by for that; above 1, the smaller probabilities count for more."""
    features: Annotated[str | None, tyro.conf.arg(metavar="PATTERN")] = None
    r"""Regular expression of modules, e.g. 'blocks_\d+' or 'layer4_1', that are to give what the
    teacher's give, too."""
    feature_weight: float = 1.0
    """Weight in the loss of how far these are apart."""
    teacher: Path | None = None
    """Float weights of the same model to learn from; by default those that are compressed."""
    text: tuple[Path, ...] = ()
    """For a language model, what it is trained on: text files, or Wikipedia dumps (.xml, .bz2)."""
    eval_text: tuple[Path, ...] = ()
    """For a language model, what it is judged by."""

    def run(self) -> None:
        """Fine-tunes, and writes everything."""
        from ssvq_jax.cli.language import is_language
        from ssvq_jax.report import print_outcome

        self.check_training(self.steps)
        optimizer = self.optimizer
        if not self.freezing:
            optimizer = dataclasses.replace(optimizer, freeze=None)
        self._check_distillation()
        if is_language(self.model, self.weights):
            from ssvq_jax.cli.finetune_language import finetune_language

            results = finetune_language(self, optimizer)
        else:
            self.check_images()
            if self.eval_text:
                raise ValueError("--eval-text is for language models: leave it out")
            results = self._on_images(optimizer)
        print_outcome("fine-tuned", results)
        print(f"results, pictures and checkpoints are in {self.out}")

    def _on_images(self, optimizer: OptimizerConfig) -> dict[str, Any]:
        """Fine-tunes a model for images; gives the content of ``results.json``."""
        from ssvq_jax.cli.session import Distillation, carry_out
        from ssvq_jax.cli.setup import set_up
        from ssvq_jax.cli.weights import open_plan

        filled = self.fill({"augment": "none", "label_smoothing": 0.0, "average_decay": 0.0})
        setup = set_up(filled, augment=filled.augment)
        command, weights = setup.options, setup.weights
        plan = open_plan(command.recipe, weights)
        teacher = self._open_teacher(setup)
        config = setup.config(
            "finetune",
            recipe=plan.to_json()["recipe"],
            optimizer=dataclasses.asdict(optimizer),
            teacher=teacher and teacher.origin,
        )
        return carry_out(
            setup,
            config,
            plan,
            steps=command.steps,
            optimizer=optimizer,
            label="finetune",
            distillation=Distillation(
                command.distill,
                command.temperature,
                command.features,
                command.feature_weight,
                teacher,
            ),
        )

    def _check_distillation(self) -> None:
        """Raises ValueError for options that nothing would read."""
        if self.teacher is not None and not self.distill and self.features is None:
            raise ValueError("teacher is for distillation: give --distill 0.5 or --features, too")
        if self.temperature != 1 and not self.distill:
            raise ValueError("temperature is for distillation: give --distill, e.g. 0.5, too")
        if self.feature_weight != 1 and self.features is None:
            raise ValueError("feature_weight is for distillation: give --features, too")
        if self.features is not None and not self.feature_weight > 0:
            raise ValueError(
                f"feature_weight={self.feature_weight}: give one above 0, or leave --features out"
            )

    def _open_teacher(self, setup: "Setup[Any]") -> "Weights | None":
        """Float weights to learn from, if any are."""
        from ssvq_jax.cli.weights import open_weights

        if not self.distill and self.features is None:
            return None
        teacher = setup.weights
        if self.teacher is not None:
            teacher = open_weights(self.teacher, setup.model, setup.image_shape)
        if teacher.plan is not None:
            raise ValueError(
                f"{teacher.origin['from']} is compressed, and no teacher: give --teacher with the "
                "float weights"
            )
        return teacher
