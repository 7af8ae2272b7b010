"""k-means: hand-worked arrays, properties, and scikit-learn from the same start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend import core
from sklearn.cluster import KMeans

from ssvq_jax.clustering import KMeansResult, assign, kmeans

KEY = jax.random.key(0)
SEEDS = st.integers(0, 2**31 - 1)


def column(*values):
    return jnp.array(values, jnp.float32)[:, None]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def measured(points, result, weights=None, elements=None):
    """The objective's definition, in float64, from the returned centroids and codes."""
    difference = np.asarray(points, np.float64) - np.asarray(result.centroids)[result.codes]
    errors = (difference**2 * (1 if elements is None else np.asarray(elements))).sum(axis=1)
    return np.average(errors, weights=weights)


def test_two_clusters_on_a_line():
    # Codes [0, 1, 1, 1]; means 0 and 22/3; codes [0, 0, 1, 1] with errors 0, 1, 64/9, 121/9;
    # means 0.5 and 10.5.
    result = kmeans(KEY, column(0, 1, 10, 11), 2, iterations=3, init=column(0, 1))
    np.testing.assert_allclose(result.centroids, column(0.5, 10.5))
    assert result.codes.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(result.objective, [(1 + 185 / 9) / 4, 0.25, 0.25], rtol=1e-6)
    assert result.empty.tolist() == [0, 0, 0]
    np.testing.assert_allclose(result.imbalance, [1, 1, 1], rtol=1e-6)


