"""Each method against its equations, on arrays small enough to work by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax import (
    ChannelRelaxed,
    ChannelRelaxedSignSplit,
    LeafSpec,
    Pyramid,
    SignSplit,
    Uniform,
    Vector,
)
from ssvq_jax.quantizers.base import round_scale, straight_through

KEY = jax.random.key(0)


# Straight-through estimators


def test_straight_through_gives_the_exact_value_and_the_surrogates_gradient():
    value, surrogate = jnp.float32(0.1), jnp.float32(1e8)
    out, grad = jax.value_and_grad(lambda s: straight_through(value, 3 * s))(surrogate)
    assert float(out) == float(value)  # surrogate + (value - surrogate) would give 0
    assert float(grad) == 3


def test_scales_are_rounded_to_bfloat16_inside_jit_too():
    scale = jnp.float32(1 / 3)
    assert float(jax.jit(round_scale)(scale)) == float(scale.astype(jnp.bfloat16)) != float(scale)


# VQ


def test_vector_gradient_of_a_codeword_is_the_sum_over_its_members():
    quantizer = Vector(codewords=2, dim=2, codebook_dtype="float32")
    spec = LeafSpec("w", (2, 4), "float32")
    learned = {"codebook": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    fixed = {"codes": jnp.array([0, 1, 1, 1], jnp.uint8)}
    decoded = quantizer.decode(learned, fixed, spec)
    assert decoded.tolist() == [[1, 2, 3, 4], [3, 4, 3, 4]]
    upstream = jnp.array([[1.0, 10.0, 2.0, 20.0], [3.0, 30.0, 4.0, 40.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    assert grad["codebook"].tolist() == [[1, 10], [9, 90]]


def test_vector_finds_two_clear_clusters():
    quantizer = Vector(codewords=2, dim=2, codebook_dtype="float32")
    weight = jnp.array([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 6.0, 6.0]])
    spec = LeafSpec("w", (2, 4), "float32")
    decoded = quantizer.decode(*quantizer.init(KEY, weight, spec), spec)
    assert decoded.tolist() == [[0.5, 0.5, 5.5, 5.5], [0.5, 0.5, 5.5, 5.5]]


def test_int8_codebook_by_hand():
    # max|C| = 254 gives the scale 2; 3 rounds half to even: 1.5 -> 2 levels.
    quantizer = Vector(codewords=2, dim=2)
    spec = LeafSpec("w", (1, 4), "float32")
    learned = {"codebook": jnp.array([[254.0, 3.0], [-127.0, 0.9]])}
    fixed = {"codes": jnp.array([0, 1], jnp.uint8)}
    fields = quantizer.pack(learned, fixed, spec)
    assert fields["codebook"].tolist() == [[127, 2], [-64, 0]]
    assert float(fields["codebook_scale"]) == 2
    assert quantizer.decode(learned, fixed, spec).tolist() == [[254, 4, -128, 0]]
    grad = jax.grad(lambda p: jnp.sum(quantizer.decode(p, fixed, spec)))(learned)
    assert grad["codebook"].tolist() == [[1, 1], [1, 1]]  # straight-through the rounding


def test_padding_does_not_pull_codewords_to_zero():
    quantizer = Vector(codewords=2, dim=2, pad=True, codebook_dtype="float32")
    weight = jnp.array([[4.0, 4.0, 9.0]])  # padded: (4, 4), (9, 0)
    spec = LeafSpec("w", (1, 3), "float32")
    learned, fixed = quantizer.init(KEY, weight, spec)
    assert quantizer.decode(learned, fixed, spec).tolist() == [[4, 4, 9]]


# SSVQ


def test_sign_split_by_hand():
    quantizer = SignSplit(codewords=2, dim=2, codebook_dtype="float32")
    spec = LeafSpec("w", (1, 4), "float32")
    learned = {
        "codebook": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "sign_latent": jnp.array([[-0.5, 0.0, 7.0, -1e-9]]),
    }
    fixed = {"codes": jnp.array([0, 1], jnp.uint8)}
    assert quantizer.decode(learned, fixed, spec).tolist() == [[-1, 2, 3, -4]]
    upstream = jnp.array([[10.0, 20.0, 30.0, 40.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    # dL = dW_q * C[A]
    assert grad["sign_latent"].tolist() == [[10, 40, 90, 160]]
    # dC = sum over members of dW_q * sign(L)
    assert grad["codebook"].tolist() == [[-10, 20], [30, -40]]


def test_sign_split_clusters_magnitudes_and_keeps_signs():
    quantizer = SignSplit(codewords=2, dim=2, alpha=0.5, codebook_dtype="float32")
    weight = jnp.array([[1.0, -1.0, -5.0, 5.0], [-1.0, -1.0, 5.0, 5.0]])
    spec = LeafSpec("w", (2, 4), "float32")
    learned, fixed = quantizer.init(KEY, weight, spec)
    assert sorted(learned["codebook"].tolist()) == [[1, 1], [5, 5]]
    assert learned["sign_latent"].tolist() == (0.5 * weight).tolist()
    assert quantizer.decode(learned, fixed, spec).tolist() == weight.tolist()


def test_fixed_signs_are_one_bit_and_no_latent():
    quantizer = SignSplit(codewords=2, dim=2, learn_signs=False)
    spec = LeafSpec("w", (2, 4), "float32")
    learned, fixed = quantizer.init(KEY, jnp.array([[1.0, -1, 0, 2], [-3, 1, 1, -0.0]]), spec)
    assert set(learned) == {"codebook"}
    assert fixed["signs"].tolist() == [[False, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("latent_dtype", [None, "float32", "bfloat16"])
def test_latents_are_kept_in_their_own_dtype_and_decode_to_the_leafs(dtype, latent_dtype):
    quantizer = SignSplit(codewords=2, dim=2, latent_dtype=latent_dtype)
    spec = LeafSpec("w", (2, 4), dtype)
    weight = jnp.array([[1.0, -1.0, -5.0, 5.0], [-1.0, -1.0, 5.0, 5.0]], dtype)
    learned, fixed = quantizer.init(KEY, weight, spec)
    restored, _ = quantizer.unpack(quantizer.pack(learned, fixed, spec), spec)
    expected = dtype if latent_dtype is None else latent_dtype
    assert learned["sign_latent"].dtype == restored["sign_latent"].dtype == expected
    decoded = quantizer.decode(learned, fixed, spec)
    assert decoded.dtype == dtype
    assert np.array_equal(decoded < 0, weight < 0)
    assert quantizer.storage(spec) == SignSplit(codewords=2, dim=2).storage(spec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_sign_bit_is_latent_below_zero(dtype):
    quantizer = SignSplit(codewords=2, dim=2)
    spec = LeafSpec("w", (1, 4), dtype)
    tiny = jnp.finfo(dtype).tiny
    latent = jnp.array([[-tiny, 0.0, -0.0, tiny]], dtype)
    learned = {"codebook": jnp.ones((2, 2)), "sign_latent": latent}
    fixed = {"codes": jnp.array([0, 1], jnp.uint8)}
    assert quantizer.pack(learned, fixed, spec)["signs"].tolist() == [[True, False, False, False]]
    signs = np.sign(np.float32(quantizer.decode(learned, fixed, spec)))
    assert signs.tolist() == [[-1, 1, 1, 1]]


def test_channel_scale_is_the_root_mean_square_of_a_column():
    quantizer = SignSplit(codewords=2, dim=2, channel_scale=True, codebook_dtype="float32")
    weight = jnp.array([[1.0, -4.0, 0.0, 16.0], [-1.0, 4.0, 0.0, 16.0]])
    spec = LeafSpec("w", (2, 4), "float32")
    learned, fixed = quantizer.init(KEY, weight, spec)
    assert learned["scale"].tolist() == [1, 4, 1, 16]
    assert quantizer.decode(learned, fixed, spec).tolist() == weight.tolist()


@pytest.mark.parametrize("quantizer", [Vector(8, 4, axis=0), SignSplit(8, 4, axis=0)])
def test_channel_scale_minimises_the_error_of_the_weight(quantizer):
    weight = jax.random.normal(KEY, (64, 8)) * jnp.logspace(-1, 1.5, 8)[None]
    spec = LeafSpec("w", (64, 8), "float32")

    def error(quantizer):
        decoded = quantizer.decode(*quantizer.init(KEY, weight, spec), spec)
        return float(jnp.sum(jnp.square(decoded - weight)))

    assert error(dataclasses.replace(quantizer, channel_scale=True)) < 0.8 * error(quantizer)


def test_float16_codebook_is_stored_as_training_sees_it():
    quantizer = Vector(codewords=2, dim=2, codebook_dtype="float16")
    spec = LeafSpec("w", (1, 4), "float32")
    learned = {"codebook": jnp.array([[1e-6, 3e-5], [1 / 3, 1.0]])}
    fixed = {"codes": jnp.array([0, 1], jnp.uint8)}
    fields = quantizer.pack(learned, fixed, spec)
    decoded = quantizer.decode(learned, fixed, spec)
    assert np.float32(fields["codebook"]).ravel().tolist() == decoded.ravel().tolist()


# CRVQ


def test_channel_relaxed_by_hand():
    quantizer = ChannelRelaxed(
        codewords=2, dim=1, critical=0.34, extended=2, extended_codewords=2, channel_scale=False,
        codebook_dtype="float32",
    )  # fmt: skip
    spec = LeafSpec("w", (3, 2), "float32")
    learned = {
        "codebook": jnp.array([[1.0], [2.0]]),
        "extended_codebook": jnp.array([[[10.0], [20.0]], [[100.0], [200.0]]]),
    }
    fixed = {
        "codes": jnp.array([0, 1, 1, 1, 0, 1], jnp.uint8),  # input channels 1, 0, 2 of two outputs
        "extended_codes": jnp.array([[0, 1], [1, 1]], jnp.uint8),
        "critical": jnp.array([False, True, False]),
    }
    decoded = quantizer.decode(learned, fixed, spec)
    assert decoded.tolist() == [[2, 1], [1 + 10 + 200, 2 + 20 + 200], [2, 2]]
    upstream = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    assert grad["codebook"].tolist() == [[3 + 2], [1 + 5 + 4 + 6]]
    assert grad["extended_codebook"].tolist() == [[[3], [4]], [[0], [7]]]


def test_channel_relaxed_sign_split_by_hand():
    quantizer = ChannelRelaxedSignSplit(
        codewords=2, dim=1, critical=0.34, extended=1, extended_codewords=2, channel_scale=True,
        codebook_dtype="float32",
    )  # fmt: skip
    spec = LeafSpec("w", (3, 2), "float32")
    learned = {
        "codebook": jnp.array([[1.0], [2.0]]),
        "extended_codebook": jnp.array([[[10.0], [20.0]]]),
        "scale": jnp.array([1.0, 4.0]),
        "sign_latent": jnp.array([[0.5, -0.1], [-1.0, 2.0], [0.0, -3.0]]),
    }
    fixed = {
        "codes": jnp.array([0, 1, 1, 1, 0, 1], jnp.uint8),  # input channels 1, 0, 2 of two outputs
        "extended_codes": jnp.array([[0, 1]], jnp.uint8),
        "critical": jnp.array([False, True, False]),
    }
    decoded = quantizer.decode(learned, fixed, spec)
    assert decoded.tolist() == [[2, -4], [-(1 + 10), (2 + 20) * 4], [2, -8]]
    upstream = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    assert grad["sign_latent"].tolist() == [[2, 2 * 4], [3 * 11, 4 * 88], [5 * 2, 6 * 8]]
    assert grad["extended_codebook"].tolist() == [[[-3], [4 * 4]]]


# Uniform, LSQ


def test_step_a_channel_along_the_chosen_axis():
    weight = jnp.array([[1.0, -2.0, 1.0], [8.0, 4.0, -16.0]])
    spec = LeafSpec("w", (2, 3), "float32")
    learned, _ = Uniform(bits=8, channel_axis=0).init(KEY, weight, spec)
    assert learned["step"].shape == (2,)
    assert float(learned["step"][1]) > 4 * float(learned["step"][0])
    decoded = Uniform(bits=8, channel_axis=0).decode(learned, {}, spec)
    np.testing.assert_allclose(decoded, weight, rtol=0.02)


def test_a_step_below_the_floor_can_come_back():
    spec = LeafSpec("w", (2,), "float32")
    learned = {"latent": jnp.array([1.0, -1.0]), "step": jnp.array([-1e-6])}
    quantizer = Uniform(bits=4, per_channel=False)
    grad = jax.grad(lambda p: jnp.sum((quantizer.decode(p, {}, spec) - p["latent"]) ** 2))(learned)
    assert np.isfinite(grad["step"]).all()
    assert float(grad["step"][0]) < 0  # a larger step would fit better


def test_uniform_levels_and_lsq_gradients_by_hand():
    quantizer = Uniform(bits=3, per_channel=False)  # levels -4 .. 3
    spec = LeafSpec("w", (6,), "float32")
    learned = {
        "latent": jnp.array([0.2, 0.9, 1.4, 2.0, -2.0, -9.0]),
        "step": jnp.array([0.5]),
    }
    decoded = quantizer.decode(learned, {}, spec)
    assert decoded.tolist() == [0, 1, 1.5, 1.5, -2, -2]  # 2.0 and -9.0 are clipped
    grad = jax.grad(lambda p: jnp.sum(quantizer.decode(p, {}, spec)))(learned)
    # Inside the range the latent's gradient passes (at its very end, -4, JAX's clip decides).
    assert grad["latent"].tolist()[:4] == [1, 1, 1, 0]
    assert grad["latent"].tolist()[5] == 0
    # d/ds: round(v) - v inside, 3 or -4 outside, times 1/sqrt(N * Q_p); v = W/s.
    by_hand = (0 - 0.4) + (2 - 1.8) + (3 - 2.8) + 3 - 4
    at_the_end = grad["latent"].tolist()[4]  # v = -4: between inside (0) and outside (-4)
    by_hand += (1 - at_the_end) * -4
    np.testing.assert_allclose(grad["step"], [by_hand / (6 * 3) ** 0.5], rtol=1e-5)


def test_uniform_finds_the_step_of_weights_on_a_grid():
    weight = 0.25 * jnp.array([[-4.0, 3, 1, 0], [2, -1, 3, -4]]).T
    spec = LeafSpec("w", (4, 2), "float32")
    learned, _ = Uniform(bits=3).init(KEY, weight, spec)
    # The largest magnitude is 4 steps below zero: within 3/64 of 4/3 steps is the search's grid.
    decoded = Uniform(bits=3).decode(learned, {}, spec)
    np.testing.assert_allclose(decoded, weight, atol=0.25 * 4 * 0.5 * 4 / 64)


def test_uniform_stores_levels_from_zero():
    spec = LeafSpec("w", (3,), "float32")
    learned = {"latent": jnp.array([-8.0, 0.0, 1.0]), "step": jnp.array([1.0])}
    fields = Uniform(bits=2, per_channel=False).pack(learned, {}, spec)
    assert fields["levels"].tolist() == [0, 2, 3]


# PVQ


def test_pyramid_by_hand():
    # Rows of one group: the amplitude is sqrt(2), so that 2.5 * sqrt(2) * p / |p| is decoded.
    quantizer = Pyramid(dim=2, pulses=2, amplitude_bits=0, rotate=False)
    spec = LeafSpec("w", (4, 2), "float32")
    # Of 8 points, in this order: (0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1), (2, 0), ...
    fixed = {"codes": jnp.array([[0], [3], [5], [7]], jnp.uint32)}
    learned = {"scale": jnp.array([2.5, 2.5, 1.0, 0.0])}
    decoded = quantizer.decode(learned, fixed, spec)
    root = 2**0.5
    expected = [[0, 2.5 * root], [2.5, -2.5], [-1, -1], [0, 0]]
    np.testing.assert_allclose(decoded, expected, rtol=2**-14)
    upstream = jnp.array([[9.0, 1.0], [1.0, 3.0], [5.0, 7.0], [1.0, 0.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    np.testing.assert_allclose(grad["scale"], [root, -2, -12, -root], rtol=2**-14)
    encoded = quantizer.init(KEY, decoded, spec)
    assert encoded.fixed["codes"].tolist()[:3] == [[0], [3], [5]]
    assert quantizer.storage(spec).bits == 4 * 3 + 4 * 16


# Bits, worked by hand


@pytest.mark.parametrize(
    ("quantizer", "shape", "bits"),
    [
        # 192*768 = 147456 weights, 18432 codes of 4 bits, 147456 signs, 16*8 int8 and a scale
        (SignSplit(16, 8), (192, 768), 18432 * 4 + 147456 + 16 * 8 * 8 + 16),
        (SignSplit(16, 8, learn_signs=False), (192, 768), 18432 * 4 + 147456 + 1024 + 16),
        (SignSplit(16, 8, codebook_dtype="float32"), (192, 768), 18432 * 4 + 147456 + 4096),
        (SignSplit(16, 8, codebook_dtype="float16"), (192, 768), 18432 * 4 + 147456 + 2048),
        (SignSplit(16, 8, channel_scale=True), (192, 768), 222224 + 768 * 16),
        # 5 codewords take 3 bits
        (Vector(5, 4), (8, 16), 32 * 3 + 5 * 4 * 8 + 16),
        (Vector(64, 4), (192, 768), 36864 * 6 + 64 * 4 * 8 + 16),
        # 10 columns are padded to 12: 3 codes a row
        (Vector(4, 4, pad=True), (6, 10), 18 * 2 + 4 * 4 * 8 + 16),
        # signs are stored for real weights only
        (SignSplit(4, 4, pad=True), (6, 10), 18 * 2 + 60 + 4 * 4 * 8 + 16),
        # 4 groups of 4 channels are critical: 3072 sub-vectors with two codes of 3 bits
        (
            ChannelRelaxed(16, 4, critical=0.1, extended=2, extended_codewords=8),
            (192, 768),
            36864 * 4 + 3072 * 2 * 3 + (16 + 2 * 8) * 4 * 8 + 3 * 16 + 768 * 16 + 192,
        ),
        (Uniform(8), (192, 768), 147456 * 8 + 768 * 16),
        # N(8, 8) = 157184: 18 bits and 3 for the amplitude of 8 weights, 16 a row
        (Pyramid(8, 8, 3), (192, 768), 18432 * (18 + 3) + 192 * 16),
        (Pyramid(8, 8, 0, axis=0), (192, 768), 18432 * 18 + 768 * 16),
        # N(64, 60) takes 154 bits: four words of 32 and one of 26
        (Pyramid(64, 60, 4), (192, 768), 2304 * (154 + 4) + 192 * 16),
        (Uniform(2, per_channel=False), (192, 768), 147456 * 2 + 16),
    ],
)
def test_bits(quantizer, shape, bits):
    assert quantizer.storage(LeafSpec("w", shape, "float32")).bits == bits


def test_stacked_leaf_stores_a_codebook_a_slice():
    stacked = LeafSpec("w", (12, 192, 768), "float32", stacked=1)
    assert SignSplit(16, 8).storage(stacked).bits == 12 * 222224
