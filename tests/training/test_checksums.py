"""Tests of checksums of leaves: every change of a bit is seen, whatever the dtype and the place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax.training.checksums import damaged_leaves, leaf_checksums

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "int8", "uint8", "bool"]


def checksum(array) -> str:
    return leaf_checksums({"leaf": jnp.asarray(array)})["leaf"]


def by_hand(words: list[int]) -> str:
    """The sum of MurmurHash3's finalizer over words and positions, with Python's integers."""
    total, mask = 0, 2**32 - 1
    for position, word in enumerate(words):
        h = word ^ (position * 0x9E3779B9 & mask)
        h = (h ^ h >> 16) * 0x85EBCA6B & mask
        h = (h ^ h >> 13) * 0xC2B2AE35 & mask
        total += h ^ h >> 16
    return f"{total & mask:08x}"


def test_by_hand():
    words = [0, 1, 2**32 - 1, 0x3F800000, 7, 7]
    for shape in ((6,), (2, 3), (1, 6, 1)):
        assert checksum(np.array(words, np.uint32).reshape(shape)) == by_hand(words)
    floats = np.array([0.0, -0.0, 1.5, np.nan, np.inf, 1e-40], np.float32)
    assert checksum(floats) == by_hand(floats.view(np.uint32).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_every_flipped_bit_is_seen(dtype, data):
    array = np.random.default_rng(0).integers(0, 2, 24).astype(jnp.dtype(dtype)).reshape(4, 6)
    before = checksum(array)
    flipped = array.copy()
    place = data.draw(st.integers(0, array.nbytes - 1))
    bit = 0 if dtype == "bool" else data.draw(st.integers(0, 7))
    flipped.reshape(-1).view(np.uint8)[place] ^= 1 << bit
    assert checksum(flipped) != before


def test_swapped_values_are_seen():
    array = jnp.arange(64.0)
    seen = {checksum(array)} | {
        checksum(array.at[jnp.array([i, j])].set(array[jnp.array([j, i])]))
        for i, j in ((0, 1), (3, 60), (62, 63), (0, 63))
    }
    assert len(seen) == 5


def test_keys_and_complex_numbers():
    assert checksum(jax.random.key(1)) == checksum(jax.random.key_data(jax.random.key(1)))
    assert checksum(jax.random.key(1)) != checksum(jax.random.key(2))
    assert checksum(np.array([1 + 2j], np.complex64)) == checksum(np.array([[1.0, 2.0]], "f4"))


def test_damaged_leaves_are_named():
    leaves = {"a": jnp.ones(3), "b": jnp.zeros(2)}
    expected = leaf_checksums(leaves)
    assert damaged_leaves(leaves, expected) == []
    assert damaged_leaves({**leaves, "b": jnp.zeros(2).at[1].set(-0.0)}, expected) == ["b"]
    assert damaged_leaves(leaves, {"a": expected["a"]}) == ["b"]