def test_weight_per_sub_vector():
    result = kmeans(KEY, column(0, 4), 1, iterations=1, weights=jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(result.centroids, column(1))
    np.testing.assert_allclose(result.objective, [(3 * 1 + 1 * 9) / (3 + 1)])


def test_weight_per_element():
    points = jnp.array([[0.0, 0.0], [4.0, 4.0]])
    weights = jnp.array([[3.0, 1.0], [1.0, 1.0]])
    result = kmeans(KEY, points, 1, iterations=1, weights=weights)
    np.testing.assert_allclose(result.centroids, [[1, 2]])
    np.testing.assert_allclose(result.objective, [((3 * 1 + 4) + (9 + 4)) / 2])


def test_masked_mean():
    points = jnp.array([[1.0, 5.0], [3.0, -70.0], [100.0, 9.0]])
    mask = jnp.array([[True, True], [True, False], [False, True]])
    result = kmeans(KEY, points, 1, iterations=1, mask=mask)
    np.testing.assert_allclose(result.centroids, [[2, 7]])
    np.testing.assert_allclose(result.objective, [((1 + 4) + 1 + 4) / 3], rtol=1e-6)


def test_coordinate_that_no_member_has_keeps_its_value():
    points = jnp.array([[1.0, 5.0], [3.0, 7.0]])
    mask = jnp.array([[True, False], [True, False]])
    result = kmeans(KEY, points, 1, iterations=2, init=jnp.array([[0.0, 42.0]]), mask=mask)
    np.testing.assert_allclose(result.centroids, [[2, 42]])
    np.testing.assert_allclose(result.objective, [1, 1])


def test_empty_codeword_moves_to_the_farthest_sub_vector():
    # All at 1 with errors 1, 0, 1, 361; mean 5.75 and re-seed at 20; then means 1 and 20.
    result = kmeans(KEY, column(0, 1, 2, 20), 2, iterations=2, init=column(1, 100))
    np.testing.assert_allclose(result.centroids, column(1, 20))
    np.testing.assert_allclose(
        result.objective, [(5.75**2 + 4.75**2 + 3.75**2) / 4, 0.5], rtol=1e-6
    )
    assert result.empty.tolist() == [1, 0]
    np.testing.assert_allclose(result.imbalance, [2 * (9 + 1) / 16] * 2, rtol=1e-6)


def test_two_empty_codewords_move_to_two_sub_vectors():
    # Re-seeds at 20 and (of two equal errors) at 0: centroids 5.75, 20, 0 with codes 2, 2, 2, 1;
    # the first is now empty and takes the worst, 2: centroids 2, 20, 1; then 2, 20, 0.5.
    result = kmeans(KEY, column(0, 1, 2, 20), 3, iterations=3, init=column(1, 100, 200))
    np.testing.assert_allclose(result.centroids, column(2, 20, 0.5))
    assert result.codes.tolist() == [2, 2, 0, 1]
    assert result.empty.tolist() == result.reseeded.tolist() == [2, 1, 0]
    np.testing.assert_allclose(result.objective, [5 / 4, 1 / 4, 0.5 / 4], rtol=1e-6)


def test_empty_codeword_moves_to_the_largest_weighted_error():
    # Weighted errors at 1: 400, 0, 1, 0; a codeword whose members all weigh nothing is empty.
    weights = jnp.array([400.0, 1.0, 1.0, 0.0])
    result = kmeans(KEY, column(0, 1, 2, 20), 2, iterations=1, init=column(1, 20), weights=weights)
    assert result.empty.tolist() == [1]
    np.testing.assert_allclose(result.centroids, column(3 / 402, 0), atol=1e-6)


def test_empty_codeword_takes_only_weighted_coordinates():
    points = jnp.array([[0.0, 0.0], [9.0, 5.0]])
    mask = jnp.array([[True, True], [True, False]])
    start = jnp.array([[0.0, 0.0], [100.0, 77.0]])
    result = kmeans(KEY, points, 2, iterations=1, init=start, mask=mask)
    np.testing.assert_allclose(result.centroids[1], [9, 77])


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_constant_data(init):
    points = jnp.full((6, 2), 0.3)
    result = kmeans(KEY, points, 3, iterations=2, init=init)
    np.testing.assert_array_equal(result.centroids, points[:3])
    assert result.codes.tolist() == [0] * 6
    assert result.objective.tolist() == [0, 0]
    assert result.empty.tolist() == [2, 2]
    assert result.reseeded.tolist() == [0, 0]  # no sub-vector has an error
    np.testing.assert_allclose(result.imbalance, [3, 3], rtol=1e-6)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_as_many_codewords_as_sub_vectors(init):
    result = kmeans(KEY, normal(0, 9, 3), 9, iterations=1, init=init)
    assert sorted(result.codes.tolist()) == list(range(9))
    assert result.objective.tolist() == [0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    points = normal(12, 300, 3)
    plain = kmeans(KEY, points, 5, iterations=4)
    scaled = kmeans(KEY, points * scale, 5, iterations=4)
    np.testing.assert_array_equal(plain.codes, scaled.codes)
    np.testing.assert_allclose(plain.centroids, scaled.centroids / scale, rtol=1e-5)


def test_the_ends_of_float32():
    points = jnp.full((6, 2), 3e38, jnp.float32).at[:3].multiply(-1)
    result = kmeans(KEY, points, 2, iterations=2)
    np.testing.assert_array_equal(result.centroids[result.codes], points)
    assert result.objective.tolist() == [0, 0]


def test_denormal_numbers_count_as_zero():
    points = jnp.asarray(np.array([[1e-40], [2e-40], [-1e-39], [1.0]], np.float32))
    result = kmeans(KEY, points, 2, iterations=2)
    assert sorted(result.centroids[:, 0].tolist()) == [0, 1]
    assert (result.codes[:3] == result.codes[0]).all()
    assert (result.codes[:3] != result.codes[3]).all()


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_what_does_not_count_may_be_anything(init):
    points, mask = normal(15, 400, 3), normal(16, 400, 3) > -0.5
    rows = jnp.abs(normal(17, 400)).at[:20].set(0.0)
    filled = jnp.where(mask & (rows > 0)[:, None], points, 1e30)
    for options in (
        {"mask": mask, "weights": rows},
        {"weights": jnp.where(mask, rows[:, None], 0.0)},
    ):
        plain = kmeans(KEY, points, 6, iterations=4, init=init, **options)
        other = kmeans(KEY, filled, 6, iterations=4, init=init, **options)
        np.testing.assert_array_equal(plain.centroids, other.centroids)
        np.testing.assert_array_equal(plain.codes, other.codes)
        np.testing.assert_array_equal(plain.objective, other.objective)


@pytest.mark.parametrize("size", [1e-30, 1e28])
def test_the_size_of_the_weights_does_not_matter(size):
    points, weights = normal(18, 400, 3), jnp.exp(normal(19, 400, 3))
    for each, factor in ((weights, size), (weights[:, 0], 1.0)):
        plain = kmeans(KEY, points, 6, iterations=4, weights=each)
        other = kmeans(KEY, points, 6, iterations=4, weights=each * size)
        np.testing.assert_array_equal(plain.codes, other.codes)
        np.testing.assert_allclose(plain.objective * factor, other.objective, rtol=1e-5)


def test_wide_sub_vectors():
    points = normal(20, 300, 512)
    result = kmeans(KEY, points, 8, iterations=3)
    np.testing.assert_allclose(result.objective[-1], measured(points, result), rtol=1e-5)
    np.testing.assert_array_equal(result.codes, assign(points, result.centroids))


def test_importance_of_elements_against_its_own_definition():
    points, weights = normal(13, 4000, 4), jnp.exp(normal(14, 4000, 4))
    result = kmeans(KEY, points, 12, iterations=6, weights=weights)
    x, w = np.asarray(points, np.float64), np.asarray(weights, np.float64)
    distances = (w[:, None] * (x[:, None] - np.asarray(result.centroids)[None]) ** 2).sum(axis=2)
    assert (np.argmin(distances, axis=1) == result.codes).mean() > 0.9999
    again = kmeans(KEY, points, 12, iterations=1, init=result.centroids, weights=weights)
    members = [result.codes == c for c in range(12)]
    means = [(w[each] * x[each]).sum(axis=0) / w[each].sum(axis=0) for each in members]
    np.testing.assert_allclose(again.centroids, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        result.objective[-1], measured(points, result, elements=weights), rtol=1e-5
    )


GRID = st.integers(-3, 3).map(float)


@given(
    points=hnp.arrays(np.float32, (16, 2), elements=GRID),
    start=hnp.arrays(np.float32, (5, 2), elements=GRID),
    weights=hnp.arrays(np.float32, (16, 2), elements=st.sampled_from([0.0, 0.25, 1.0, 3.0])),
)
def test_objective_never_rises(points, start, weights):
    # The grid brings ties, duplicates, empty codewords and sub-vectors without weight.
    assume(weights.any())
    points, start, weights = jnp.asarray(points), jnp.asarray(start), jnp.asarray(weights)
    plain = kmeans(KEY, points, 5, iterations=6, init=start)
    weighted = kmeans(KEY, points, 5, iterations=6, init=start, weights=weights)
    for result in (plain, weighted):
        assert np.isfinite(result.centroids).all()
        assert (np.diff(result.objective) <= 1e-5).all()
    np.testing.assert_allclose(plain.objective[-1], measured(points, plain), atol=1e-5)
    np.testing.assert_allclose(
        weighted.objective[-1], measured(points, weighted, elements=weights), atol=1e-5
    )
    np.testing.assert_array_equal(plain.codes, assign(points, plain.centroids))
    np.testing.assert_array_equal(
        weighted.codes, assign(points, weighted.centroids, weights=weights)
    )


@settings(max_examples=10)
@given(seed=SEEDS)
def test_weight_two_is_a_duplicate(seed):
    points = normal(seed, 24, 3)
    counts = np.tile([1, 2], 12)
    start = points[:4]
    weighted = kmeans(
        KEY, points, 4, iterations=5, init=start, weights=jnp.asarray(counts, jnp.float32)
    )
    repeated = kmeans(KEY, jnp.repeat(points, counts, axis=0), 4, iterations=5, init=start)
    assume(not weighted.empty.any())  # two copies of the farthest are two candidates
    np.testing.assert_array_equal(np.repeat(weighted.codes, counts), repeated.codes)
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, atol=1e-5)
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-5)
    np.testing.assert_allclose(weighted.imbalance, repeated.imbalance, rtol=1e-5)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_full_mask_and_unit_weights_are_no_mask_and_weights(seed):
    points, start = normal(seed, 40, 3), normal(seed + 1, 4, 3)
    plain = kmeans(KEY, points, 4, iterations=5, init=start)
    for given_weights in (
        {"mask": jnp.ones((40, 3), bool)},
        {"weights": jnp.ones((40,))},
        {"weights": jnp.ones((40, 3)), "mask": jnp.ones((40, 3), bool)},
    ):
        other = kmeans(KEY, points, 4, iterations=5, init=start, **given_weights)
        np.testing.assert_array_equal(plain.codes, other.codes)
        np.testing.assert_allclose(plain.centroids, other.centroids, atol=1e-5)
        np.testing.assert_allclose(plain.objective, other.objective, rtol=1e-5)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_permuted_points_get_permuted_codes(seed):
    points, start = normal(seed, 40, 3), normal(seed + 1, 4, 3)
    order = np.random.default_rng(seed).permutation(40)
    plain = kmeans(KEY, points, 4, iterations=5, init=start)
    permuted = kmeans(KEY, points[order], 4, iterations=5, init=start)
    np.testing.assert_array_equal(plain.codes[order], permuted.codes)
    np.testing.assert_allclose(plain.centroids, permuted.centroids, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_scikit_learn_from_the_same_start(weighted):
    points = normal(3, 3000, 8)
    start = points[:16]
    weights = jnp.abs(normal(4, 3000)) if weighted else None
    ours = kmeans(KEY, points, 16, iterations=25, init=start, weights=weights)
    settings: dict[str, Any] = {"init": np.asarray(start), "n_init": 1, "max_iter": 25, "tol": 0}
    theirs = KMeans(16, algorithm="lloyd", **settings)
    theirs.fit(np.asarray(points, np.float64), sample_weight=weights)
    total = 3000 if weights is None else weights.sum()
    assert theirs.inertia_ is not None
    np.testing.assert_allclose(ours.objective[-1] * total, theirs.inertia_, rtol=1e-5)
    np.testing.assert_allclose(ours.objective[-1], measured(points, ours, weights), rtol=1e-5)


def test_many_tiles_equal_one():
    points, start = normal(5, 70_000, 2), normal(6, 16, 2)  # five tiles, the last one padded
    result = kmeans(KEY, points, 16, iterations=4, init=start)
    centroids = np.asarray(start, np.float64)
    for _ in range(4):
        codes = np.asarray(assign(points, jnp.asarray(centroids, jnp.float32)))
        centroids = np.stack([np.asarray(points)[codes == c].mean(axis=0) for c in range(16)])
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-4)
    np.testing.assert_allclose(result.objective[-1], measured(points, result), rtol=1e-5)
    counts = np.bincount(result.codes, minlength=16)
    np.testing.assert_allclose(result.imbalance[-1], 16 * (counts**2).sum() / 70_000**2, rtol=1e-5)


