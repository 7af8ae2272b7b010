"""``ssvq finetune`` of a language model: next tokens of a text, and what the float model says."""

import dataclasses
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.language import Language, open_language
from ssvq_jax.cli.language_text import Windows, open_tokenizer, open_windows
from ssvq_jax.cli.options import check_apart, to_json
from ssvq_jax.cli.session import Distillation, carry_out
from ssvq_jax.cli.weights import Weights, open_plan

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.finetune import FinetuneCommand
    from ssvq_jax.models.tokenizer import Tokenizer
    from ssvq_jax.training.optimizer import OptimizerConfig
    from ssvq_jax.training.run import Task

_OF_IMAGES = frozenset(
    {"classes", "new_head", "data", "data_dir", "image_size", "normalization", "train_split"}
    | {"eval_split", "workers", "batch_norm_batches", "augment", "features"}
)
_BATCH = 4  # windows


@dataclasses.dataclass(frozen=True)
class LanguageSetup:
    """What `carry_out` works on, as `ssvq_jax.cli.setup.Setup` is for images.

    Attributes:
        options: the command's.
        language: the model, and where to begin.
        tokenizer: of the model.
        train: text to train on.
        held_out: text to judge by.
    """

    options: "FinetuneCommand"
    language: Language
    tokenizer: "Tokenizer"
    train: Windows
    held_out: Windows

    @property
    def weights(self) -> Weights:
        """Where to begin."""
        return self.language.weights

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.options.seed or 0

    @property
    def batch_size(self) -> int:
        """Windows of a training batch."""
        return _BATCH if self.options.batch_size is None else self.options.batch_size

    @property
    def batch_norm_batches(self) -> int:
        """There are no batch statistics."""
        return 0

    @property
    def blocks(self) -> bool:
        """Whether the model has blocks whose activations can be computed again."""
        return True

    @property
    def splits(self) -> dict[str, Any]:
        """What is trained on and judged by, for results."""
        pairs = {"train_split": self.train, "eval_split": self.held_out}
        return {name: ", ".join(file.name for file in x.files) for name, x in pairs.items()}

    @property
    def told(self) -> dict[str, Any]:
        """What a packed file needs to be opened by itself."""
        return self.language.told | {"vocabulary_crc32": self.tokenizer.checksum}

    def task(self, devices: int = 1, *, remat: bool = False, features: str | None = None) -> "Task":
        """The model with its text; it is judged by one window a device at a time."""
        from ssvq_jax.data.token_batches import eval_token_batches, train_token_batches
        from ssvq_jax.models.llama import Layer
        from ssvq_jax.training.run import Task
        from ssvq_jax.training.step import linen_forward

        train, held_out = self.train.tokens, self.held_out.tokens
        return Task(
            linen_forward(self.language.module, remat=Layer if remat else None, features=features),
            lambda seed: train_token_batches(train, self.batch_size, seed=seed),
            lambda: eval_token_batches(held_out, devices),
        )


def finetune_language(command: "FinetuneCommand", optimizer: "OptimizerConfig") -> dict[str, Any]:
    """Fine-tunes a compressed language model; gives the content of ``results.json``.

    Raises:
        ValueError: for options of images, or what is missing or does not fit.
    """
    from ssvq_jax.models.tokenizer import save_tokenizer

    names = {field.name for field in dataclasses.fields(command)}
    why = "is for models that take images: give --model with one"
    command.check_unused(names - _OF_IMAGES, why)
    command.check_seed()
    command.check_batches()
    command.check_windows()
    check_apart(command.out, command.weights)
    if not command.text or not command.eval_text:
        raise ValueError("no text: give --text to train on, and --eval-text to judge by")
    texts = ({file.resolve() for file in x} for x in (command.text, command.eval_text))
    if set.intersection(*texts):
        raise ValueError("--text and --eval-text have a file in common: judge by another one")
    filled = command.fill({"label_smoothing": 0.0, "average_decay": 0.0})
    language = open_language(command.model, command.weights, scan=command.scan)
    tokenizer = open_tokenizer(language, command.tokenizer)
    judged_by = dataclasses.replace(command, text=command.eval_text)
    setup = LanguageSetup(
        filled,
        language,
        tokenizer,
        open_windows(dataclasses.replace(command, windows=None), language, tokenizer, most=None),
        open_windows(judged_by, language, tokenizer),
    )
    plan = open_plan(command.recipe, language.weights)
    teacher = _open_teacher(command, language)
    shown = {name: x for name, x in to_json(filled, "finetune").items() if name not in _OF_IMAGES}
    config = shown | {
        **setup.told,
        "weights": language.weights.origin,
        "recipe": plan.to_json()["recipe"],
        "optimizer": dataclasses.asdict(optimizer),
        "teacher": teacher and teacher.origin,
        "batch_size": setup.batch_size,
        "text": [str(file) for file in command.text],
        "eval_text": [str(file) for file in command.eval_text],
        "window": command.window,
        "windows": len(setup.held_out.tokens),
        "tokens_crc32": [x.told["tokens_crc32"] for x in (setup.train, setup.held_out)],
    }
    results = carry_out(
        setup,
        config,
        plan,
        steps=command.steps,
        optimizer=optimizer,
        label="finetune",
        distillation=Distillation(command.distill, command.temperature, teacher=teacher),
    )
    save_tokenizer(tokenizer, command.out)
    return results


def _open_teacher(command: "FinetuneCommand", language: Language) -> Weights | None:
    """Float weights to learn from, if any are."""
    if not command.distill:
        return None
    teacher = language
    if command.teacher is not None:
        teacher = open_language(language.name, command.teacher, scan=language.scan)
    if teacher.weights.plan is not None or teacher.config != language.config:
        raise ValueError(
            f"{teacher.path} is compressed or of other sizes, and no teacher: give --teacher with "
            "the float weights"
        )
    return teacher.weights
