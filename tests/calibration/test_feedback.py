"""Error feedback: against GPTQ as it is written down, and against encoding without it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax import (
    InputMoments,
    LeafSpec,
    Masked,
    MaskedSignSplit,
    Pyramid,
    Rule,
    SignSplit,
    Uniform,
    Vector,
    make_plan,
)
from ssvq_jax.calibration import feed_back
from ssvq_jax.calibration.rows import damped_factor, row_groups, walk
from ssvq_jax.quantizers.base import Quantizer

KEY = jax.random.key(0)
INPUTS, OUTPUTS = 32, 24

METHODS = {
    "2 bit": Uniform(bits=2),
    "4 bit, step an input": Uniform(bits=4, channel_axis=0),
    "vector along outputs": Vector(codewords=16, dim=4, iterations=5),
    "vector along inputs, scaled there": Vector(
        8, 4, axis=0, channel_scale=True, channel_axis=0, iterations=5
    ),
    "sign split along outputs": SignSplit(codewords=4, dim=4, iterations=5),
    "sign split along inputs": SignSplit(8, 8, axis=0, learn_signs=False, iterations=5),
    "masked along inputs": Masked(8, 4, keep=2, group=4, axis=0, iterations=5),
    "masked signs": MaskedSignSplit(8, 8, keep=3, group=8, iterations=5),
    "pyramid": Pyramid(8, 8, 3),
}
NIGHTLY = ("vector along outputs", "sign split along inputs", "masked along inputs")
every_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[pytest.mark.slow] if name in NIGHTLY else [])
        for name, method in METHODS.items()
    ],
)


def weight_of(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def correlated(count=INPUTS, seed=0, samples=200):
    """Moments of inputs that share a few directions, as activations do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, count)) + 2 * rng.normal(size=(samples, 3)) @ rng.normal(
        size=(3, count)
    )
    return jnp.asarray((x.T @ x / samples).astype(np.float32))


def planned(method, weight, **rule):
    plan = make_plan({"w": weight}, [Rule("w", method, **rule)])
    return plan, plan.init(KEY, {"w": weight})


def fed_back(method, weight, matrix, axes=(0,), variables=None, stacked=0, **settings):
    plan, found = planned(method, weight, stacked=stacked)
    inputs = {"w": InputMoments(matrix, axes)}
    variables, report = feed_back(plan, variables or found, {"w": weight}, inputs, **settings)
    return np.asarray(plan.decode(variables)["w"]), report["w"], variables


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("block", "largest_first"))
def walked(method, spec, axes, weight, learned, matrix, block=128, largest_first=False):
    groups = row_groups(method, spec, axes)
    return walk(
        method, spec, groups, weight, learned, matrix, jnp.float32(0.01),
        block=block, largest_first=largest_first,
    )  # fmt: skip