def test_far_from_the_origin():
    points = jnp.round(normal(7, 200, 4) * 64) / 64  # so that the shift itself rounds nothing
    near = kmeans(KEY, points, 5, iterations=5, init=points[:5])
    far = kmeans(KEY, points + 8192, 5, iterations=5, init=points[:5] + 8192)
    np.testing.assert_array_equal(near.codes, far.codes)
    # Floats near 8192 are 2^-10 apart, so each of 4 coordinates of a mean is off by half of that.
    np.testing.assert_allclose(near.objective, far.objective, atol=4 * 2**-11)


def test_jit_vmap_and_map_equal_plain():
    points, keys = normal(8, 3, 60, 2), jax.random.split(KEY, 3)
    mask = normal(9, 60, 2) > -1

    def cluster(key, points):
        return kmeans(key, points, 4, iterations=4, mask=mask)

    plain = jax.tree.map(lambda *parts: jnp.stack(parts), *map(cluster, keys, points))
    assert isinstance(plain, KMeansResult)
    jitted = jax.jit(lambda: jax.lax.map(lambda each: cluster(*each), (keys, points)))()
    for other in (jitted, jax.vmap(cluster)(keys, points)):
        np.testing.assert_array_equal(plain.codes, other.codes)
        np.testing.assert_allclose(plain.centroids, other.centroids, rtol=1e-5)
        np.testing.assert_allclose(plain.objective, other.objective, rtol=1e-5)
        np.testing.assert_array_equal(plain.empty, other.empty)


def test_same_key_same_result_other_key_other_start():
    points = normal(10, 60, 2)
    first, again, other = (
        kmeans(jax.random.key(seed), points, 4, iterations=1).centroids for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_results_are_float32_whatever_comes_in(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        result = kmeans(KEY, normal(11, 30, 2).astype(dtype), 3, iterations=2)
    assert result.centroids.dtype == result.objective.dtype == jnp.float32
    assert result.imbalance.dtype == jnp.float32
    assert result.codes.dtype == result.empty.dtype == jnp.int32


def sizes(jaxpr):
    """Element counts of every intermediate, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (np.prod(variable.aval.shape, dtype=int) for variable in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: isinstance(leaf, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(value, core.ClosedJaxpr):
                yield from sizes(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                yield from sizes(value)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_array_of_all_distances(weighted):
    n, d, k = 2**22, 8, 1024
    points = jax.ShapeDtypeStruct((n, d), jnp.float32)

    def run(points):
        weights = points if weighted else None
        return kmeans(KEY, points, k, iterations=2, weights=weights)

    assert n <= max(sizes(jax.make_jaxpr(run)(points).jaxpr)) < n * d  # not even a copy of them
