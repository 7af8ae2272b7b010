"""Checksums of the leaves of a training state, computed where the leaves are."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

_SPREAD = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: neighbours get distant numbers


def leaf_checksums(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Computes a checksum of every leaf from the bits of its elements and their positions.

    The checksum of a leaf is the sum modulo 2^32 of a hash of every element together with its
    position. Integers add up to the same sum in any order, so it does not depend on how a leaf is
    sharded, and each device reads its own part only. A change of one element always changes the
    sum, since the hash is one-to-one; other changes go unnoticed with a probability of 2^-32.

    The hash is the finalizer of MurmurHash3 (Austin Appleby, public domain).

    Args:
        leaves: arrays or typed PRNG keys by name.

    Returns:
        Eight hexadecimal digits by name.

    Example:
        >>> leaf_checksums({"bias": jnp.zeros(2), "scale": jnp.ones(2)})
        {'bias': '92ca2f0e', 'scale': '7a2b704e'}
    """
    # One after the other: programs that wait for each other's devices can block the CPU's threads.
    return {name: f"{int(_checksum(leaf)):08x}" for name, leaf in leaves.items()}


def damaged_leaves(leaves: Mapping[str, Any], expected: Mapping[str, str]) -> list[str]:
    """Lists the leaves whose checksum is not the expected one.

    Args:
        leaves: arrays by name.
        expected: what `leaf_checksums` gave when they were written.

    Returns:
        Their names.
    """
    return [name for name, found in leaf_checksums(leaves).items() if found != expected.get(name)]


@jax.jit
def _checksum(leaf: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    words = _words(leaf)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += place * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ (position * _SPREAD)), dtype=jnp.uint32)


def _words(leaf: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of an array as 32-bit words; an element of 64 bits gives two, along a new axis."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype.itemsize == 8:
        return lax.bitcast_convert_type(leaf, jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return leaf.astype(jnp.uint32)


def _mix(word: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
