"""Activations in the code of PVQ: what a layer sees if its inputs are quantized, too."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssvq_jax.quantizers import pyramid
from ssvq_jax.quantizers.base import check_integer, straight_through
from ssvq_jax.quantizers.pyramid_vector import amplitude_levels

_TINY = float(np.finfo(np.float32).tiny)


def quantize_activations(
    x: Float[Array, "*tokens m"], dim: int, pulses: int, amplitude_bits: int
) -> Float[Array, "*tokens m"]:
    """Quantizes and decodes every token's features, as `Pyramid` does rows of a weight.

    Each group of D features is s * a * p / |p|, with s the token's root mean square (16 bits), the
    amplitude a nearest to the group's and the point p nearest to its direction. Features should be
    rotated (`ssvq_jax.rotation.Rotation`) together with the weight that they are multiplied with.
    The gradient passes straight through.

    Args:
        x: activations; D divides m.
        dim: D.
        pulses: K.
        amplitude_bits: b, 0 to 8.

    Returns:
        The decoded activations, in the dtype of ``x``.

    Raises:
        ValueError: if D does not divide the features, or a setting is out of its range.

    Example:
        >>> x = jnp.array([[3.0, 3.0, 0.0, -3.0]])
        >>> quantize_activations(x, dim=4, pulses=3, amplitude_bits=0).round(2).tolist()
        [[3.0, 3.0, 0.0, -3.0]]
    """
    _check(x.shape[-1], dim, pulses, amplitude_bits)
    given = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    largest = jnp.max(jnp.abs(given), axis=1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1.0)
    tokens = given / unit
    scale = jnp.sqrt(jnp.mean(jnp.square(tokens), axis=1))
    groups = tokens.reshape(-1, dim)
    points = pyramid.nearest(groups, pulses).astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(jnp.square(points), axis=1, keepdims=True))
    directions = points / norms
    along = jnp.sum(groups * directions, axis=1).reshape(len(tokens), -1)
    levels = jnp.asarray(amplitude_levels(dim, x.shape[-1], amplitude_bits))
    between = (levels[1:] + levels[:-1]) / 2.0
    codes = jnp.searchsorted(between, along / jnp.maximum(scale, _TINY)[:, None])
    # The token's scale as it would be sent: 16 bits, of the features themselves.
    sent = (scale[:, None] * unit).astype(jnp.bfloat16).astype(jnp.float32)
    values = (levels[codes] * sent).reshape(-1, 1) * directions
    return straight_through(values.reshape(x.shape).astype(x.dtype), x)


def bits_per_activation(features: int, dim: int, pulses: int, amplitude_bits: int) -> float:
    """Bits that `quantize_activations` stands for: indices, amplitudes, and 16 a token.

    Example:
        >>> bits_per_activation(64, dim=8, pulses=8, amplitude_bits=4)
        3.0
    """
    _check(features, dim, pulses, amplitude_bits)
    return (pyramid.width(dim, pulses) + amplitude_bits) / dim + 16 / features


def _check(features: int, dim: int, pulses: int, amplitude_bits: int) -> None:
    check_integer("dim", dim, least=1, most=pyramid.MOST_DIM)
    check_integer("pulses", pulses, least=1, most=pyramid.MOST_PULSES)
    check_integer("amplitude_bits", amplitude_bits, least=0, most=8)
    if features % dim:
        raise ValueError(
            f"dim={dim} does not divide the {features} features of an activation: choose another"
        )
