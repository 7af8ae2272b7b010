"""Convolution and pooling in operations that XLA runs fast on CPUs, too.

Other platforms get XLA's own. Which of the two a program has is decided when it is lowered, so that
one that was traced here can be exported to a TPU.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Padding = str | Sequence[tuple[int, int]]


def convolve(
    lhs: Float[Array, "b h w c"],
    rhs: Float[Array, "k l i d"],
    window_strides: Sequence[int],
    padding: Padding,
    *,
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    precision: Any = None,
    **others: Any,
) -> Float[Array, "b h2 w2 d"]:
    """Convolves NHWC images with HWIO kernels, for ``flax.linen.Conv(conv_general_dilated=...)``.

    On CPUs a 1 x 1 convolution is one matrix product (XLA's own gradient by the kernel takes three
    to ten times as long), and one of each feature alone is a sum of shifted images (XLA's own takes
    up to thirty times as long).

    Args:
        lhs: images.
        rhs: kernels.
        window_strides: steps between outputs.
        padding: ``SAME``, ``VALID``, or the pixels before and after, of height and of width.
        rhs_dilation: steps between the inputs of one output.
        feature_group_count: groups of features that do not mix.
        precision: of the products.
        others: further arguments of ``jax.lax.conv_general_dilated``.

    Returns:
        Feature maps.

    Example:
        >>> images, kernels = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
        >>> convolve(images, kernels, (1, 1), "SAME", feature_group_count=2)[0, :, :, 0]
        Array([[4., 6., 6., 4.],
               [6., 9., 9., 6.],
               [6., 9., 9., 6.],
               [4., 6., 6., 4.]], dtype=float32)
    """
    strides, dilation = tuple(window_strides), tuple(rhs_dilation)
    own = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        feature_group_count=feature_group_count,
        precision=precision,
        **{"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **others},
    )
    extent = tuple((n - 1) * step + 1 for n, step in zip(rhs.shape[:2], dilation, strict=True))
    if isinstance(padding, str):
        pads = tuple(jax.lax.padtype_to_pads(lhs.shape[1:3], extent, strides, padding))
    else:
        pads = tuple((first, last) for first, last in padding)
    if feature_group_count == 1 and extent == (1, 1) and not any(sum(pad) for pad in pads):
        fast = functools.partial(_pointwise, strides=strides, precision=precision)
    elif feature_group_count == lhs.shape[-1] == rhs.shape[-1]:
        size = jax.eval_shape(own, lhs, rhs).shape[1:3]
        fast = functools.partial(
            _depthwise, strides=strides, pads=pads, dilation=dilation, size=size
        )
    else:
        return own(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=fast, default=own)


@functools.partial(jax.jit, static_argnames=("strides", "precision"))
def _pointwise(
    images: Float[Array, "b h w c"],
    kernel: Float[Array, "1 1 c d"],
    *,
    strides: tuple[int, ...],
    precision: Any,
) -> Float[Array, "b h2 w2 d"]:
    """One product of two matrices: with more axes the kernel's gradient would be slow again."""
    images = images[:, :: strides[0], :: strides[1]]
    rows = images.reshape(-1, images.shape[-1])
    return jnp.matmul(rows, kernel[0, 0], precision=precision).reshape(*images.shape[:3], -1)


# Compiled on their own, so that calls outside of jit find them compiled the next time.
@functools.partial(jax.jit, static_argnames=("strides", "pads", "dilation", "size"))
def _depthwise(
    images: Float[Array, "b h w c"],
    kernel: Float[Array, "k l 1 c"],
    *,
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    size: tuple[int, ...],
) -> Float[Array, "b h2 w2 c"]:
    """Adds up the image shifted by each place of the kernel, times the weights there.

    One image after the other, since it then stays in the cache for all the shifts. Shifted images
    are made again for the backward pass, which is faster than to read them from memory.
    """
    height, width, _, channels = kernel.shape
    # A sum in 16 bits would lose what is added last.
    wide = jnp.float32 if images.dtype.itemsize < 4 else images.dtype

    def row(padded: Array, weights: Array, i: int) -> Array:
        """The share of the kernel's i-th row."""
        shifted = _every(padded, 0, i * dilation[0], strides[0], size[0])
        # Split, not indexed: the gradient then puts the sums beside each other once.
        places = jax.lax.split(weights, [1] * width)
        shares = [
            _every(shifted, 1, j * dilation[1], strides[1], size[1]) * place[None]
            for j, place in enumerate(places)
        ]
        return functools.reduce(jnp.add, shares)

    def image(pixels: Array) -> Array:
        padded = jnp.pad(pixels, [*pads, (0, 0)]).astype(wide)
        weights = kernel.reshape(height, width, channels).astype(wide)
        rows = [
            jax.checkpoint(functools.partial(row, i=i))(padded, weights[i]) for i in range(height)
        ]
        return functools.reduce(jnp.add, rows).astype(images.dtype)

    return jax.lax.map(jax.checkpoint(image), images)


def max_pool(
    images: Float[Array, "b h w c"], size: int, stride: int, pad: int
) -> Float[Array, "b h2 w2 c"]:
    """Largest value of each window.

    The gradient goes to the first of equal values, as in XLA's own, which takes ten times as long.

    Args:
        images: images.
        size: height and width of a window.
        stride: step between windows.
        pad: pixels of minus infinity on all four sides.

    Returns:
        Feature maps.

    Example:
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2, 2, 0)[0, :, :, 0]
        Array([[ 5.,  7.],
               [13., 15.]], dtype=float32)
    """

    def own(images: Array) -> Array:
        window, strides, pads = (size, size), (stride, stride), ((pad, pad), (pad, pad))
        return nn.max_pool(images, window, strides, pads)  # pyright: ignore[reportArgumentType]

    shifted = functools.partial(_shifted_max, size=size, stride=stride, pad=pad)
    return jax.lax.platform_dependent(images, cpu=shifted, default=own)


@functools.partial(jax.jit, static_argnames=("size", "stride", "pad"))
def _shifted_max(
    images: Float[Array, "b h w c"], *, size: int, stride: int, pad: int
) -> Float[Array, "b h2 w2 c"]:
    """Compares the image with itself shifted, one image after the other as in `_depthwise`."""

    def image(pixels: Array) -> Array:
        x = jnp.pad(pixels, [(pad, pad), (pad, pad), (0, 0)], constant_values=-jnp.inf)
        for axis in (1, 0):  # rows last: of equal values the first is that of the first row
            count = (x.shape[axis] - size) // stride + 1
            x = functools.reduce(_larger, (_every(x, axis, i, stride, count) for i in range(size)))
        return x

    return jax.lax.map(jax.checkpoint(image), images)


def _larger(first: Array, second: Array) -> Array:
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def _every(x: Array, axis: int, first: int, stride: int, count: int) -> Array:
    """Takes ``count`` slices along an axis, ``stride`` apart."""
    return jax.lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis)
