"""Training recipes by name: for float models, and to begin a search from."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ssvq_jax.training.objective import Objective
from ssvq_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainingPreset:
    """How a float model is trained.

    Attributes:
        optimizer: rule, rates and decay; rates are for the batch size in the preset's comment.
        objective: what is minimised.
        augment: name of an augmentation of `ssvq_jax.data`.
        average_decay: of the moving averages of the weights; 0 for none.
    """

    optimizer: OptimizerConfig
    objective: Objective = dataclasses.field(default_factory=Objective)
    augment: str = "none"
    average_decay: float = 0.0


def _adamw(rate: float, decay: float) -> OptimizerConfig:
    return OptimizerConfig(dense=rate, weight_decay=decay, freeze=None)


def _sgd(rate: float, decay: float) -> OptimizerConfig:
    return OptimizerConfig(rule="sgd", dense=rate, weight_decay=decay, clip_norm=None, freeze=None)


TRAINING_PRESETS: Mapping[str, TrainingPreset] = MappingProxyType(
    {
        "adamw": TrainingPreset(_adamw(1e-3, 0.05)),
        "sgd": TrainingPreset(_sgd(0.1, 1e-4)),
        # After arXiv 2012.12877, table 9 (batches of 1024, 300 epochs, 5 of them warm-up), and the
        # average of its code; without random erasing, repeated augmentation and stochastic depth,
        # and with weight decay of biases and norms, too.
        "deit": TrainingPreset(
            dataclasses.replace(_adamw(1e-3, 0.05), warmup_share=5 / 300, clip_norm=None),
            Objective(label_smoothing=0.1),
            "deit",
            average_decay=0.99996,
        ),
        # After the recipe of torchvision's first weights (batches of 256, 90 epochs), but with
        # Nesterov's momentum, milder crops, warm-up, and a cosine instead of three steps.
        "resnet": TrainingPreset(_sgd(0.1, 1e-4), augment="imagenet"),
        # For 32 x 32 images: batches of 128, 100 epochs and more.
        "cifar-deit": TrainingPreset(
            _adamw(1e-3, 0.05), Objective(label_smoothing=0.1), "cifar-deit", average_decay=0.999
        ),
        "cifar-resnet": TrainingPreset(_sgd(0.1, 5e-4), augment="cifar"),
    }
)
"""`adamw` and `sgd` change no images; the others follow recipes of the field."""


def training_preset(name: str) -> TrainingPreset:
    """Looks up a training recipe.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> training_preset("deit").objective.label_smoothing
        0.1
    """
    if name not in TRAINING_PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(TRAINING_PRESETS)}")
    return TRAINING_PRESETS[name]
