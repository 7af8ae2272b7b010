"""EfficientNet-Lite: EfficientNet (Tan and Le, arXiv 1905.11946) without what edge chips lack.

Against EfficientNet: no squeeze and excitation, ReLU6 for swish, and a stem and last convolution
that do not grow with the width.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.inverted_residual import (
    TENSORFLOW,
    Numerics,
    Stage,
    Stages,
    scaled_blocks,
    trunk,
)

_TABLE = (
    Stage(1, 16, 1, 1, kernel=3),
    Stage(6, 24, 2, 2, kernel=3),
    Stage(6, 40, 2, 2, kernel=5),
    Stage(6, 80, 3, 2, kernel=3),
    Stage(6, 112, 3, 1, kernel=5),
    Stage(6, 192, 4, 2, kernel=5),
    Stage(6, 320, 1, 1, kernel=3),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Sizes of an EfficientNet-Lite.

    Attributes:
        image_size: height and width of the images that the weights are for.
        channels: image channels.
        classes: number of classes.
        width: multiplies the features of the stages.
        depth: multiplies the blocks of all stages but the first and last.
        numerics: padding and batch norm's constants.
        dropout: share of the pooled features that training drops.
    """

    image_size: int = 224
    channels: int = 3
    classes: int = 1000
    width: float = 1.0
    depth: float = 1.0
    numerics: Numerics = TENSORFLOW
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        for name in ("width", "depth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive multiplier")

    @property
    def stages(self) -> Stages:
        """The blocks of each stage."""
        middle = [row._replace(repeats=math.ceil(row.repeats * self.depth)) for row in _TABLE[1:-1]]
        return scaled_blocks((_TABLE[0], *middle, _TABLE[-1]), 32, self.width)


CONFIGS: dict[str, EfficientNetLiteConfig] = {
    "efficientnet_lite0": EfficientNetLiteConfig(),
    "efficientnet_lite1": EfficientNetLiteConfig(image_size=240, depth=1.1),
    "efficientnet_lite2": EfficientNetLiteConfig(image_size=260, width=1.1, depth=1.2),
    "efficientnet_lite3": EfficientNetLiteConfig(image_size=300, width=1.2, depth=1.4),
    "efficientnet_lite4": EfficientNetLiteConfig(image_size=380, width=1.4, depth=1.8),
}


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: stem, inverted residual blocks, 1 x 1 convolution, pooling, classifier.

    Leaf paths: ``stem/conv/kernel``, ``blocks_2_0/depthwise/conv/kernel``,
    ``blocks_2_0/expand/bn/scale``, ``final/conv/kernel``, ``classifier/kernel``, …

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters are float32.
    """

    config: EfficientNetLiteConfig
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
        x = trunk(self, images, "relu6", train, final=1280)[-1]
        pooled = x.astype(jnp.float32).mean((1, 2))
        pooled = nn.Dropout(cfg.dropout, deterministic=not train)(pooled)
        return nn.Dense(cfg.classes, name="classifier")(pooled)
