"""Inverted residual blocks, which MobileNets and EfficientNets are made of (arXiv 1801.04381)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax.models.spatial import convolve


class Numerics(NamedTuple):
    """What implementations of one network differ in.

    Attributes:
        padding: ``symmetric`` pads all four sides alike, as PyTorch does; ``same`` is TensorFlow's
            rule, which pads the bottom and right more where the stride does not fit.
        epsilon: batch norm's addend to the variance.
        momentum: share of batch norm's running statistics that a training step leaves.
    """

    padding: Literal["symmetric", "same"]
    epsilon: float
    momentum: float


PYTORCH = Numerics("symmetric", 1e-5, 0.9)
TENSORFLOW = Numerics("same", 1e-3, 0.99)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Sizes of one block.

    Attributes:
        inputs: input features.
        hidden: features of the depthwise convolution; without the 1 x 1 convolution before it
            where they equal ``inputs``.
        features: output features.
        kernel: height and width of the depthwise convolution.
        stride: its stride.
        dilation: its dilation.
        squeeze: features inside squeeze and excitation (arXiv 1709.01507); 0 for none.
        activation: ``relu``, ``relu6`` or ``hard_swish``.
    """

    inputs: int
    hidden: int
    features: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    squeeze: int = 0
    activation: str = "relu6"

    @property
    def expands(self) -> bool:
        """Whether a 1 x 1 convolution comes before the depthwise one."""
        return self.hidden != self.inputs


Stages = tuple[tuple[BlockSpec, ...], ...]


class Stage(NamedTuple):
    """A row of a network's table: blocks of which only the first has a stride.

    Attributes:
        expand: hidden features over input features.
        features: output features at width 1.
        repeats: blocks at depth 1.
        stride: stride of the first block.
        kernel: height and width of the depthwise convolutions.
    """

    expand: int
    features: int
    repeats: int
    stride: int
    kernel: int = 3


def make_divisible(channels: float) -> int:
    """Rounds to a multiple of 8 that is at least 90 % of the number.

    Example:
        >>> make_divisible(16 * 1.3), make_divisible(24 * 0.35), make_divisible(18.0)
        (24, 8, 24)
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def scaled_blocks(table: Sequence[Stage], inputs: int, width: float) -> Stages:
    """Lays out the blocks of a table.

    Args:
        table: the network's stages.
        inputs: features of the stem.
        width: multiplies the features of each stage.

    Returns:
        The blocks of each stage.
    """
    stages = []
    for row in table:
        features, blocks = make_divisible(row.features * width), []
        for i in range(row.repeats):
            stride = row.stride if i == 0 else 1
            blocks.append(BlockSpec(inputs, row.expand * inputs, features, row.kernel, stride))
            inputs = features
        stages.append(tuple(blocks))
    return tuple(stages)


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the function that a `BlockSpec` names."""
    return {"relu": jax.nn.relu, "relu6": jax.nn.relu6, "hard_swish": jax.nn.hard_swish}[name]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and an activation.

    Attributes:
        features: output features.
        numerics: padding and constants.
        kernel: height and width.
        stride: step between outputs.
        dilation: step between the inputs of one output.
        groups: groups of features that do not mix.
        activation: as in `BlockSpec`; None for none.
        dtype: dtype of activations.
    """

    features: int
    numerics: Numerics
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    activation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        """Transforms a feature map."""
        side = (self.kernel - 1) // 2 * self.dilation
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            "SAME" if self.numerics.padding == "same" else [(side, side), (side, side)],
            kernel_dilation=self.dilation,
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        x = nn.BatchNorm(
            not train,
            momentum=self.numerics.momentum,
            epsilon=self.numerics.epsilon,
            # Pooled features of a few images lie close together: the fast formula would cancel.
            use_fast_variance=x.shape[1] * x.shape[2] > 1,
            name="bn",
        )(x.astype(jnp.float32)).astype(self.dtype)
        return activation(self.activation)(x) if self.activation else x


class SqueezeExcite(nn.Module):
    """Gates each feature by what all pixels hold (arXiv 1709.01507), as MobileNetV3 does it."""

    squeeze: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Scales the features."""
        pooled = x.mean((1, 2))
        hidden = jax.nn.relu(nn.Dense(self.squeeze, dtype=self.dtype, name="reduce")(pooled))
        gate = nn.Dense(x.shape[-1], dtype=self.dtype, name="expand")(hidden)
        return x * jax.nn.hard_sigmoid(gate)[:, None, None, :]


class InvertedResidual(nn.Module):
    """Widens, convolves each feature alone, and projects to few features without activation."""

    spec: BlockSpec
    numerics: Numerics
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        """Transforms a feature map; adds it where the shape stays."""
        spec, numerics, shortcut = self.spec, self.numerics, x
        shared: dict[str, Any] = {"activation": spec.activation, "dtype": self.dtype}
        if spec.expands:
            x = ConvNorm(spec.hidden, numerics, name="expand", **shared)(x, train)
        x = ConvNorm(
            spec.hidden,
            numerics,
            spec.kernel,
            spec.stride,
            spec.dilation,
            groups=spec.hidden,
            name="depthwise",
            **shared,
        )(x, train)
        if spec.squeeze:
            x = SqueezeExcite(spec.squeeze, self.dtype, name="se")(x)
        x = ConvNorm(spec.features, numerics, dtype=self.dtype, name="project")(x, train)
        return x + shortcut if spec.stride == 1 and spec.features == spec.inputs else x


def block_paths(stages: Stages) -> Iterator[tuple[str, BlockSpec]]:
    """Yields each block's name in the tree, ``blocks_STAGE_INDEX``, with its sizes."""
    for i, blocks in enumerate(stages):
        for j, spec in enumerate(blocks):
            yield f"blocks_{i}_{j}", spec


def trunk(
    module: Any,
    images: Float[Array, "b h w c"],
    activation: str,
    train: bool,
    final: int | None = None,
) -> list[Float[Array, "b _h _w _c"]]:
    """Stem and blocks, as submodules of the module that calls it in its compact method.

    Args:
        module: has ``config.stages``, ``config.numerics`` and ``dtype``; sows each stage's output.
        images: normalised images.
        activation: of the stem and the last convolution.
        train: normalise by the batch's statistics.
        final: features of a last 1 x 1 convolution, if there is one.

    Returns:
        The feature map after each stage, and of the last convolution.
    """
    stages, numerics, dtype = module.config.stages, module.config.numerics, module.dtype
    shared: dict[str, Any] = {"activation": activation, "dtype": dtype}
    x = images.astype(dtype)
    x = ConvNorm(stages[0][0].inputs, numerics, 3, 2, name="stem", **shared)(x, train)
    blocks = block_paths(stages)
    features = []
    for i, stage in enumerate(stages):
        for name, spec in itertools.islice(blocks, len(stage)):
            x = InvertedResidual(spec, numerics, dtype, name=name)(x, train)
        module.sow("intermediates", f"stage_{i}", x)
        features.append(x)
    if final is not None:
        features.append(ConvNorm(final, numerics, name="final", **shared)(x, train))
    return features
