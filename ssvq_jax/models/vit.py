"""Vision transformers in the form of DeiT (Touvron et al., arXiv 2012.12877)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.spatial import convolve


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Attributes:
        image_size: height and width of the images.
        channels: image channels.
        patch_size: height and width of a patch; divides ``image_size``.
        width: features of a token.
        depth: number of blocks.
        heads: attention heads; divides ``width``.
        mlp_ratio: hidden features of the MLP over ``width``.
        classes: number of classes.
        distilled: a distillation token with a head of its own beside the class token's.
        stem: features of 3x3 convolutions of stride 2 before the patch embedding, which then cuts
            patches of ``patch_size / 2**len(stem)`` of what they leave (Xiao et al., "Early
            convolutions help transformers see better", arXiv 2106.14881; here with layer norm
            after each, so that there are no batch statistics).
    """

    image_size: int = 224
    channels: int = 3
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: int = 4
    classes: int = 1000
    distilled: bool = False
    stem: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes={self.classes}: give at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}"
            )
        if self.patch_size % 2 ** len(self.stem):
            raise ValueError(
                f"stem={self.stem}: patch_size={self.patch_size} is not {len(self.stem)} times even"
            )
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.truncated_normal(0.02)
    return nn.Dense(features, kernel_init=init, dtype=dtype, name=name)


def _stem_layer(
    images: Float[Array, "b h w c"], features: int, dtype: Any, index: int
) -> Float[Array, "b i j d"]:
    """Convolution, norm over the channels, ReLU; to be called inside of a module."""
    conv = nn.Conv(
        features, (3, 3), 2, padding=1, use_bias=False, dtype=dtype, name=f"stem_{index}",
        kernel_init=nn.initializers.he_normal(), conv_general_dilated=convolve,
    )  # fmt: skip
    norm = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=f"stem_norm_{index}")
    return nn.relu(norm(conv(images)))


class Attention(nn.Module):
    """Multi-head self-attention with one kernel for queries, keys and values."""

    config: ViTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        """Mixes the tokens."""
        batch, length, width = tokens.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(tokens)
        qkv = qkv.reshape(batch, length, 3, self.config.heads, width // self.config.heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return _dense(width, self.dtype, "proj")(mixed.reshape(batch, length, width))


class Mlp(nn.Module):
    """Two dense layers with a GELU between them.

    Attributes:
        hidden: features between them.
        dtype: dtype of activations.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "*batch w"]) -> Float[Array, "*batch w"]:
        """Transforms each token."""
        hidden = _dense(self.hidden, self.dtype, "fc1")(tokens)
        return _dense(tokens.shape[-1], self.dtype, "fc2")(nn.gelu(hidden, approximate=False))


class Block(nn.Module):
    """Pre-norm transformer block."""

    config: ViTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        """Adds attention and MLP to the tokens."""
        norm1 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")
        norm2 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")
        tokens = tokens + Attention(self.config, self.dtype, name="attn")(norm1(tokens))
        hidden = self.config.mlp_ratio * self.config.width
        return tokens + Mlp(hidden, self.dtype, name="mlp")(norm2(tokens))


class ViT(nn.Module):
    """DeiT: patch embedding, class token, learned positions, blocks, norm, linear head.

    Leaf paths follow timm's names: ``patch_embed/kernel``, ``blocks_0/attn/qkv/kernel``, …; those
    of a stem are ``stem_0/kernel``, ``stem_norm_0/scale``, …

    Attributes:
        config: sizes.
        scan: stack the blocks' parameters on a leading axis (``blocks/attn/qkv/kernel``) and scan
            over them: compile time no longer grows with depth.
        dtype: dtype of activations; parameters are float32.
        remat: compute the blocks again for the backward pass instead of keeping what they computed.
    """

    config: ViTConfig
    scan: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Classifies images.

        Args:
            images: normalised images, NHWC.

        Returns:
            Logits, float32; of a distilled model the mean of its two heads', which it sows as
            ``class_logits`` and ``distillation_logits``.
        """
        cfg = self.config
        init = nn.initializers.truncated_normal(0.02)
        images = images.astype(self.dtype)
        for i, features in enumerate(cfg.stem):
            images = _stem_layer(images, features, self.dtype, i)
        side = cfg.patch_size // 2 ** len(cfg.stem)
        patch = (side, side)
        embed = nn.Conv(
            cfg.width, patch, patch, "VALID", kernel_init=init, dtype=self.dtype, name="patch_embed"
        )
        patches = embed(images).reshape(images.shape[0], -1, cfg.width)
        names = ["cls_token", "dist_token"] if cfg.distilled else ["cls_token"]
        learned = [self.param(name, init, (1, 1, cfg.width)).astype(self.dtype) for name in names]
        learned = [jnp.tile(token, (images.shape[0], 1, 1)) for token in learned]
        tokens = jnp.concatenate([*learned, patches], axis=1)
        positions = self.param("pos_embed", init, (1, tokens.shape[1], cfg.width))
        tokens = tokens + positions.astype(self.dtype)
        # Inside a scan nothing is computed twice by chance: no barrier is needed against it.
        block_class = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            blocks = nn.scan(
                lambda block, carry, _: (block(carry), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=cfg.depth,
            )
            tokens, _ = blocks(block_class(cfg, self.dtype, name="blocks"), tokens, None)
        else:
            for i in range(cfg.depth):
                tokens = block_class(cfg, self.dtype, name=f"blocks_{i}")(tokens)
                self.sow("intermediates", f"block_{i}", tokens)
        tokens = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(tokens)
        logits = _dense(cfg.classes, jnp.float32, "head")(tokens[:, 0].astype(jnp.float32))
        if not cfg.distilled:
            return logits
        taught = _dense(cfg.classes, jnp.float32, "head_dist")(tokens[:, 1].astype(jnp.float32))
        self.sow("intermediates", "class_logits", logits)
        self.sow("intermediates", "distillation_logits", taught)
        return (logits + taught) / 2
