"""ConvNeXt: convolutions in the fashion of transformers (Liu et al., arXiv 2201.03545)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.spatial import convolve
from ssvq_jax.models.vit import Mlp


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """Sizes of a ConvNeXt.

    Attributes:
        image_size: height and width of the images that it is meant for; others work, too.
        channels: image channels.
        widths: features of each stage.
        depths: blocks of each stage.
        mlp_ratio: hidden features of a block over its features.
        classes: number of classes.
    """

    image_size: int = 224
    channels: int = 3
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    mlp_ratio: int = 4
    classes: int = 1000

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths}: give at least 1 block for each stage")
        if len(self.depths) != len(self.widths):
            raise ValueError(
                f"depths={self.depths} are of {len(self.depths)} stages, widths={self.widths} "
                f"of {len(self.widths)}"
            )


CONFIGS: dict[str, ConvNeXtConfig] = {"convnext_tiny": ConvNeXtConfig()}


class ConvNeXtBlock(nn.Module):
    """A 7x7 convolution of each feature alone, then an MLP over the features, scaled.

    Attributes:
        mlp_ratio: as in `ConvNeXtConfig`.
        dtype: dtype of activations.
    """

    mlp_ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Adds the block's features."""
        width = x.shape[-1]
        depthwise = _conv(width, 7, 1, self.dtype, "conv_dw", padding=3, groups=width)
        hidden = _norm(self.dtype, "norm")(depthwise(x))
        hidden = Mlp(self.mlp_ratio * width, self.dtype, name="mlp")(hidden)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + hidden * gamma.astype(self.dtype).reshape(1, 1, 1, width)


class ConvNeXtStage(nn.Module):
    """Halves height and width, except in the first stage; then blocks.

    Attributes:
        width: features.
        depth: number of blocks.
        downsample: whether to halve.
        mlp_ratio: as in `ConvNeXtConfig`.
        dtype: dtype of activations.
        scan: as in `ConvNeXt`.
        remat: as in `ConvNeXt`.
    """

    width: int
    depth: int
    downsample: bool
    mlp_ratio: int
    dtype: Any
    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Computes the stage's features."""
        if self.downsample:
            x = _norm(self.dtype, "downsample_norm")(x)
            x = _conv(self.width, 2, 2, self.dtype, "downsample_conv")(x)
        block = nn.remat(ConvNeXtBlock, prevent_cse=not self.scan) if self.remat else ConvNeXtBlock
        if self.scan:
            blocks = nn.scan(
                lambda block, carry, _: (block(carry), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = blocks(block(self.mlp_ratio, self.dtype, name="blocks"), x, None)
            return x
        for i in range(self.depth):
            x = block(self.mlp_ratio, self.dtype, name=f"blocks_{i}")(x)
        return x


class ConvNeXt(nn.Module):
    """ConvNeXt: stem of 4x4 patches, stages, mean over the image, norm, linear head.

    Leaf paths follow timm's names: ``stages_0/blocks_1/conv_dw/kernel``, ``stages_1/blocks_0/mlp/
    fc1/kernel``, ``stages_1/blocks_0/gamma``, …

    Attributes:
        config: sizes.
        scan: stack the parameters of a stage's blocks on a leading axis
            (``stages_0/blocks/conv_dw/kernel``) and scan over them.
        dtype: dtype of activations; parameters are float32.
        remat: compute the blocks again for the backward pass instead of keeping what they computed.
    """

    config: ConvNeXtConfig
    scan: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Classifies images.

        Args:
            images: normalised images, NHWC.

        Returns:
            Logits, float32.
        """
        cfg = self.config
        x = _conv(cfg.widths[0], 4, 4, self.dtype, "stem_conv")(images.astype(self.dtype))
        x = _norm(self.dtype, "stem_norm")(x)
        for i, (width, depth) in enumerate(zip(cfg.widths, cfg.depths, strict=True)):
            stage = ConvNeXtStage(
                width, depth, i > 0, cfg.mlp_ratio, self.dtype, self.scan, self.remat,
                name=f"stages_{i}",
            )  # fmt: skip
            x = stage(x)
            self.sow("intermediates", f"stage_{i}", x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        features = _norm(jnp.float32, "norm")(features)
        init = nn.initializers.truncated_normal(0.02)
        return nn.Dense(cfg.classes, kernel_init=init, name="head")(features)


def _conv(
    features: int, size: int, stride: int, dtype: Any, name: str, padding: int = 0, groups: int = 1
) -> nn.Conv:
    return nn.Conv(
        features, (size, size), stride, padding=padding, feature_group_count=groups, dtype=dtype,
        kernel_init=nn.initializers.truncated_normal(0.02), conv_general_dilated=convolve,
        name=name,
    )  # fmt: skip


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
