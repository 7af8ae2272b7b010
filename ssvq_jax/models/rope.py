"""Rotary position embeddings (Su et al., arXiv 2104.09864) in the half-rotation layout."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_frequencies(
    head_dim: int, theta: float, factors: Sequence[float] = ()
) -> Float[np.ndarray, " half"]:
    """Calculates the radians that each pair of features turns by from one position to the next.

    Args:
        head_dim: features of a head, ``2 * half``.
        theta: base of the wavelengths: ``theta ** (-2 i / head_dim)`` for pair ``i``.
        factors: what each frequency is divided by, ``half`` of them; none for 1.

    Returns:
        Frequencies, float32.

    Example:
        >>> rope_frequencies(4, 10_000.0).tolist()
        [1.0, 0.009999999776482582]
    """
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (plain / np.asarray(factors) if factors else plain).astype(np.float32)


def llama3_factors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_frequency: float,
    high_frequency: float,
    trained_length: int,
) -> tuple[float, ...]:
    """Calculates the factors by which Llama 3.1 and later stretch the rotations to longer contexts.

    Rotations that turn more than ``high_frequency`` times in ``trained_length`` positions stay as
    they are, those that turn less than ``low_frequency`` times slow down by ``factor``, and in
    between the frequency goes over linearly in the number of turns (Grattafiori et al.,
    arXiv 2407.21783; the formula is in Meta's published code).

    Args:
        head_dim: features of a head.
        theta: base of the wavelengths.
        factor: how much longer the context becomes.
        low_frequency: turns below which a rotation slows down by ``factor``.
        high_frequency: turns above which it stays; more than ``low_frequency``.
        trained_length: positions of the first training.

    Returns:
        What each frequency is divided by, ``head_dim / 2`` numbers from 1 to ``factor``.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> scaling = dict(factor=8.0, low_frequency=1.0, high_frequency=4.0, trained_length=8192)
        >>> [round(x, 2) for x in llama3_factors(8, 500_000.0, **scaling)]
        [1.0, 1.0, 2.69, 8.0]
    """
    if not (factor >= 1 and 0 < low_frequency < high_frequency and trained_length > 0):
        raise ValueError(
            f"Llama 3 rope scaling with factor={factor}, low_frequency={low_frequency}, "
            f"high_frequency={high_frequency}, trained_length={trained_length}: give a factor of "
            "at least 1 and frequencies 0 < low < high"
        )
    turns = trained_length * rope_frequencies(head_dim, theta).astype(np.float64) / (2 * math.pi)
    share = np.clip((turns - low_frequency) / (high_frequency - low_frequency), 0, 1)
    return tuple((1 / ((1 - share) / factor + share)).tolist())


def rotate(
    features: Float[Array, "b t n d"],
    positions: Int[Array, " t"],
    frequencies: Float[np.ndarray, " d/2"],
) -> Float[Array, "b t n d"]:
    """Turns features ``(i, i + d / 2)`` of each head by position times frequency ``i``.

    This is the half-rotation layout of Hugging Face's weights; Meta's and GGUF's pair features
    ``(2 i, 2 i + 1)``, so that their query and key kernels have the rows in another order.

    Args:
        features: queries or keys of ``n`` heads.
        positions: positions of the ``t`` tokens.
        frequencies: radians a position.

    Returns:
        Turned features, computed in float32, in the dtype of ``features``.
    """
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    cos, sin = (x[None, :, None, :] for x in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(features.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(features.dtype)
