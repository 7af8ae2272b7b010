"""CRVQ: bits, plain VQ as its limit, what critical channels gain, and the codes' refinement."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssvq_jax import (
    Calibration,
    ChannelRelaxed,
    ChannelRelaxedSignSplit,
    InputMoments,
    LeafSpec,
    Rule,
    SignSplit,
    Vector,
    load_recipe,
    make_plan,
)
from ssvq_jax.inference import matmul, packed_params
from ssvq_jax.quantizers.additive import (
    Codebooks,
    Codes,
    Problem,
    choose_codes,
    decode,
    objective,
    refine,
    solve_codebooks,
)
from ssvq_jax.quantizers.channels import channel_importance, element_weights
from ssvq_jax.quantizers.codebook import round_codebook
from ssvq_jax.quantizers.streams import check_streams, pack_fields

KEY = jax.random.key(0)
SPEC = LeafSpec("w", (64, 48), "float32")
SMALL = ChannelRelaxed(
    codewords=16, dim=4, critical=0.15, extended=2, extended_codewords=8, iterations=10
)


PLAIN = Vector(16, 4, axis=0, channel_scale=True, iterations=10)


def outlier_problem(spec=SPEC, seed=0):
    """A weight, and moments of correlated inputs of which a few are large."""
    generator = np.random.default_rng(seed)
    channels = spec.shape[0]
    weight = generator.normal(size=spec.shape)
    size = np.where(np.arange(channels) % 9 == 4, 8.0, 1.0)
    mixing = np.eye(channels) + 0.2 * generator.normal(size=(channels, channels))
    inputs = generator.normal(size=(4 * channels, channels)) @ mixing * size
    moments = np.float32(inputs.T @ inputs / len(inputs))
    return jnp.asarray(weight, jnp.float32), InputMoments(jnp.asarray(moments), (0,))


@functools.cache
def encoded(**settings):
    weight, moments = outlier_problem()
    quantizer = dataclasses.replace(SMALL, **settings)
    return quantizer, *quantizer.init(KEY, weight, SPEC, Calibration(inputs=moments))


@functools.cache
def plain_error():
    """Of VQ with as many codewords."""
    weight, _ = outlier_problem()
    return weight - PLAIN.decode(*PLAIN.init(KEY, weight, SPEC), SPEC)


def output_error(error, moments):
    error = np.float64(error)
    return np.sum(error * (np.float64(moments.matrix) @ error))


# Bits


@pytest.mark.parametrize(("order", "width"), [("critical", 1), ("importance", 12)])
def test_bits_of_the_paper(order, width):
    spec = LeafSpec("w", (4096, 4096), "float32")
    storage = ChannelRelaxed(codebook_dtype="float16", order=order).storage(spec)
    fields = {stream.field: stream.bits for stream in storage.streams}
    channels = fields.pop("critical" if width == 1 else "places")
    assert fields == {
        "codes": spec.size,  # 8 bits for 8 weights
        "extended_codes": 3 * 80 * 4096,  # 3 bits a weight of 80 channels: 0.0586
        "codebook": 256 * 8 * 16,
        "extended_codebook": 3 * 256 * 8 * 16,  # with the one above 0.0078
        "scale": 4096 * 16,  # 0.0039
    }
    assert sum(fields.values()) / spec.size == 1.0703125
    assert channels == 4096 * width  # which the paper leaves out


@pytest.mark.parametrize(
    ("shape", "groups", "rows"),
    [((768, 192), 1, 192), ((576, 576), 1, 256), ((1536, 576), 3, 256), ((392, 64), 0, None)],
)
def test_critical_groups_and_rows_of_small_leaves(shape, groups, rows):
    quantizer, spec = ChannelRelaxed(), LeafSpec("w", shape, "float32")
    assert quantizer.critical_groups(spec) == groups
    fields = {s.field: s.shape for s in quantizer.storage(spec).streams}
    assert fields.get("extended_codebook") == ((3, rows, 8) if rows else None)
    assert fields.get("extended_codes") == ((3, groups * shape[1]) if rows else None)


def test_shares_are_not_rounded_down_by_accident():
    spec = LeafSpec("w", (100, 256), "float32")
    assert ChannelRelaxed(dim=1, critical=0.29).critical_groups(spec) == 29  # 0.29 * 100 < 29


# Without critical channels


@pytest.mark.parametrize(("share", "channel_scale"), [(0.0, True), (0.05, True), (0.0, False)])
def test_without_critical_channels_it_is_vq(share, channel_scale):
    weight, moments = outlier_problem()
    plain = dataclasses.replace(PLAIN, channel_scale=channel_scale)
    quantizer = ChannelRelaxed(**dataclasses.asdict(plain), critical=share)
    ours = quantizer.init(KEY, weight, SPEC, Calibration(inputs=moments))
    theirs = plain.init(KEY, weight, SPEC)
    chex.assert_trees_all_equal(ours, theirs)
    assert quantizer.storage(SPEC) == plain.storage(SPEC)
    assert np.array_equal(quantizer.decode(*ours, SPEC), plain.decode(*theirs, SPEC))


# With them


def test_critical_channels_are_coded_better_than_by_vq():
    weight, _ = outlier_problem()
    quantizer, learned, fixed = encoded()
    critical = np.asarray(fixed["critical"])
    assert critical.sum() == 8
    assert np.all(critical[4::9])  # the large inputs
    error = weight - quantizer.decode(learned, fixed, SPEC)
    assert np.sum(np.square(error)[critical]) < 0.5 * np.sum(np.square(plain_error())[critical])


@pytest.mark.parametrize("importance", ["diagonal", "inverse"])
def test_outputs_err_less_than_with_vq_of_more_bits(importance):
    weight, moments = outlier_problem()
    quantizer, learned, fixed = encoded(importance=importance)
    plain = dataclasses.replace(PLAIN, codewords=64)
    assert quantizer.storage(SPEC).bits < plain.storage(SPEC).bits
    ours = quantizer.decode(learned, fixed, SPEC) - weight
    theirs = plain.decode(*plain.init(KEY, weight, SPEC), SPEC) - weight
    assert output_error(ours, moments) < 0.5 * output_error(theirs, moments)


def test_channels_are_coded_in_the_order_of_their_importance():
    _, moments = outlier_problem()
    quantizer, learned, fixed = encoded(order="importance")
    importance = channel_importance(plain_error(), moments.matrix, "diagonal")
    order = np.argsort(-importance, kind="stable")
    places = np.asarray(fixed["places"])
    assert np.array_equal(places[order], np.arange(64))
    # Decoded, every channel is in its own place again.
    decoded = np.asarray(quantizer.decode(learned, fixed, SPEC))
    unmoved = {**fixed, "places": jnp.arange(64, dtype=jnp.uint8)}
    assert np.array_equal(decoded[order], quantizer.decode(learned, unmoved, SPEC))
    assert np.array_equal(encoded()[2]["critical"], places < 8)


def test_critical_channels_are_coded_first_all_others_keep_their_order():
    flags = jnp.zeros(64, bool).at[jnp.array([50, 3, 9, 12, 20, 21, 22, 63])].set(True)
    # Every sub-vector has a codeword of its own, the numbers of its rows.
    quantizer = dataclasses.replace(SMALL, codewords=16 * 48, codebook_dtype="float32")
    numbers = jnp.arange(64.0)[:, None] * jnp.ones((1, 48))
    learned = {
        "codebook": quantizer.layout(SPEC).split(numbers),
        "extended_codebook": jnp.stack([jnp.full((8, 4), 100.0), jnp.full((8, 4), 1000.0)]),
        "scale": jnp.ones(48),
    }
    fixed = {
        "codes": jnp.arange(16 * 48, dtype=jnp.uint16),
        "extended_codes": jnp.zeros((2, 2 * 48), jnp.uint8),
        "critical": flags,
    }
    decoded = quantizer.decode(learned, fixed, SPEC)
    assert np.all(decoded == decoded[:, :1])
    assert decoded[flags, 0].tolist() == list(range(1100, 1108))
    assert decoded[~flags, 0].tolist() == list(range(8, 64))


def test_importance_formulas_against_numpy():
    weight, moments = outlier_problem()
    H, r = np.float64(moments.matrix), np.float64(weight)
    diagonal = np.mean(r**2 * np.diag(H)[:, None], axis=1)
    np.testing.assert_allclose(
        channel_importance(weight, moments.matrix, "diagonal"), diagonal, rtol=1e-5
    )
    damped = H + 0.01 * np.mean(np.diag(H)) * np.eye(64)
    inverse = np.max(r**2 / (2 * np.diag(np.linalg.inv(damped)))[:, None], axis=1)
    np.testing.assert_allclose(
        channel_importance(weight, moments.matrix, "inverse"), inverse, rtol=1e-3
    )


def test_stacked_weights_have_moments_of_their_own():
    weight, moments = outlier_problem()
    other, others = outlier_problem(seed=1)
    spec = LeafSpec("w", (2, 64, 48), "float32", stacked=1)
    both = InputMoments(jnp.stack([moments.matrix, others.matrix]), (0,))
    learned, fixed = SMALL.init(KEY, jnp.stack([weight, other]), spec, Calibration(inputs=both))
    decoded = SMALL.decode(learned, fixed, spec)
    key = jax.random.split(KEY, 2)[1]
    alone = SMALL.init(key, other, SPEC, Calibration(inputs=others))
    assert np.array_equal(decoded[1], SMALL.decode(*alone, SPEC))


def test_training_lowers_a_loss():
    weight, _ = outlier_problem()
    quantizer, learned, fixed = encoded()
    optimizer = optax.sgd(1e-3)

    @jax.jit
    def loss(learned):
        return jnp.sum(jnp.square(quantizer.decode(learned, fixed, SPEC) - weight))

    before, state = loss(learned), optimizer.init(learned)
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(learned), state)
        learned = optax.apply_updates(learned, updates)
    assert loss(learned) < 0.95 * before


# The refinement


def small_codes(seed=0, signed=False):
    generator = np.random.default_rng(seed)
    outputs, groups, critical, dim = 6, 4, 2, 2
    inputs = generator.normal(size=(40, groups * dim))
    problem = Problem(
        jnp.asarray(generator.normal(size=(outputs, groups * dim)), jnp.float32),
        jnp.asarray(inputs.T @ inputs / 40, jnp.float32),
        jnp.asarray(generator.uniform(0.5, 2, (outputs, 1)), jnp.float32),
    )
    if signed:
        signs = generator.choice([-1.0, 1.0], problem.target.shape)
        problem = problem._replace(scale=problem.scale * jnp.asarray(signs, jnp.float32))
    codebooks = Codebooks(
        jnp.asarray(generator.normal(size=(5, dim)), jnp.float32),
        jnp.asarray(generator.normal(size=(2, 3, dim)), jnp.float32),
    )
    codes = Codes(
        jnp.asarray(generator.integers(0, 5, (outputs, groups)), jnp.int32),
        jnp.asarray(generator.integers(0, 3, (2, outputs, critical)), jnp.int32),
    )
    return problem, codebooks, codes


@pytest.mark.parametrize("signed", [False, True])
def test_objective_is_the_mean_error_of_outputs(signed):
    problem, codebooks, codes = small_codes(signed=signed)
    root = np.linalg.cholesky(np.float64(problem.moments)).T  # H = root^T root: inputs x
    decoded = np.asarray(problem.scale) * np.asarray(decode(codebooks, codes))
    expected = np.sum(np.square(root @ (decoded - problem.target).T))
    np.testing.assert_allclose(objective(problem, codebooks, codes), expected, rtol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_codes_of_a_group_are_the_best_of_all(signed):
    problem, codebooks, codes = small_codes(signed=signed)
    chosen = choose_codes(problem, codebooks, codes)
    # Groups are visited in turn: the last one saw all others as they are now.
    for output in range(6):
        for code in range(5):
            other = chosen._replace(base=chosen.base.at[output, 3].set(code))
            assert objective(problem, codebooks, other) >= 0.99999 * objective(
                problem, codebooks, chosen
            )
    assert objective(problem, codebooks, chosen) < objective(problem, codebooks, codes)


@pytest.mark.parametrize("signed", [False, True])
def test_the_beam_finds_the_best_sum_of_few_codewords(signed):
    problem, codebooks, codes = small_codes(signed=signed)
    one = jax.tree.map(lambda x: x[..., :1], codes)  # one group, critical
    problem = Problem(problem.target[:, :2], problem.moments[:2, :2], problem.scale[:, :2])
    chosen = choose_codes(problem, codebooks, one)

    def error(output, base, first, second):
        book = np.float64(codebooks.base[base] + codebooks.extended[0, first])
        book = book + np.float64(codebooks.extended[1, second])
        left = np.float64(problem.scale[output]) * book - np.float64(problem.target[output])
        return left @ np.float64(problem.moments) @ left

    for output in range(6):
        every = [error(output, *c) for c in np.ndindex(5, 3, 3)]
        found = error(output, chosen.base[output, 0], *chosen.extended[:, output, 0])
        assert found <= 1.00001 * min(every)  # 5 * 3 partial sums: the beam of 8 can miss


@pytest.mark.parametrize("signed", [False, True])
def test_solved_codebooks_leave_no_gradient(signed):
    problem, codebooks, codes = small_codes(signed=signed)
    solved = solve_codebooks(problem, codebooks, codes)
    gradient = jax.grad(lambda books: objective(problem, books, codes))
    before, after = (
        sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(gradient(books)))
        for books in (codebooks, solved)
    )
    assert after < 1e-6 * before


@pytest.mark.parametrize("signed", [False, True])
def test_refinement_lowers_the_objective_as_stored(signed):
    problem, codebooks, codes = small_codes(signed=signed)
    refined = refine(problem, codebooks, codes, "int8")

    def stored(books):
        base, extended = books
        each = [round_codebook(book, "int8") for book in extended]
        return Codebooks(round_codebook(base, "int8"), jnp.stack(each))

    before = objective(problem, stored(codebooks), codes)
    assert objective(problem, stored(refined[0]), refined[1]) < 0.5 * before


# With split signs


def test_with_split_signs_and_no_critical_channels_it_is_ssvq():
    weight, moments = outlier_problem()
    plain = SignSplit(4, 4, axis=0, channel_scale=True, iterations=10)
    quantizer = ChannelRelaxedSignSplit(**dataclasses.asdict(plain), critical=0.0)
    ours = quantizer.init(KEY, weight, SPEC, Calibration(inputs=moments))
    theirs = plain.init(KEY, weight, SPEC)
    chex.assert_trees_all_equal(ours, theirs)
    assert quantizer.storage(SPEC) == plain.storage(SPEC)
    assert np.array_equal(quantizer.decode(*ours, SPEC), plain.decode(*theirs, SPEC))


@pytest.mark.parametrize("pad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_critical_channels_improve_what_ssvq_gives(pad):
    weight, moments = outlier_problem()
    given = SignSplit(4, 5 if pad else 4, axis=0, pad=pad, channel_scale=True, iterations=10)
    quantizer = ChannelRelaxedSignSplit(
        **dataclasses.asdict(given), critical=0.15, extended=2, extended_codewords=8
    )
    learned, fixed = quantizer.init(KEY, weight, SPEC, Calibration(inputs=moments))
    assert np.array_equal(learned["sign_latent"], weight)
    decoded = quantizer.decode(learned, fixed, SPEC)
    theirs = given.decode(*given.init(KEY, weight, SPEC), SPEC)
    assert output_error(decoded - weight, moments) < 0.3 * output_error(theirs - weight, moments)


def test_storage_with_split_signs_is_a_bit_a_weight_more():
    spec, given = LeafSpec("w", (4096, 4096), "float32"), {"codewords": 4, "critical": 0.03}
    ours, theirs = ChannelRelaxedSignSplit(**given), ChannelRelaxed(**given)
    assert ours.storage(spec).bits == theirs.storage(spec).bits + spec.size


# What does not go


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critical": 1.0}, "critical=1.0: .* below 1"),
        ({"critical": -0.1}, "critical=-0.1: .* 0 or more"),
        ({"critical": float("nan")}, "critical=nan"),
        ({"critical": "0.02"}, "critical='0.02'"),
        ({"extended": 0}, "extended=0: .* 1 to 16"),
        ({"extended_codewords": 1}, "extended_codewords=1"),
        ({"importance": "max"}, "importance='max': choose one of"),
        ({"order": "random"}, "order='random': choose one of"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ChannelRelaxed(**settings)


@pytest.mark.parametrize(
    ("quantizer", "shape", "message"),
    [
        (dataclasses.replace(SMALL, axis=2), (8, 64), "leaf 'w' .* has no axis 2"),
        (dataclasses.replace(SMALL, dim=5), (64, 48), "dim=5 does not divide axis 0 of length 64"),
        (dataclasses.replace(SMALL, axis=1), (64, 48), "axis=1 and channel_axis=-1 are the same"),
        (dataclasses.replace(SMALL, critical=0.1), (64, 1), "leaf 'w' .* one critical sub-vector"),
    ],
)
def test_leaves_that_do_not_fit_are_named(quantizer, shape, message):
    with pytest.raises(ValueError, match=message):
        quantizer.check(LeafSpec("w", shape, "float32"))


def test_moments_of_other_axes_are_refused():
    weight, _ = outlier_problem()
    moments = Calibration(inputs=InputMoments(jnp.eye(48), (1,)))
    with pytest.raises(
        ValueError, match=r"leaf 'w' .* axes \(1,\), .* axis 0 alone: choose axis=1"
    ):
        SMALL.init(KEY, weight, SPEC, moments)
    spec = LeafSpec("w", (64, 2, 24), "float32")
    moments = Calibration(inputs=InputMoments(jnp.eye(128), (0, 1)))
    with pytest.raises(ValueError, match=r"axes \(0, 1\), .* axis 0 alone: give no moments"):
        SMALL.init(KEY, weight.reshape(64, 2, 24), spec, moments)
    few = LeafSpec("w", (8, 8, 48), "float32")  # no channel is critical, so H has no part in it
    SMALL.init(
        KEY, weight.reshape(8, 8, 48), few, Calibration(inputs=InputMoments(jnp.eye(64), (0, 1)))
    )


def test_channels_without_inputs_weigh_a_little_in_clustering():
    moments = jnp.diag(jnp.array([0.0, 4.0]))
    weights = element_weights(None, moments, LeafSpec("w", (2, 3), "float32"), 0)
    np.testing.assert_allclose(weights, [[4e-6] * 3, [4.0] * 3])
    # Nothing but the moments says which channels matter.
    live = jnp.zeros(64).at[:3].set(1.0)
    calibration = Calibration(inputs=InputMoments(jnp.diag(live), (0,)))
    weight = jnp.ones(SPEC.shape)
    decoded = SMALL.decode(*SMALL.init(KEY, weight, SPEC, calibration), SPEC)
    np.testing.assert_allclose(decoded[:3], weight[:3], rtol=0.01)


def test_codebooks_are_not_shared():
    with pytest.raises(ValueError, match="share='s': ChannelRelaxed.* of its own, or use Vector"):
        make_plan({"w": jnp.zeros((64, 48))}, [Rule("w", SMALL, share="s")])


def test_it_multiplies_as_it_decodes():
    weight, _ = outlier_problem()
    # Along the last axis other methods are decoded some rows at a time.
    quantizer = dataclasses.replace(SMALL, axis=1, channel_axis=0)
    plan = make_plan({"w": weight.T}, [("w", quantizer)])
    packed = plan.finalize(plan.init(KEY, {"w": weight.T}))
    x = jax.random.normal(KEY, (3, 48))
    product = matmul(x, packed_params(packed)["w"])
    np.testing.assert_allclose(product, x @ packed.decode()["w"], rtol=1e-4, atol=1e-4)


def test_presets():
    shapes = {"blocks": {"fc": {"kernel": jax.ShapeDtypeStruct((2, 400, 512), "float32")}}}
    bits = make_plan(shapes, load_recipe("crvq-1bit-scanned")).bits().main.bits
    assert bits["extended_codes"] == 2 * 3 * 512 * 8
    for name in ("crvq-1bit-shared", "crvq-1bit-conv"):
        with pytest.raises(ValueError, match="neither a file nor a preset"):
            load_recipe(name)


@pytest.mark.parametrize("order", ["critical", "importance"])
def test_orders_that_do_not_exist_are_refused(order):
    quantizer = dataclasses.replace(SMALL, order=order)
    weight, _ = outlier_problem()
    fields = quantizer.pack(*quantizer.init(KEY, weight, SPEC), SPEC)
    check_streams(quantizer, pack_fields(quantizer, fields, SPEC), SPEC)
    name = "critical" if order == "critical" else "places"
    fields[name] = np.zeros_like(fields[name])
    with pytest.raises(ValueError, match="nothing together"):
        check_streams(quantizer, pack_fields(quantizer, fields, SPEC), SPEC)
