"""PVQ of weights and activations: bits, levels, rotation, blocks, indices that do not exist."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ssvq_jax import LeafSpec, Pyramid, load_recipe
from ssvq_jax.quantizers import pyramid
from ssvq_jax.quantizers.activations import bits_per_activation, quantize_activations
from ssvq_jax.quantizers.base import Parts
from ssvq_jax.quantizers.pyramid_vector import amplitude_levels, pulses_for
from ssvq_jax.quantizers.streams import check_streams, pack_fields
from ssvq_jax.rotation import Rotation

KEY = jax.random.key(0)
SPEC = LeafSpec("w", (16, 48), "float32")


def relative_error(weight, decoded):
    return float(jnp.sum(jnp.square(weight - decoded)) / jnp.sum(jnp.square(weight)))


def test_pulses_fill_the_budget():
    for bits, dim, amplitude_bits in [(2.0, 16, 4), (3.0, 8, 2), (1.5, 32, 0), (4.0, 16, 3)]:
        pulses = pulses_for(bits, dim, amplitude_bits)
        assert pyramid.width(dim, pulses) + amplitude_bits <= bits * dim
        assert pyramid.width(dim, pulses + 1) + amplitude_bits > bits * dim


def test_budgets_out_of_reach_are_named_with_what_is_nearest():
    # One pulse of 8 coordinates: 16 points, 4 bits; with 4 for the amplitude, 8 bits of 8 weights.
    with pytest.raises(ValueError, match=r"bits=0.5 .* one pulse takes 1.0 bits"):
        pulses_for(0.5, 8, 4)
    with pytest.raises(ValueError, match=r"bits=30.0 .* the most to be had are \d+\.\d+ bits"):
        pulses_for(30.0, 8, 4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_presets_take_the_bits_that_they_name(bits):
    rules = load_recipe(f"pvq-{bits}bit")
    (quantizer,) = {one.quantizer for one in rules if isinstance(one.quantizer, Pyramid)}
    stored = quantizer.storage(LeafSpec("w", (256, 1024), "float32")).bits / 256 / 1024
    assert bits - 1 / 16 <= stored - 16 / 1024 <= bits


def test_amplitudes_are_quantiles_of_the_share():
    shares = amplitude_levels(8, 96, 3).astype(np.float64) ** 2 / 96
    found = stats.beta(4, 44).cdf(shares)
    np.testing.assert_allclose(found, (np.arange(8) + 0.5) / 8, atol=1e-3)
    assert amplitude_levels(4, 4, 2).tolist() == [2, 2, 2, 2]


def test_more_pulses_and_more_amplitudes_lower_the_error():
    weight = jax.random.normal(KEY, SPEC.shape)
    errors = [
        relative_error(weight, q.decode(*q.init(KEY, weight, SPEC), SPEC))
        for q in (Pyramid(8, 3, 1), Pyramid(8, 8, 1), Pyramid(8, 8, 4), Pyramid(8, 20, 4))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("axis", [0, 1])
def test_rotation_spreads_outliers_and_is_undone(axis):
    quantizer = Pyramid(8, 8, 4, axis=axis)
    weight = jax.random.normal(KEY, SPEC.shape)
    weight = weight.at[3, 5].set(40.0).at[9, 30].set(-60.0)
    plain = Pyramid(8, 8, 4, axis=axis, rotate=False)
    errors = [
        relative_error(weight, q.decode(*q.init(KEY, weight, SPEC), SPEC))
        for q in (quantizer, plain)
    ]
    assert errors[0] < errors[1]
    # The rotated weight, coded without rotation, is the rotated result.
    rotation = Rotation(SPEC.shape[axis], quantizer.seed)
    rotated = jnp.moveaxis(rotation.apply(jnp.moveaxis(weight, axis, -1)), -1, axis)
    encoded = plain.init(KEY, rotated, SPEC)
    decoded = jnp.moveaxis(plain.decode(*encoded, SPEC), axis, -1)
    back = jnp.moveaxis(rotation.inverse(decoded), -1, axis)
    expected = quantizer.decode(*quantizer.init(KEY, weight, SPEC), SPEC)
    np.testing.assert_allclose(back, expected, atol=1e-5 * 60)


def test_what_was_decoded_is_encoded_to_the_same_codes():
    quantizer = Pyramid(8, 8, 4, rotate=False)
    learned, fixed = quantizer.init(KEY, jax.random.normal(KEY, SPEC.shape), SPEC)
    decoded = quantizer.decode(learned, fixed, SPEC)
    again = quantizer.slice_requantize(decoded, learned, SPEC, None)
    chex.assert_trees_all_equal(again.fixed, fixed)
    assert np.array_equal(again.learned["scale"], learned["scale"])


def test_blocks_of_rows_are_requantized_alone():
    quantizer = Pyramid(8, 8, 4)
    weight = jax.random.normal(KEY, SPEC.shape)
    learned, _ = quantizer.init(KEY, weight, SPEC)
    other = weight + 0.3
    whole = quantizer.slice_requantize(other, learned, SPEC, None)
    block = LeafSpec("w", (4, 48), "float32")
    part = quantizer.slice_requantize(other[4:8], {"scale": learned["scale"][4:8]}, block, None)
    assert np.array_equal(part.fixed["codes"], whole.fixed["codes"][24:48])
    assert np.array_equal(quantizer.decode(*part, block), quantizer.decode(*whole, SPEC)[4:8])
    assert quantizer.slice_parts(SPEC) == Parts(48, 1, {"scale": 0})
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(2, 4, 48\).* matrices only"):
        quantizer.slice_parts(LeafSpec("w", (2, 4, 48), "float32"))


@pytest.mark.parametrize("quantizer", [Pyramid(8, 8, 4), Pyramid(8, 60, 4)])
def test_indices_that_do_not_exist_are_refused(quantizer):
    encoded = quantizer.init(KEY, jax.random.normal(KEY, SPEC.shape), SPEC)
    fields = quantizer.pack(*encoded, SPEC)
    check_streams(quantizer, pack_fields(quantizer, fields, SPEC), SPEC)
    number = pyramid.count(quantizer.dim, quantizer.pulses)
    low = quantizer.index_words - 1
    fields["codes"] = fields["codes"].copy()
    fields["codes"][5] = number >> 32 * low
    if low:  # the highest word is one that exists
        fields["low_words"] = fields["low_words"].copy()
        fields["low_words"][5] = number & 0xFFFFFFFF
    with pytest.raises(ValueError, match="go up to 157184" if not low else "nothing together"):
        check_streams(quantizer, pack_fields(quantizer, fields, SPEC), SPEC)


@pytest.mark.usefixtures("as_installed")
def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="pulses=0"):
        Pyramid(pulses=0)
    with pytest.raises(ValueError, match="dim=256, pulses=512: an index has .* fewer pulses"):
        Pyramid(dim=256, pulses=512)
    with pytest.raises(ValueError, match="leaf 'w' .* dim=9 does not divide axis 1"):
        Pyramid(dim=9).storage(SPEC)


# Activations


def test_activations_get_better_with_bits_and_keep_their_scale():
    x = jax.random.normal(KEY, (5, 7, 64)) * jnp.logspace(-6, 6, 7)[None, :, None]
    settings = [(8, 3, 2), (8, 8, 3), (8, 24, 5)]
    bits = [bits_per_activation(64, *each) for each in settings]
    errors = [
        np.sum(np.square((x - quantize_activations(x, *each)) / x.std(axis=-1, keepdims=True)))
        for each in settings
    ]
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03 * x.size
    assert not np.any(quantize_activations(jnp.zeros((2, 64)), 8, 3, 2))


def test_activations_pass_gradients_on_and_refuse_other_widths():
    x = jax.random.normal(KEY, (3, 16))
    grad = jax.grad(lambda x: jnp.sum(2.0 * quantize_activations(x, 8, 4, 2)))(x)
    assert np.all(grad == 2)
    with pytest.raises(ValueError, match="dim=8 does not divide the 12 features"):
        quantize_activations(x[:, :12], 8, 4, 2)
