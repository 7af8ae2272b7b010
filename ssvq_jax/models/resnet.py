"""Residual networks (He et al., arXiv 1512.03385) in torchvision's form, known as v1.5."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.spatial import convolve, max_pool


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a residual network.

    Attributes:
        image_size: height and width of the images that it is meant for; others work, too.
        channels: image channels.
        width: features of the stem; stage i has ``width * 2**i``, four times that at the end of
            its blocks if these are bottlenecks.
        depths: blocks of each stage.
        bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, not of two 3x3.
        classes: number of classes.
        small: for images of about 32 pixels: the stem is a 3x3 convolution of stride 2 and no
            pooling follows, instead of 7x7, stride 2 and pooling.
    """

    image_size: int = 224
    channels: int = 3
    width: int = 64
    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    classes: int = 1000
    small: bool = False

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths}: give at least 1 block for each stage")


CONFIGS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig(),
    "resnet50": ResNetConfig(depths=(3, 4, 6, 3), bottleneck=True),
}
# The 20 layers of section 4.2 of the paper, but for the stride of the first, which leaves a quarter
# of the arithmetic (10 M multiplications an image): for a machine without accelerator.
SMALL_CONFIGS: dict[str, ResNetConfig] = {
    "resnet20_cifar": ResNetConfig(
        image_size=32, width=16, depths=(3, 3, 3), classes=10, small=True
    ),
}


class ResidualBlock(nn.Module):
    """Convolutions with a shortcut; the first 3x3 has the stride.

    Attributes:
        width: features of the convolutions.
        stride: of the block.
        bottleneck: as in `ResNetConfig`.
        train: normalise with the batch's statistics.
        dtype: dtype of activations.
    """

    width: int
    stride: int
    bottleneck: bool
    train: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Adds the convolutions' features to the shortcut's."""
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (self.width, 3, 1)]
        residual = x
        for i, (features, size, stride) in enumerate(layers, start=1):
            if i > 1:
                x = nn.relu(x)
            x = _conv(features, size, stride, self.dtype, f"conv{i}")(x)
            x = _norm(self.train, self.dtype, f"bn{i}")(x)
        if residual.shape[-1] != x.shape[-1] or self.stride > 1:
            shortcut = _conv(x.shape[-1], 1, self.stride, self.dtype, "downsample_conv")
            residual = _norm(self.train, self.dtype, "downsample_bn")(shortcut(residual))
        return nn.relu(x + residual)


class ResNet(nn.Module):
    """ResNet: stem, stages of residual blocks, mean over the image, linear head.

    Leaf paths follow timm's names: ``conv1/kernel``, ``layer1_0/bn2/scale``, … but ``head`` for
    ``fc``. Running variances are updated with the batch's biased variance; PyTorch normalises
    with that one, but updates with the unbiased.

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters and statistics are float32.
        remat: compute the blocks again for the backward pass instead of keeping what they computed.
    """

    config: ResNetConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Classifies images.

        Args:
            images: normalised images, NHWC.
            train: normalise with the batch's statistics, and update the running ones.

        Returns:
            Logits, float32.
        """
        cfg = self.config
        size = 3 if cfg.small else 7
        x = _conv(cfg.width, size, 2, self.dtype, "conv1")(images.astype(self.dtype))
        x = nn.relu(_norm(train, self.dtype, "bn1")(x))
        if not cfg.small:
            x = max_pool(x, 3, 2, 1)
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        for stage, depth in enumerate(cfg.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                name = f"layer{stage + 1}_{i}"
                width = cfg.width * 2**stage
                x = block(width, stride, cfg.bottleneck, train, self.dtype, name=name)(x)
            self.sow("intermediates", f"stage_{stage}", x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return nn.Dense(cfg.classes, kernel_init=init, name="head")(features)


def _conv(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        features, (size, size), stride, padding=size // 2, use_bias=False, dtype=dtype, name=name,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=convolve,
    )  # fmt: skip


def _norm(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )
