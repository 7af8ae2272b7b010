import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssvq_jax import Uniform, load, make_plan, save
from ssvq_jax.bitstream import bytes_of
from ssvq_jax.packing.entropy import code, decode, entropy_bits

UNBOUNDED = 1 << 40  # so many bytes without coding that any coding is smaller


def test_entropy_by_hand():
    # Three of four: -3 log2(3/4) - log2(1/4).
    assert entropy_bits(np.array([3, 1])) == pytest.approx(3.245112497836531, abs=1e-12)
    assert entropy_bits(np.array([0, 7, 0])) == 0
    assert entropy_bits(np.array([2, 2, 2, 2])) == 16


def test_a_coded_field_by_hand():
    # Frequencies in little-endian 16 bits, the most frequent 65535, then 32-bit words.
    numbers = np.array([0, 0, 1, 0, 0, 3] * 50, np.uint8)
    coded = code(numbers, 4, UNBOUNDED)
    table = np.frombuffer(coded, "<u2", 4)
    assert table.tolist() == [65535, 65535 // 4 + 1, 0, 65535 // 4 + 1]
    assert (len(coded) - 8) % 4 == 0
    assert decode(coded, 4, 300).tolist() == numbers.tolist()


@pytest.mark.parametrize("values", [2, 16, 300])
def test_words_come_near_the_entropy(values):
    weights = 1.0 / np.arange(1, values + 1) ** 1.5
    numbers = np.random.default_rng(0).choice(values, 50_000, p=weights / weights.sum())
    least = entropy_bits(np.bincount(numbers, minlength=values)) / 8
    words = len(code(numbers, values, UNBOUNDED)) - 2 * values
    # 16-bit frequencies cost little, and the coder's state ends in at most two words.
    assert least <= words + 8
    assert words <= 1.001 * least + 8


distributions = st.one_of(
    st.lists(st.integers(1, 1000), min_size=2, max_size=20),  # any
    st.lists(st.sampled_from([0, 1, 60_000]), min_size=2, max_size=40).filter(any),  # skewed
    st.tuples(st.integers(2, 65536), st.integers(0, 1)).map(  # one value, the first or the last
        lambda drawn: (
            [0] * (drawn[1] * (drawn[0] - 1)) + [1] + [0] * (drawn[0] - 1) * (1 - drawn[1])
        )
    ),
)


@settings(max_examples=100)
@given(frequencies=distributions, count=st.sampled_from([1, 2, 7, 1000]), seed=st.integers(0, 99))
def test_round_trip(frequencies, count, seed):
    share = np.array(frequencies) / sum(frequencies)
    numbers = np.random.default_rng(seed).choice(len(share), count, p=share)
    coded = code(numbers, len(share), UNBOUNDED)
    assert np.array_equal(decode(coded, len(share), count), numbers)


@settings(max_examples=100)
@given(frequencies=distributions, count=st.integers(1, 4000), seed=st.integers(0, 99))
def test_coded_is_smaller_or_nothing(frequencies, count, seed):
    values = len(frequencies)
    share = np.array(frequencies) / sum(frequencies)
    numbers = np.random.default_rng(seed).choice(values, count, p=share)
    raw = bytes_of(count, (values - 1).bit_length())
    coded = code(numbers, values, raw)
    assert coded is None or len(coded) < raw
    least = 2 * values + entropy_bits(np.bincount(numbers, minlength=values)) / 8
    if coded is None:  # the table and the entropy alone, or these with the last words' rest
        assert least + 8 + 0.001 * raw >= raw
    else:
        assert len(coded) >= least - 1


def test_more_values_than_a_table_can_have_are_not_coded():
    assert code(np.zeros(10**6, np.uint32), 65537, UNBOUNDED) is None
    numbers = np.array([65535, 0, 65535] * 1000, np.uint16)
    assert np.array_equal(decode(code(numbers, 65536, UNBOUNDED), 65536, 3000), numbers)


def test_booleans_and_several_axes():
    signs = np.arange(4000).reshape(4, 1000) % 50 == 0
    coded = code(signs, 2, 500)
    assert np.array_equal(decode(coded, 2, 4000), signs.reshape(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coded: coded[:7], "7 bytes hold no table of 4 values"),
        (lambda coded: coded + b"\0", "hold no table of 4 values and coded words"),
        (lambda coded: bytes(8) + coded[8:], "no value of the highest frequency"),
        (lambda coded: coded + b"\1\0\0\0", "hold more than 600 numbers"),
        (lambda coded: coded[:8] + b"\xff\xff\xff\xff" * 100, "hold more than 600 numbers"),
    ],
)
def test_what_is_no_coded_field_is_refused(change, message):
    coded = code(np.array([0, 0, 1, 0, 0, 3] * 100, np.uint8), 4, UNBOUNDED)
    with pytest.raises(ValueError, match=message):
        decode(change(coded), 4, 600)


def test_a_count_that_the_bytes_cannot_hold_is_refused_before_it_takes_memory():
    coded = code(np.zeros(1000, np.uint8), 4, UNBOUNDED)
    with pytest.raises(ValueError, match=f"{2**44}"):
        decode(coded, 4, 2**44)


def test_a_file_codes_the_leaves_that_gain(tmp_path):
    rare = jnp.where(jnp.arange(4096) % 64 == 0, 1.0, 0.0).reshape(64, 64)
    even = jnp.tile(jnp.array([-2.0, -1.0, 0.0, 1.0]), 1024).reshape(64, 64)  # all four levels
    plan = make_plan({"rare": rare, "even": even}, [(".*", Uniform(bits=2, per_channel=False))])
    packed = plan.finalize(plan.init(jax.random.key(1), {"rare": rare, "even": even}))
    sizes = {}
    for codec in ("plain", "entropy"):
        save(tmp_path / codec, packed, codec=codec)
        with load(tmp_path / codec) as file:
            sizes[codec] = file.file_bytes - file.header_bytes
            coded = {name: file.coded(name) for name in ("rare", "even")}
            decoded = file.decode()
            assert 8 * sizes[codec] == file.bits().model.total_bits
            rows = {row.name: row.bits for row in file.bits().rows}
        chex.assert_trees_all_equal(decoded, packed.decode())
        if codec == "plain":
            assert coded == {"rare": {}, "even": {}}
        else:
            assert coded["even"] == {}
            assert set(coded["rare"]) == {"levels"}
            assert rows["rare"] == {"levels": 8 * coded["rare"]["levels"], "step": 16}
            assert rows["even"] == {"levels": 2 * 4096, "step": 16}
    # 64 in 4096 numbers: 0.116 bits each instead of 2, and 8 bytes of table.
    least = entropy_bits(np.array([64, 4032])) / 8 + 8
    assert least <= sizes["entropy"] - (sizes["plain"] - 1024) <= least + 8
