"""MobileNetV2 (Sandler et al., arXiv 1801.04381)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.inverted_residual import (
    PYTORCH,
    TENSORFLOW,
    Numerics,
    Stage,
    Stages,
    make_divisible,
    scaled_blocks,
    trunk,
)

_TABLE = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """Sizes of a MobileNetV2.

    Attributes:
        image_size: height and width of the images that the weights are for.
        channels: image channels.
        classes: number of classes.
        width: multiplies the features of all layers; the last one's only where above 1.
        output_stride: pixels of the image a side of the last feature map's pixel: 8, 16 or 32.
            Below 32 dilation takes the place of the strides that are left out.
        early_dilation: blocks that lose their stride take the new dilation themselves, as in
            segmentation-models-pytorch; otherwise it begins after them, as in TensorFlow.
        numerics: padding and batch norm's constants.
        dropout: share of the pooled features that training drops.
    """

    image_size: int = 224
    channels: int = 3
    classes: int = 1000
    width: float = 1.0
    output_stride: int = 32
    early_dilation: bool = False
    numerics: Numerics = PYTORCH
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if self.width <= 0:
            raise ValueError(f"width={self.width}: give a positive multiplier")
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={self.output_stride}: give 8, 16 or 32")

    @property
    def final_features(self) -> int:
        """Features of the last convolution."""
        return make_divisible(1280 * max(1.0, self.width))

    @property
    def stages(self) -> Stages:
        """The blocks of each stage."""
        stages = scaled_blocks(_TABLE, make_divisible(32 * self.width), self.width)
        reached, dilation, found = 2, 1, []
        for blocks in stages:
            kept = []
            for spec in blocks:
                before, stride = dilation, spec.stride
                if reached == self.output_stride:
                    dilation, stride = dilation * stride, 1
                used = dilation if self.early_dilation else before
                kept.append(dataclasses.replace(spec, stride=stride, dilation=used))
                reached *= stride
            found.append(tuple(kept))
        return tuple(found)


CONFIGS: dict[str, MobileNetV2Config] = {
    "mobilenetv2_035": MobileNetV2Config(width=0.35),
    "mobilenetv2_050": MobileNetV2Config(width=0.5),
    "mobilenetv2_075": MobileNetV2Config(width=0.75),
    "mobilenetv2_100": MobileNetV2Config(),
    "mobilenetv2_140": MobileNetV2Config(width=1.4),
    # Google's checkpoints, whose class 0 is the background.
    "tf_mobilenetv2_100": MobileNetV2Config(classes=1001, numerics=TENSORFLOW),
    "tf_mobilenetv2_140": MobileNetV2Config(classes=1001, numerics=TENSORFLOW, width=1.4),
}


class MobileNetV2Backbone(nn.Module):
    """MobileNetV2 without its classifier.

    Attributes:
        config: sizes.
        final: whether the last 1 x 1 convolution follows the blocks.
        dtype: dtype of activations; parameters are float32.
    """

    config: MobileNetV2Config
    final: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> list[Float[Array, "b _h _w _c"]]:
        """Returns the feature map after each stage and, if asked for, the last convolution."""
        final = self.config.final_features if self.final else None
        return trunk(self, images, "relu6", train, final)


class MobileNetV2(nn.Module):
    """MobileNetV2: stem, inverted residual blocks, 1 x 1 convolution, pooling, linear classifier.

    Leaf paths: ``stem/conv/kernel``, ``blocks_2_0/depthwise/conv/kernel``,
    ``blocks_2_0/expand/bn/scale``, ``final/conv/kernel``, ``classifier/kernel``, …

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters are float32.
    """

    config: MobileNetV2Config
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
        x = trunk(self, images, "relu6", train, final=self.config.final_features)[-1]
        pooled = x.astype(jnp.float32).mean((1, 2))
        pooled = nn.Dropout(self.config.dropout, deterministic=not train)(pooled)
        return nn.Dense(self.config.classes, name="classifier")(pooled)
