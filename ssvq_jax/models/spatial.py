"""Convolution and pooling in operations that XLA runs fast on CPUs, too.

Other platforms get XLA's own. Which of the two a program has is decided when it is lowered, so that
one that was traced here can be exported to a TPU.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = _NHWC,
    feature_group_count: int = 1,
    precision: Any = None,
    **others: Any,
) -> Array:
    """Does what ``jax.lax.conv_general_dilated`` does, for `flax.linen.Conv`.

    On CPUs a 1 x 1 convolution is one matrix product (XLA's own gradient by the kernel takes three
    to ten times as long), and one of each feature alone is a sum of shifted images (XLA's own takes
    up to thirty times as long). That is for floats, NHWC images and HWIO kernels; all else is
    XLA's own.

    Args:
        lhs: images.
        rhs: kernels.
        window_strides: steps between outputs.
        padding: ``SAME``, ``VALID``, or the pixels before and after, of height and of width.
        lhs_dilation: steps between inputs.
        rhs_dilation: steps between the inputs of one output.
        dimension_numbers: layout.
        feature_group_count: groups of features that do not mix.
        precision: of the products.
        others: further arguments of ``jax.lax.conv_general_dilated``.

    Returns:
        Feature maps.

    Raises:
        ValueError, TypeError: as XLA's own, for what does not fit.

    Example:
        >>> images, kernels = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
        >>> convolve(images, kernels, (1, 1), "SAME", feature_group_count=2)[0, :, :, 0]
        Array([[4., 6., 6., 4.],
               [6., 9., 9., 6.],
               [6., 9., 9., 6.],
               [4., 6., 6., 4.]], dtype=float32)
    """
    own = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        **others,
    )
    shape = jax.eval_shape(own, lhs, rhs).shape  # first of all: it says what does not fit
    layout = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if (
        others
        or lhs.ndim != 4
        or layout != jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        or any(step != 1 for step in lhs_dilation or ())
        or not jnp.issubdtype(lhs.dtype, jnp.floating)
        or 0 in lhs.shape
    ):
        return own(lhs, rhs)
    strides, dilation = tuple(window_strides), tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        extent = [(n - 1) * step + 1 for n, step in zip(rhs.shape, dilation, strict=False)]
        pads = tuple(jax.lax.padtype_to_pads(lhs.shape[1:3], extent, strides, padding))
    else:
        pads = tuple((first, last) for first, last in padding)
    if feature_group_count == 1 and rhs.shape[:2] == (1, 1) and not any(map(any, pads)):
        fast = functools.partial(_pointwise, strides=strides, precision=precision)
    elif feature_group_count == lhs.shape[-1] == rhs.shape[-1] and min(map(min, pads)) >= 0:
        fast = functools.partial(
            _depthwise, strides=strides, pads=pads, dilation=dilation, size=shape[1:3]
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
    product = jnp.matmul(rows, kernel[0, 0], precision=precision)
    return product.reshape(*images.shape[:3], kernel.shape[-1])


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
    """Adds up the image shifted by each place of the kernel, times the weights there."""
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

    return _each(image, images)


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

    if 0 in images.shape or min(images.shape[1:3]) + 2 * pad < size:
        return own(images)
    shifted = functools.partial(_shifted_max, size=size, stride=stride, pad=pad)
    return jax.lax.platform_dependent(images, cpu=shifted, default=own)


@functools.partial(jax.jit, static_argnames=("size", "stride", "pad"))
def _shifted_max(
    images: Float[Array, "b h w c"], *, size: int, stride: int, pad: int
) -> Float[Array, "b h2 w2 c"]:
    """Compares the image with itself shifted."""

    def image(pixels: Array) -> Array:
        x = jnp.pad(pixels, [(pad, pad), (pad, pad), (0, 0)], constant_values=-jnp.inf)
        for axis in (1, 0):  # rows last: of equal values the first is that of the first row
            count = (x.shape[axis] - size) // stride + 1
            x = functools.reduce(_larger, (_every(x, axis, i, stride, count) for i in range(size)))
        return x

    return _each(image, images)


def _each(function: Callable[[Array], Array], images: Array) -> Array:
    """Applies a function to one image after the other.

    An image then stays in the cache for all its shifts, which the backward pass makes again: that
    is faster than to read them from memory. A batch may be cut over the devices, and a loop over
    its axis would gather it, so that the loop is over the images of one device's share.
    """
    count = images.shape[0]
    # In an exported program the batch may have no size yet.
    shares = math.gcd(count, jax.local_device_count()) if isinstance(count, int) else 1
    if shares == 1:
        return jax.lax.map(jax.checkpoint(function), images)
    cut = images.reshape(shares, count // shares, *images.shape[1:]).swapaxes(0, 1)
    found = jax.lax.map(jax.checkpoint(jax.vmap(function)), cut).swapaxes(0, 1)
    return found.reshape(count, *found.shape[2:])


def _larger(first: Array, second: Array) -> Array:
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def _every(x: Array, axis: int, first: int, stride: int, count: int) -> Array:
    """Takes ``count`` slices along an axis, ``stride`` apart."""
    return jax.lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis)
