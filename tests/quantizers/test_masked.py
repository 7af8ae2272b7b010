"""MVQ and signs under a mask: against the equations, brute force, and all choices of a group."""

import itertools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ssvq_jax import (
    Calibration,
    LeafSpec,
    Masked,
    MaskedSignSplit,
    Rule,
    load_recipe,
    make_plan,
)
from ssvq_jax.clustering import kmeans
from ssvq_jax.inference import matmul, packed_params
from ssvq_jax.quantizers import Uniform
from ssvq_jax.quantizers.pattern import Pattern

KEY = jax.random.key(0)

# Patterns


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (2, 4), (3, 4), (2, 8), (4, 8), (5, 10)])
def test_every_choice_has_its_own_number_and_comes_back(keep, group):
    pattern = Pattern(keep, group)
    masks = np.zeros((pattern.choices, group), bool)
    for row, places in zip(masks, itertools.combinations(range(group), keep), strict=True):
        row[list(places)] = True
    numbers = pattern.number(jnp.asarray(masks))
    assert sorted(np.ravel(numbers).tolist()) == list(range(math.comb(group, keep)))
    assert np.array_equal(pattern.mask(numbers), masks)


@given(st.data())
def test_masks_of_several_groups_come_back(data):
    group = data.draw(st.integers(2, 16))
    pattern = Pattern(data.draw(st.integers(1, group - 1)), group)
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(5, 3 * group))
    flags = scores < 0

    @jax.jit
    def masks(scores, flags):
        mask = pattern.choose(scores)
        numbers = pattern.number(mask)
        return mask, numbers, pattern.mask(numbers), pattern.spread(pattern.kept(flags, mask), mask)

    mask, numbers, back, spread = masks(jnp.asarray(scores, jnp.float32), jnp.asarray(flags))
    assert np.all(mask.reshape(-1, group).sum(axis=1) == pattern.keep)
    kept = np.sort(np.where(mask, scores, np.inf).reshape(-1, group), axis=1)[:, 0]
    dropped = np.sort(np.where(mask, -np.inf, scores).reshape(-1, group), axis=1)[:, -1]
    assert np.all(kept >= dropped)
    assert int(numbers.max()) < pattern.choices
    assert np.array_equal(back, mask)
    assert np.array_equal(spread, flags & mask)


@pytest.mark.parametrize(
    ("keep", "group", "bits"), [(4, 16, 11), (2, 4, 3), (1, 2, 1), (2, 8, 5), (8, 16, 14)]
)
def test_mask_bits_are_exact(keep, group, bits):
    assert Pattern(keep, group).width == bits == math.ceil(math.log2(math.comb(group, keep)))
    spec = LeafSpec("w", (64, 32), "float32")
    storage = Masked(8, 16, keep=keep, group=group).storage(spec)
    fields = {stream.field: stream.bits for stream in storage.streams}
    assert fields["mask"] == 64 * 32 // group * bits


# MVQ