def gptq(weight, matrix, encode, damping=0.01):
    """GPTQ by its equations 2 and 3: the inverse of H, from which each row is eliminated."""
    targets, values = np.float64(weight), np.zeros(weight.shape)
    damped = np.float64(matrix) + damping * np.mean(np.diag(matrix)) * np.eye(len(matrix))
    inverse = np.linalg.inv(damped)
    for i in range(len(targets)):
        values[i] = encode(targets[i])
        error = (targets[i] - values[i]) / inverse[i, i]
        targets[i + 1 :] -= np.outer(inverse[i + 1 :, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return targets, values


# The walk


@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_gptq(bits):
    weight, matrix = weight_of(INPUTS, OUTPUTS), correlated()
    method, spec = Uniform(bits=bits), LeafSpec("w", (INPUTS, OUTPUTS), "float32")
    learned = method.init(KEY, weight, spec).learned
    found = walked(method, spec, (0,), weight, learned, matrix, block=5)
    step, (low, high) = np.float64(learned["step"].astype(jnp.bfloat16)), method.range
    targets, values = gptq(weight, matrix, lambda w: step * np.clip(np.rint(w / step), low, high))
    np.testing.assert_allclose(found.target, targets, atol=1e-5)
    np.testing.assert_allclose(found.values, values, atol=1e-6)  # a level is 0.1 at least


def test_of_groups_it_is_gptvq_with_the_error_of_a_group_eliminated_at_once():
    # Eliminating row by row, with the group's own values given, is the same.
    weight, matrix = weight_of(INPUTS, OUTPUTS), correlated()
    method, spec = Vector(8, 4, axis=0, iterations=5), LeafSpec("w", (INPUTS, OUTPUTS), "float32")
    learned = method.init(KEY, weight, spec).learned
    found = walked(method, spec, (0,), weight, learned, matrix)
    given = iter(np.float64(found.values))
    targets, _ = gptq(weight, matrix, lambda row: next(given))
    np.testing.assert_allclose(found.target[::4], targets[::4], atol=1e-5)
    assert np.abs(found.target[1::4] - targets[1::4]).max() > 1e-2


@every_method
def test_decoding_gives_what_the_walk_saw(method):
    largest_first = method.method == "vector"
    weight, matrix = weight_of(INPUTS, OUTPUTS), correlated()
    spec = LeafSpec("", weight.shape, "float32")
    _, variables = planned(method, weight)
    found = walked(
        method, spec, (0,), weight, variables["vq"]["w"], matrix, largest_first=largest_first
    )
    decoded, _, _ = fed_back(method, weight, matrix, largest_first=largest_first)
    np.testing.assert_array_equal(decoded, found.values)
    assert np.abs(found.target - weight).max() > 0.1


def test_bfloat16_weights_decode_to_what_the_walk_saw():
    method, weight = METHODS["2 bit"], weight_of(INPUTS, OUTPUTS).astype(jnp.bfloat16)
    spec = LeafSpec("", weight.shape, "bfloat16")
    _, variables = planned(method, weight)
    found = walked(method, spec, (0,), weight, variables["vq"]["w"], correlated())
    decoded, report, _ = fed_back(method, weight, correlated())
    np.testing.assert_array_equal(decoded, found.values)
    assert report.after < report.before


@pytest.mark.parametrize(
    "method", [Uniform(bits=3, per_channel=False), Vector(8, 4, axis=0, channel_scale=True)]
)
def test_blocks_change_nothing_but_roundings(method):
    weight, matrix = weight_of(INPUTS, OUTPUTS), correlated()
    spec = LeafSpec("w", weight.shape, "float32")
    learned = planned(method, weight)[1]["vq"]["w"]
    given = method, spec, (0,), weight, learned, matrix
    whole, part = (walked(*given, block=block) for block in (128, 12))
    np.testing.assert_allclose(part.target, whole.target, atol=2e-6)
    np.testing.assert_array_equal(part.values, whole.values)


# Of plans


@every_method
def test_of_inputs_that_are_not_correlated_it_is_rounding_to_nearest(method):
    weight = weight_of(INPUTS, OUTPUTS)
    plan, variables = planned(method, weight)
    inputs = {"w": InputMoments(jnp.eye(INPUTS), (0,))}
    found, report = feed_back(plan, variables, {"w": weight}, inputs)
    chex.assert_trees_all_equal(found, variables)
    assert report["w"].after == report["w"].before > 0


@every_method
def test_outputs_come_nearer(method):
    ratios = []
    for seed in range(4):
        weight, matrix = weight_of(INPUTS, OUTPUTS, seed=seed), correlated(seed=seed)
        decoded, report, _ = fed_back(method, weight, matrix)
        error, whole = np.float64(weight - decoded), np.float64(weight)
        energy = np.sum(error * (matrix @ error)) / np.sum(whole * (matrix @ whole))
        np.testing.assert_allclose(report.after, energy, rtol=1e-4)
        ratios.append(report.after / report.before)
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.8


def test_only_codes_and_latents_change():
    weight = weight_of(INPUTS, OUTPUTS)
    plan, variables = planned(SignSplit(4, 8, alpha=0.5, channel_scale=True), weight)
    _, _, found = fed_back(plan.entries[0].quantizer, weight, correlated())
    for name in ("codebook", "scale"):
        np.testing.assert_array_equal(found["vq"]["w"][name], variables["vq"]["w"][name])
    assert not np.array_equal(found["vq_state"]["w"]["codes"], variables["vq_state"]["w"]["codes"])
    latent, before = found["vq"]["w"]["sign_latent"], variables["vq"]["w"]["sign_latent"]
    assert not np.array_equal(latent < 0, before < 0)
    np.testing.assert_array_equal(latent[0], 0.5 * weight[0])  # the first row takes no error


def test_slices_of_a_stack_are_weights_of_their_own():
    weight, matrix = weight_of(2, 3, INPUTS, 8), jnp.stack([correlated(seed=s) for s in range(6)])
    matrix = matrix.reshape(2, 3, INPUTS, INPUTS)
    method = Vector(8, 4, axis=0, channel_scale=True, iterations=3)
    _, variables = planned(method, weight, stacked=2)
    decoded, report, _ = fed_back(method, weight, matrix, variables=variables, stacked=2)
    energies = []
    for i, j in np.ndindex(2, 3):
        own = {
            **variables,
            **{
                k: jax.tree.map(lambda x, i=i, j=j: x[i, j], variables[k])
                for k in ("vq", "vq_state")
            },
        }
        alone, one, _ = fed_back(method, weight[i, j], matrix[i, j], variables=own)
        np.testing.assert_array_equal(decoded[i, j], alone)
        energy = np.sum(weight[i, j] * (matrix[i, j] @ weight[i, j]))
        energies.append((energy, one.after * energy))
    whole, after = np.sum(energies, axis=0)
    np.testing.assert_allclose(report.after, after / whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes", "back"),
    [
        ((3, 3, 4, 8), (0, 1, 2), (0, 1, 2, 3)),  # HWIO
        ((4, 9, 8), (0, 1), (0, 1, 2)),  # [heads, head_dim, out]
        ((8, 36), (1,), (1, 0)),  # an embedding as a head
    ],
)
def test_any_input_axes_are_the_rows_of_a_matrix(shape, axes, back):
    weight, matrix = weight_of(*shape), correlated(36)
    outputs = next(n for axis, n in enumerate(shape) if axis not in axes)
    method = Uniform(bits=3, channel_axis=back[-1])
    decoded, report, _ = fed_back(method, weight, matrix, axes)
    rows = weight.transpose(back).reshape(36, outputs)
    other, expected, _ = fed_back(Uniform(bits=3), rows, matrix)
    np.testing.assert_array_equal(decoded.transpose(back).reshape(36, outputs), other)
    assert report == expected


def test_sub_vectors_along_an_input_axis_that_is_not_the_fastest():
    # Rows are walked so that a sub-vector's are neighbours: those of the transposed weight.
    weight, matrix = weight_of(4, 8, 6), correlated()
    method = Vector(4, 4, axis=0, iterations=3)
    _, report, found = fed_back(method, weight, matrix, (0, 1))
    order = np.arange(32).reshape(4, 8).T.reshape(-1)
    moved = weight.transpose(1, 0, 2)
    other = Vector(4, 4, axis=1, iterations=3)
    variables = {**found, "vq_state": {"w": {"codes": jnp.zeros(48, jnp.uint8)}}}
    decoded, _, _ = fed_back(other, moved, matrix[order][:, order], (0, 1), variables=variables)
    expected = fed_back(method, weight, matrix, (0, 1))[0]
    np.testing.assert_array_equal(decoded.transpose(1, 0, 2), expected)
    assert report.after < report.before


def test_leaves_that_share_a_codebook_are_walked_one_by_one():
    params = {"a": weight_of(16, 12), "b": weight_of(16, 8, seed=1), "c": weight_of(8, 8, seed=2)}
    method = SignSplit(codewords=8, dim=4, axis=0, iterations=5)
    plan = make_plan(params, [Rule(".*", method, share="s")])
    variables = plan.init(KEY, params)
    inputs = {name: InputMoments(correlated(16, seed=3), (0,)) for name in ("a", "b")}
    found, report = feed_back(plan, variables, params, inputs)
    old, new = plan.decode(variables), plan.decode(found)
    np.testing.assert_array_equal(old["c"], new["c"])
    codebook = found["vq"]["s"]["codebook"]
    for name in ("a", "b"):
        assert report[name].after < report[name].before
        spec = LeafSpec("", params[name].shape, "float32")
        alone = walked(
            method, spec, (0,), params[name], {"codebook": codebook}, inputs[name].matrix
        )
        np.testing.assert_array_equal(new[name], alone.values)


def test_rows_of_the_largest_energy_first():
    # One output, inputs alike but for their energy: the last row has to make good all errors.
    weight = jnp.array([[1.0], [0.4], [0.4], [0.4]])
    direction = jnp.array([0.1, 1.0, 2.0, 3.0])
    matrix = jnp.outer(direction, direction)
    _, variables = planned(Uniform(bits=2), weight)
    variables["vq"]["w"]["step"] = jnp.ones(1)
    settings = {"variables": variables, "damping": 1e-4}
    in_order, _, _ = fed_back(Uniform(bits=2), weight, matrix, **settings)
    falling, _, _ = fed_back(Uniform(bits=2), weight, matrix, **settings, largest_first=True)
    assert in_order.ravel().tolist()[:2] == [1, 0]
    assert falling.ravel().tolist()[3] == 0  # rounded to nearest


# Damping


def test_damping_rises_until_the_factor_is_sound():
    x = np.random.default_rng(0).normal(size=(4, INPUTS)).astype(np.float32)
    weight, matrix = weight_of(INPUTS, OUTPUTS), jnp.asarray(x.T @ x / 4)
    _, report, _ = fed_back(Uniform(bits=3), weight, matrix, damping=0.0)
    assert 1e-6 <= report.damping <= 1e-3
    assert report.after < 0.5 * report.before
    _, report, _ = fed_back(Uniform(bits=3), weight, matrix)
    assert report.damping == np.float32(0.01)
    factor, used = damped_factor(matrix, jnp.float32(0.02))
    mean = jnp.mean(jnp.diagonal(matrix))
    np.testing.assert_allclose(factor @ factor.T, matrix / mean + used * jnp.eye(INPUTS), atol=1e-5)
    np.testing.assert_array_equal(factor, jnp.triu(factor))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_were_always_zero_are_rounded_to_nearest(damping):
    weight, matrix = weight_of(INPUTS, OUTPUTS), correlated()
    alive = jnp.ones(INPUTS).at[jnp.array([0, 5, 31])].set(0)
    matrix = matrix * jnp.outer(alive, alive)
    plan, variables = planned(Uniform(bits=3), weight)
    decoded, report, _ = fed_back(Uniform(bits=3), weight, matrix, damping=damping)
    same = np.all(decoded == np.asarray(plan.decode(variables)["w"]), axis=1)
    assert same[[0, 5, 31]].all()
    assert not same.all()
    assert report.damping == np.float32(damping)


def test_no_inputs_at_all():
    with pytest.warns(UserWarning, match="no data reached it"):
        decoded, report, _ = fed_back(Uniform(bits=3), weight_of(4, 3), jnp.zeros((4, 4)))
    assert (report.before, report.after) == (0, 0)
    assert np.isfinite(decoded).all()


# Refusals


class Whole(Vector):
    """A method that cannot encode a part."""

    slice_parts = Quantizer.slice_parts
    slice_requantize = Quantizer.slice_requantize


@pytest.mark.parametrize(
    ("method", "matrix", "settings", "message"),
    [
        (Uniform(), jnp.eye(3), {}, "leaf 'w' have shape"),
        (Uniform(), jnp.full((8, 8), jnp.nan), {}, "leaf 'w'.*not finite"),
        (Uniform(), 1 - jnp.eye(8) * 2e4, {}, "leaf 'w' are not positive semi-definite"),
        (Uniform(), jnp.eye(8), {"damping": -0.1}, "damping=-0.1"),
        (Uniform(), jnp.eye(8), {"damping": float("nan")}, "damping=nan"),
        (Uniform(), jnp.eye(8), {"block": 0}, "block=0"),
        (Vector(2, 3, axis=0, pad=True), jnp.eye(8), {}, "leaf 'w'.*need padding"),
        (Whole(2, 2), jnp.eye(8), {}, "leaf 'w'.*cannot be encoded in parts"),
    ],
)
def test_what_is_refused(method, matrix, settings, message):
    with pytest.raises(ValueError, match=message):
        fed_back(method, weight_of(8, 6), matrix, **settings)


def test_moments_of_leaves_that_are_not_compressed_are_refused():
    params = {"w": weight_of(8, 6), "b": weight_of(6)}
    plan = make_plan(params, [("w", Uniform()), ("b", None)])
    variables = plan.init(KEY, params)
    with pytest.raises(ValueError, match=r"\['b'\], which this plan does not compress"):
        feed_back(plan, variables, params, {"b": InputMoments(jnp.eye(6), (0,))})


def test_a_method_without_parts_says_so_for_a_part_too():
    spec = LeafSpec("w", (8, 6), "float32")
    with pytest.raises(ValueError, match="leaf 'w': weights of method 'vector' cannot"):
        Whole(2, 2).slice_requantize(weight_of(8, 6), {}, spec, None)


def test_rows_of_a_pyramid_along_the_inputs_are_encoded_as_without():
    weight = weight_of(INPUTS, OUTPUTS)
    _, report, variables = fed_back(Pyramid(8, 8, 3, axis=0), weight, correlated())
    plan, plain = planned(Pyramid(8, 8, 3, axis=0), weight)
    assert plan.decode(variables)["w"].shape == weight.shape
    np.testing.assert_array_equal(
        variables["vq_state"]["w"]["codes"], plain["vq_state"]["w"]["codes"]
    )
    assert report.after == pytest.approx(report.before, rel=1e-3)
