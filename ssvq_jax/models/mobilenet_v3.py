"""MobileNetV3-Large (Howard et al., arXiv 1905.02244)."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.inverted_residual import (
    PYTORCH,
    BlockSpec,
    Numerics,
    Stages,
    make_divisible,
    trunk,
)


class _Row(NamedTuple):
    """A block of the paper's Table 1: kernel, hidden and output features, SE, NL and s."""

    kernel: int
    hidden: int
    features: int
    squeezes: bool
    activation: str
    stride: int


_TABLE = (
    (_Row(3, 16, 16, False, "relu", 1),),
    (_Row(3, 64, 24, False, "relu", 2), _Row(3, 72, 24, False, "relu", 1)),
    (_Row(5, 72, 40, True, "relu", 2), *2 * (_Row(5, 120, 40, True, "relu", 1),)),
    (
        _Row(3, 240, 80, False, "hard_swish", 2),
        _Row(3, 200, 80, False, "hard_swish", 1),
        *2 * (_Row(3, 184, 80, False, "hard_swish", 1),),
    ),
    (_Row(3, 480, 112, True, "hard_swish", 1), _Row(3, 672, 112, True, "hard_swish", 1)),
    (_Row(5, 672, 160, True, "hard_swish", 2), *2 * (_Row(5, 960, 160, True, "hard_swish", 1),)),
)


@dataclasses.dataclass(frozen=True)
class MobileNetV3Config:
    """Sizes of a MobileNetV3-Large.

    Attributes:
        image_size: height and width of the images that the weights are for.
        channels: image channels.
        classes: number of classes.
        width: multiplies the features of all layers.
        numerics: padding and batch norm's constants.
        dropout: share of the hidden features of the classifier that training drops.
    """

    image_size: int = 224
    channels: int = 3
    classes: int = 1000
    width: float = 1.0
    numerics: Numerics = PYTORCH
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if self.width <= 0:
            raise ValueError(f"width={self.width}: give a positive multiplier")

    @property
    def stages(self) -> Stages:
        """The blocks of each stage."""
        inputs, stages = make_divisible(16 * self.width), []
        for rows in _TABLE:
            blocks = []
            for row in rows:
                hidden = make_divisible(row.hidden * self.width)
                features = make_divisible(row.features * self.width)
                squeeze = make_divisible(hidden / 4) if row.squeezes else 0
                blocks.append(
                    BlockSpec(
                        inputs,
                        hidden,
                        features,
                        row.kernel,
                        row.stride,
                        squeeze=squeeze,
                        activation=row.activation,
                    )
                )
                inputs = features
            stages.append(tuple(blocks))
        return tuple(stages)

    @property
    def final_features(self) -> int:
        """Features of the last convolution."""
        return 6 * self.stages[-1][-1].features

    @property
    def hidden_features(self) -> int:
        """Features of the classifier's hidden layer."""
        return make_divisible(1280 * self.width)


CONFIGS: dict[str, MobileNetV3Config] = {
    # timm's constants of batch norm; torchvision's are the paper's.
    "mobilenetv3_large_100": MobileNetV3Config(),
    "torchvision_mobilenetv3_large_100": MobileNetV3Config(
        numerics=Numerics("symmetric", 1e-3, 0.99)
    ),
}


class MobileNetV3(nn.Module):
    """MobileNetV3-Large: stem, blocks, 1 x 1 convolution, pooling, classifier of two layers.

    Leaf paths: ``stem/conv/kernel``, ``blocks_2_0/depthwise/conv/kernel``,
    ``blocks_2_0/se/reduce/kernel``, ``final/conv/kernel``, ``hidden/kernel``,
    ``classifier/kernel``, …

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters are float32.
    """

    config: MobileNetV3Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Classifies images.

        Args:
            images: normalised images, NHWC.
            train: normalise by the batch's statistics, and drop features.

        Returns:
            Logits, float32.
        """
        cfg = self.config
        x = trunk(self, images, "hard_swish", train, final=cfg.final_features)[-1]
        pooled = x.mean((1, 2))
        hidden = nn.Dense(cfg.hidden_features, dtype=self.dtype, name="hidden")(pooled)
        hidden = jax.nn.hard_swish(hidden).astype(jnp.float32)
        hidden = nn.Dropout(cfg.dropout, deterministic=not train)(hidden)
        return nn.Dense(cfg.classes, name="classifier")(hidden)
