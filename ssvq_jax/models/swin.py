"""Swin: transformers with attention inside shifted windows (Liu et al., arXiv 2103.14030)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ssvq_jax.models.swin_windows import (
    cut_windows,
    join_windows,
    relative_positions,
    same_region,
)
from ssvq_jax.models.vit import Mlp


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin transformer.

    Attributes:
        image_size: height and width of the images that it is meant for; others work, too.
        channels: image channels.
        patch_size: height and width of a patch.
        width: features of a token in the first stage; each further stage has twice as many.
        depths: blocks of each stage.
        heads: attention heads of each stage; divide its width.
        window: height and width of a window, in tokens.
        mlp_ratio: hidden features of the MLP over the width.
        classes: number of classes.
    """

    image_size: int = 224
    channels: int = 3
    patch_size: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: int = 4
    classes: int = 1000

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths}: give at least 1 block for each stage")
        if len(self.depths) != len(self.heads):
            raise ValueError(
                f"depths={self.depths} are of {len(self.depths)} stages, heads={self.heads} of "
                f"{len(self.heads)}"
            )
        if self.window < 1:
            raise ValueError(f"window={self.window}: give at least 1")
        for stage, heads in enumerate(self.heads):
            if (self.width << stage) % heads:
                raise ValueError(
                    f"heads={self.heads}: {heads} does not divide width={self.width << stage} of "
                    f"stage {stage}"
                )


CONFIGS: dict[str, SwinConfig] = {"swin_tiny": SwinConfig()}


class WindowAttention(nn.Module):
    """Self-attention inside each window, with a bias for each difference of positions.

    Attributes:
        heads: attention heads.
        window: height and width of a window.
        dtype: dtype of activations.
    """

    heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b n t w"], visible: Bool[np.ndarray, "n t t"] | None
    ) -> Float[Array, "b n t w"]:
        """Mixes the tokens of each window.

        Args:
            tokens: t tokens of n windows of an image.
            visible: which tokens a token may see, if not all.

        Returns:
            The mixed tokens.
        """
        batch, windows, length, width = tokens.shape
        size = width // self.heads
        qkv = _dense(3 * width, self.dtype, "qkv")(tokens)
        qkv = qkv.reshape(batch, windows, length, 3, self.heads, size)
        query, key, value = (qkv[:, :, :, i] for i in range(3))
        table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.heads),
        )
        bias = table[relative_positions(self.window)].transpose(2, 0, 1)
        scores = jnp.einsum(
            "bnqhd,bnkhd->bnhqk", query * size**-0.5, key, preferred_element_type=jnp.float32
        )
        scores = scores + bias[None, None]
        if visible is not None:
            # The authors' code adds this number: finite, and so part of what the model computes.
            scores = scores + np.where(visible, np.float32(0), np.float32(-100))[None, :, None]
        weights = jax.nn.softmax(scores).astype(self.dtype)
        mixed = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value)
        return _dense(width, self.dtype, "proj")(mixed.reshape(tokens.shape))


class SwinBlock(nn.Module):
    """Pre-norm transformer block on a plane of tokens.

    Attributes:
        heads: attention heads.
        window: height and width of a window.
        shifted: whether windows are shifted by half a window.
        mlp_ratio: as in `SwinConfig`.
        dtype: dtype of activations.
    """

    heads: int
    window: int
    shifted: bool
    mlp_ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Adds attention and MLP to the tokens."""
        _, height, width, features = x.shape
        size = self.window
        rows, columns = -(-height // size), -(-width // size)  # of windows
        # Where one window covers all, there is nothing to shift.
        shifts = tuple(size // 2 if self.shifted and n > 1 else 0 for n in (rows, columns))

        tokens = _norm(self.dtype, "norm1")(x)
        bottom, right = rows * size - height, columns * size - width
        tokens = jnp.pad(tokens, ((0, 0), (0, bottom), (0, right), (0, 0)))
        visible = None
        if any(shifts):
            tokens = jnp.roll(tokens, [-shift for shift in shifts], (1, 2))
            visible = same_region(rows, columns, size, shifts)
        attention = WindowAttention(self.heads, size, self.dtype, name="attn")
        tokens = attention(cut_windows(tokens, size), visible)
        tokens = join_windows(tokens, size, rows, columns)
        tokens = jnp.roll(tokens, shifts, (1, 2)) if any(shifts) else tokens

        x = x + tokens[:, :height, :width]
        mlp = Mlp(self.mlp_ratio * features, self.dtype, name="mlp")
        return x + mlp(_norm(self.dtype, "norm2")(x))


class PatchMerging(nn.Module):
    """Joins each 2x2 tokens to one of twice the features; zeros fill up an odd side.

    Attributes:
        dtype: dtype of activations.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Halves height and width."""
        batch, height, width, features = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, features)
        x = x.transpose(0, 1, 3, 4, 2, 5)  # features of a column of two before the next column's
        x = _norm(self.dtype, "norm")(x.reshape(*x.shape[:3], 4 * features))
        return _dense(2 * features, self.dtype, "reduction", use_bias=False)(x)


class SwinStage(nn.Module):
    """Halves height and width, except in the first stage; then blocks.

    Attributes:
        config: sizes.
        stage: number of the stage, from 0.
        dtype: dtype of activations.
        remat: as in `Swin`.
    """

    config: SwinConfig
    stage: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Computes the stage's features."""
        cfg = self.config
        block = nn.remat(SwinBlock) if self.remat else SwinBlock
        if self.stage:
            x = PatchMerging(self.dtype, name="downsample")(x)
        for i in range(cfg.depths[self.stage]):
            shifted = i % 2 == 1
            heads = cfg.heads[self.stage]
            x = block(heads, cfg.window, shifted, cfg.mlp_ratio, self.dtype, name=f"blocks_{i}")(x)
        return x


class Swin(nn.Module):
    """Swin: patch embedding, stages of blocks in plain and shifted windows, norm, linear head.

    Leaf paths follow timm's names: ``layers_0/blocks_1/attn/qkv/kernel``, ``layers_1/downsample/
    reduction/kernel``, … Images and planes of tokens that patches or windows do not cover are
    filled up with zeros at the right and at the bottom before windows are shifted, as in the
    authors' and torchvision's code (timm's shifts first).

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters are float32.
        remat: compute the blocks again for the backward pass instead of keeping what they computed.
    """

    config: SwinConfig
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
        bottom, right = (-size % cfg.patch_size for size in images.shape[1:3])
        images = jnp.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)))
        patch = (cfg.patch_size, cfg.patch_size)
        init = nn.initializers.truncated_normal(0.02)
        embed = nn.Conv(
            cfg.width, patch, patch, "VALID", kernel_init=init, dtype=self.dtype, name="patch_embed"
        )
        x = _norm(self.dtype, "patch_norm")(embed(images.astype(self.dtype)))
        for stage in range(len(cfg.depths)):
            x = SwinStage(cfg, stage, self.dtype, self.remat, name=f"layers_{stage}")(x)
            self.sow("intermediates", f"stage_{stage}", x)
        x = _norm(self.dtype, "norm")(x).astype(jnp.float32)
        return _dense(cfg.classes, jnp.float32, "head")(jnp.mean(x, axis=(1, 2)))


def _dense(features: int, dtype: Any, name: str, use_bias: bool = True) -> nn.Dense:
    init = nn.initializers.truncated_normal(0.02)
    return nn.Dense(features, use_bias=use_bias, kernel_init=init, dtype=dtype, name=name)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)
