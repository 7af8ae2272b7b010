"""DeepLabV3 (arXiv 1706.05587) and DeepLabV3+ (arXiv 1802.02611) with a MobileNetV2 backbone."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.inverted_residual import PYTORCH, TENSORFLOW, ConvNorm, Numerics
from ssvq_jax.models.mobilenet import MobileNetV2Backbone, MobileNetV2Config
from ssvq_jax.models.spatial import convolve


@dataclasses.dataclass(frozen=True)
class DeepLabConfig:
    """Sizes of a DeepLab.

    Attributes:
        image_size: height and width of the images that the weights are for.
        channels: image channels.
        classes: number of classes.
        head: ``v3``: a 1 x 1 convolution beside pooled features, on the last block's features, as
            Google's mobile checkpoints have it; ``v3plus``: atrous spatial pyramid pooling on the
            last convolution's features, then a decoder that sees those at stride 4.
        width: of the backbone.
        output_stride: of the backbone: 8 or 16.
        features: of the head's layers.
        rates: dilations of the pyramid of ``v3plus``.
        backbone_numerics: padding and batch norm's constants of the backbone.
        dropout: share of the features before the classifier (``v3``) or after the pyramid
            (``v3plus``) that training drops.
    """

    image_size: int = 513
    channels: int = 3
    classes: int = 21
    head: Literal["v3", "v3plus"] = "v3"
    width: float = 1.0
    output_stride: int = 16
    features: int = 256
    rates: tuple[int, int, int] = (12, 24, 36)
    backbone_numerics: Numerics = TENSORFLOW
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if self.head not in ("v3", "v3plus"):
            raise ValueError(f"head='{self.head}': give 'v3' or 'v3plus'")
        if self.output_stride not in (8, 16):
            raise ValueError(f"output_stride={self.output_stride}: give 8 or 16")
        if self.width <= 0:
            raise ValueError(f"width={self.width}: give a positive multiplier")

    @property
    def backbone(self) -> MobileNetV2Config:
        """Sizes of the backbone."""
        return MobileNetV2Config(
            image_size=self.image_size,
            channels=self.channels,
            width=self.width,
            output_stride=self.output_stride,
            early_dilation=self.head == "v3plus",
            numerics=self.backbone_numerics,
        )


CONFIGS: dict[str, DeepLabConfig] = {
    "deeplabv3_mobilenetv2": DeepLabConfig(),
    # Sizes of google/deeplabv3_mobilenet_v2_1.0_513.
    "deeplabv3_mobilenetv2_os8": DeepLabConfig(output_stride=8),
    "deeplabv3plus_mobilenetv2": DeepLabConfig(
        image_size=512, head="v3plus", backbone_numerics=PYTORCH
    ),
}


def resize_bilinear(
    x: Float[Array, "b h w c"], height: int, width: int, align_corners: bool
) -> Float[Array, "b height width c"]:
    """Enlarges a feature map as PyTorch's ``interpolate`` does.

    Args:
        x: feature map.
        height: rows of the result.
        width: columns of the result.
        align_corners: whether the outer pixels' centres stay at the outer pixels' centres, rather
            than the map's edges at its edges.

    Returns:
        The enlarged feature map.
    """
    sizes = (x.shape[1], height), (x.shape[2], width)
    # A single pixel has no step between corners; any scale that lets it cover the result will do.
    aligned = jnp.array([align_corners and old > 1 for old, _ in sizes])
    steps = jnp.array([(new - 1) / max(old - 1, 1) for old, new in sizes])
    ratios = jnp.array([new / old for old, new in sizes])
    scale = jnp.where(aligned, steps, ratios)
    shift = jnp.where(aligned, 0.5 * (1 - scale), 0.0)
    shape = (x.shape[0], height, width, x.shape[3])
    enlarged = jax.image.scale_and_translate(
        x.astype(jnp.float32), shape, (1, 2), scale, shift, "linear", antialias=False
    )
    return enlarged.astype(x.dtype)


def _pooled(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    return x.mean((1, 2), keepdims=True)


class MobileHead(nn.Module):
    """The head of Google's mobile DeepLabV3: pooled features beside a 1 x 1 convolution."""

    config: DeepLabConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, maps: list[Float[Array, "b _h _w _c"]], train: bool
    ) -> Float[Array, "b h w classes"]:
        """Scores the pixels of the last feature map."""
        cfg, x = self.config, maps[-1]
        shared: dict[str, Any] = {"activation": "relu", "dtype": self.dtype}
        pooled = ConvNorm(cfg.features, PYTORCH, name="pool", **shared)(_pooled(x), train)
        beside = ConvNorm(cfg.features, PYTORCH, name="aspp", **shared)(x, train)
        x = jnp.concatenate([jnp.broadcast_to(pooled, beside.shape), beside], axis=-1)
        x = ConvNorm(cfg.features, PYTORCH, name="project", **shared)(x, train)
        x = nn.Dropout(cfg.dropout, deterministic=not train)(x).astype(jnp.float32)
        return _classifier(cfg)(x)


