import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax.bitstream import bytes_of, number_dtype, pack_bits, unpack_bits

jitted_unpack = jax.jit(unpack_bits, static_argnums=(1, 2))  # not an operation at a time


def test_by_hand():
    # 5, 2, 7 in three bits: 101, 010, 111 from the least significant bit on: 11|010|101 and 1.
    assert pack_bits(np.array([5, 2, 7], np.uint8), 3).tolist() == [0b11010101, 0b1]
    assert pack_bits(np.array([True, False, True]), 1).tolist() == [0b101]
    assert pack_bits(np.array([0x1234], np.uint16), 16).tolist() == [0x34, 0x12]
    assert pack_bits(np.array([0xABC, 0xDEF], np.uint16), 12).tolist() == [0xBC, 0xFA, 0xDE]


@pytest.mark.parametrize("width", range(1, 33))
def test_round_trip(width):
    check_round_trip(width, count=37, streams=2, seed=width)


@given(
    width=st.integers(1, 32),
    count=st.integers(1, 40),
    streams=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_round_trip_of_any_shape(width, count, streams, seed):
    check_round_trip(width, count, streams, seed)


def check_round_trip(width, count, streams, seed):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 2**width, (streams, count), np.uint64).astype(number_dtype(width))
    packed = pack_bits(numbers, width)
    assert packed.shape == (streams, bytes_of(count, width))
    back = jitted_unpack(packed, count, width)
    assert back.dtype == number_dtype(width)
    assert np.array_equal(back, numbers)


@pytest.mark.parametrize("width", [3, 5])
def test_numbers_beyond_one_chunk(width, monkeypatch):
    monkeypatch.setattr("ssvq_jax.bitstream._CHUNK", 64)
    numbers = np.random.default_rng(0).integers(0, 2**width, 1000).astype(np.uint8)
    assert np.array_equal(jitted_unpack(pack_bits(numbers, width), 1000, width), numbers)