def test_masked_by_hand():
    quantizer = Masked(codewords=2, dim=4, keep=2, group=4, codebook_dtype="float32")
    spec = LeafSpec("w", (1, 8), "float32")
    learned = {"codebook": jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])}
    fixed = {
        "codes": jnp.array([1, 1], jnp.uint8),
        "mask": jnp.array([[True, False, True, False], [False, False, True, True]]),
    }
    assert quantizer.decode(learned, fixed, spec).tolist() == [[5, 0, 7, 0, 0, 0, 7, 8]]
    upstream = jnp.array([[1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    # dC = sum over members of m * dW_q: nothing of what was pruned
    assert grad["codebook"].tolist() == [[0, 0, 0, 0], [1, 0, 33, 40]]
    # Choices of 2 in 4 as binary numbers, sorted: 3, 5, 6, 9, 10, 12; bits 0 and 2 are 5.
    assert quantizer.pack(learned, fixed, spec)["mask"].tolist() == [[1], [5]]


def test_masked_keeps_the_largest_magnitudes_and_clusters_only_them():
    quantizer = Masked(codewords=2, dim=2, keep=1, group=2, codebook_dtype="float32")
    weight = jnp.array([[5.0, 1.0, -7.0, 2.0], [6.0, -3.0, 0.5, 9.0]])
    spec = LeafSpec("w", (2, 4), "float32")
    learned, fixed = quantizer.init(KEY, weight, spec)
    assert fixed["mask"].tolist() == [[True, False], [True, False], [True, False], [False, True]]
    # First coordinates 5, 6 and -7 in two codewords; the second coordinate has 9 alone.
    decoded = quantizer.decode(learned, fixed, spec)
    assert decoded.tolist() == [[5.5, 0, -7, 0], [5.5, 0, 0, 9]]


def test_masked_clustering_finds_what_trying_everything_finds():
    generator = np.random.default_rng(3)
    weight = np.float32(generator.normal(size=(8, 4)))
    mask = np.zeros((8, 4), bool)
    np.put_along_axis(mask, np.argsort(-np.abs(weight), axis=1)[:, :2], True, axis=1)

    def objective(codes):
        codes, total = np.array(codes), 0.0
        for code in (0, 1):
            own = codes == code
            count = np.maximum(mask[own].sum(axis=0), 1)
            mean = (mask * weight)[own].sum(axis=0) / count
            total += np.sum(mask[own] * (weight[own] - mean) ** 2)
        return total

    best = min(objective(codes) for codes in itertools.product((0, 1), repeat=8))
    found = kmeans(KEY, jnp.asarray(weight), 2, iterations=20, restarts=8, mask=jnp.asarray(mask))
    assert objective(found.codes) == pytest.approx(best, rel=1e-5)
    # The quantizer has one start, which may end in another optimum.
    quantizer = Masked(codewords=2, dim=4, keep=2, group=4, codebook_dtype="float32")
    learned, fixed = quantizer.init(KEY, jnp.asarray(weight), LeafSpec("w", (8, 4), "float32"))
    assert np.array_equal(fixed["mask"], mask)
    codes, codebook = np.asarray(fixed["codes"]), np.asarray(learned["codebook"])
    for code in (0, 1):  # a fixed point of both steps of the equations
        own = codes == code
        has = mask[own].any(axis=0)
        mean = (mask * weight)[own].sum(axis=0) / np.maximum(mask[own].sum(axis=0), 1)
        np.testing.assert_allclose(codebook[code][has], mean[has], rtol=1e-5)
    distance = np.sum(mask[:, None] * (weight[:, None] - codebook[None]) ** 2, axis=-1)
    assert np.array_equal(codes, distance.argmin(axis=1))
    assert objective(codes) <= 1.5 * best


def test_importance_decides_what_is_kept():
    quantizer = Masked(codewords=2, dim=2, keep=1, group=2)
    weight = jnp.array([[1.0, 2.0], [1.0, 2.0]])
    importance = Calibration(jnp.array([[9.0, 1.0], [1.0, 1.0]]))  # roots: 3 * 1 > 1 * 2
    _, fixed = quantizer.init(KEY, weight, LeafSpec("w", (2, 2), "float32"), importance)
    assert fixed["mask"].tolist() == [[True, False], [False, True]]


def test_padding_is_pruned_first():
    quantizer = Masked(codewords=2, dim=4, keep=2, group=4, pad=True)
    weight = jnp.array([[3.0, 2.0, 1.0, 4.0, 1e-9, 0.0], [1.0, 1.0, 5.0, 6.0, 0.0, -1e-9]])
    _, fixed = quantizer.init(KEY, weight, LeafSpec("w", (2, 6), "float32"))
    assert fixed["mask"].tolist()[1] == fixed["mask"].tolist()[3] == [True, True, False, False]


# SSVQ under a mask


def test_masked_sign_split_by_hand():
    quantizer = MaskedSignSplit(codewords=2, dim=4, keep=2, group=4, codebook_dtype="float32")
    spec = LeafSpec("w", (1, 8), "float32")
    learned = {
        "codebook": jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]),
        "sign_latent": jnp.array([[-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 0.0, -1.0]]),
    }
    fixed = {
        "codes": jnp.array([0, 1], jnp.uint8),
        "mask": jnp.array([[True, False, True, False], [False, False, True, True]]),
    }
    assert quantizer.decode(learned, fixed, spec).tolist() == [[-1, 0, 3, 0, 0, 0, 7, -8]]
    upstream = jnp.array([[1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]])
    grad = jax.grad(lambda p: jnp.sum(upstream * quantizer.decode(p, fixed, spec)))(learned)
    # dL = m * dW_q * C[A]: the latents of pruned weights stand still
    assert grad["sign_latent"].tolist() == [[1, 0, 9, 0, 0, 0, 210, 320]]
    assert grad["codebook"].tolist() == [[-1, 0, 3, 0], [0, 0, 30, -40]]
    fields = quantizer.pack(learned, fixed, spec)
    assert fields["signs"].tolist() == [[True, False], [False, True]]  # of kept weights alone
    latent = quantizer.unpack(fields, spec).learned["sign_latent"]
    assert latent.tolist() == [[-1, 1, 1, 1, 1, 1, 1, -1]]


def test_a_sign_is_stored_for_kept_weights_alone():
    spec = LeafSpec("w", (64, 32), "float32")
    storage = MaskedSignSplit(8, 8, keep=2, group=8).storage(spec)
    bits = {stream.field: stream.bits for stream in storage.streams}
    assert (bits["codes"], bits["mask"], bits["signs"]) == (256 * 3, 256 * 5, 256 * 2)


# Elsewhere


@pytest.mark.parametrize("method", [Masked, MaskedSignSplit])
def test_shared_and_packed_they_decode_and_multiply_as_they_are(method):
    quantizer = method(codewords=4, dim=8, keep=2, group=4, iterations=3)
    params = {"a": jax.random.normal(KEY, (16, 8)), "b": jax.random.normal(KEY, (8, 24))}
    plan = make_plan(params, [Rule(".*", quantizer, share="both")])
    packed = plan.finalize(plan.init(KEY, params))
    decoded = packed.decode()
    tree = packed_params(packed)
    x = jax.random.normal(jax.random.key(1), (3, 16))
    for name, inputs in (("a", x), ("b", x[:, :8])):
        assert np.array_equal(tree[name].decode(), decoded[name])
        product = matmul(inputs, tree[name])
        np.testing.assert_allclose(product, inputs @ decoded[name], rtol=1e-5, atol=1e-5)


def test_presets_leave_depthwise_convolutions_alone():
    rules = load_recipe("mvq-21x-conv")
    (depthwise,) = (rule for rule in rules if "depthwise" in rule.pattern)
    assert depthwise.quantizer is None
    (depthwise,) = (rule for rule in load_recipe("ssvq-21x-conv") if "depthwise" in rule.pattern)
    assert depthwise.quantizer == Uniform(bits=8)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"group": 5}, "group=5 does not divide dim=8"),
        ({"group": 32, "dim": 32}, "group=32: .* 2 to 16"),
        ({"keep": 8}, "keep=8: .* 1 to 7"),
        ({"keep": 0}, "keep=0: .* 1 to 7"),
        ({"keep": 2.0}, "keep=2.0: .* whole number"),
    ],
)
@pytest.mark.parametrize("method", [Masked, MaskedSignSplit])
def test_patterns_that_are_none(method, sizes, message):
    with pytest.raises(ValueError, match=message):
        method(**sizes)


@pytest.mark.parametrize("method", [Masked, MaskedSignSplit])
def test_without_any_importance_the_largest_are_kept(method):
    weight = jnp.tile(jnp.array([[1.0, 2.0, -3.0, 4.0], [9.0, -8.0, 7.0, 6.0]]), (4, 1))
    spec = LeafSpec("w", weight.shape, "float32")
    quantizer = method(codewords=2, dim=4, keep=2, group=4)
    none = Calibration(jnp.zeros_like(weight))
    _, fixed = quantizer.init(KEY, weight, spec, none)
    assert fixed["mask"][:2].tolist() == [[False, False, True, True], [True, True, False, False]]