class SeparableConvNorm(nn.Module):
    """A 3 x 3 depthwise convolution, then a 1 x 1 convolution, batch norm and ReLU."""

    features: int
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w d"]:
        """Transforms a feature map."""
        x = nn.Conv(
            x.shape[-1],
            (3, 3),
            padding=self.dilation,
            kernel_dilation=self.dilation,
            feature_group_count=x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="depthwise",
        )(x)
        mix = ConvNorm(self.features, PYTORCH, activation="relu", dtype=self.dtype, name="mix")
        return mix(x, train)


class PlusHead(nn.Module):
    """DeepLabV3+'s: atrous spatial pyramid pooling, and a decoder with features at stride 4."""

    config: DeepLabConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, maps: list[Float[Array, "b _h _w _c"]], train: bool
    ) -> Float[Array, "b h w classes"]:
        """Scores the pixels of the feature map at stride 4."""
        cfg, x, fine = self.config, maps[-1], maps[1]
        shared: dict[str, Any] = {"activation": "relu", "dtype": self.dtype}
        pyramid = [ConvNorm(cfg.features, PYTORCH, name="aspp_0", **shared)(x, train)]
        for i, rate in enumerate(cfg.rates, 1):
            layer = SeparableConvNorm(cfg.features, rate, self.dtype, name=f"aspp_{i}")
            pyramid.append(layer(x, train))
        pooled = ConvNorm(cfg.features, PYTORCH, name="pool", **shared)(_pooled(x), train)
        pyramid.append(jnp.broadcast_to(pooled, pyramid[0].shape))
        x = jnp.concatenate(pyramid, axis=-1)
        x = ConvNorm(cfg.features, PYTORCH, name="project", **shared)(x, train)
        x = nn.Dropout(cfg.dropout, deterministic=not train)(x)
        x = SeparableConvNorm(cfg.features, dtype=self.dtype, name="refine")(x, train)
        x = resize_bilinear(x, fine.shape[1], fine.shape[2], align_corners=True)
        fine = ConvNorm(48, PYTORCH, name="fine", **shared)(fine, train)
        x = jnp.concatenate([x, fine], axis=-1)
        x = SeparableConvNorm(cfg.features, dtype=self.dtype, name="decode")(x, train)
        return _classifier(cfg)(x.astype(jnp.float32))


def _classifier(config: DeepLabConfig) -> nn.Conv:
    return nn.Conv(config.classes, (1, 1), conv_general_dilated=convolve, name="classifier")


class DeepLab(nn.Module):
    """DeepLab: dilated MobileNetV2, a head, and its scores enlarged to the image.

    Leaf paths: ``backbone/stem/conv/kernel``, ``backbone/blocks_2_0/depthwise/conv/kernel``,
    ``head/project/conv/kernel``, ``head/classifier/kernel``, …

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters are float32.
    """

    config: DeepLabConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b h w classes"]:
        """Classifies pixels.

        Args:
            images: normalised images, NHWC.
            train: normalise by the batch's statistics, and drop features.

        Returns:
            Logits of the image's pixels, float32. The head's own are the intermediate ``coarse``.
        """
        cfg, plus = self.config, self.config.head == "v3plus"
        maps = MobileNetV2Backbone(cfg.backbone, plus, self.dtype, name="backbone")(images, train)
        head = (PlusHead if plus else MobileHead)(cfg, self.dtype, name="head")
        coarse = head(maps, train)
        self.sow("intermediates", "coarse", coarse)
        return resize_bilinear(coarse, images.shape[1], images.shape[2], align_corners=plus)
