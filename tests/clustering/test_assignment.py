"""Assignment against brute force in float64, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ssvq_jax.clustering import assign


def brute_force(points, centroids, weights=None, mask=None):
    points, centroids = np.asarray(points, np.float64), np.asarray(centroids, np.float64)
    elements = np.ones_like(points)
    if weights is not None and np.ndim(weights) == 2:
        elements = np.asarray(weights, np.float64)
    if mask is not None:
        elements = elements * np.asarray(mask)
    difference = points[:, None] - centroids[None]
    return np.argmin((elements[:, None] * difference**2).sum(axis=2), axis=1)


def problem(n, d, k, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(n, d)), jnp.float32),
        jnp.asarray(rng.normal(size=(k, d)), jnp.float32),
        jnp.asarray(rng.exponential(size=(n, d)), jnp.float32),
        jnp.asarray(rng.random((n, d)) < 0.5),
    )


@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (5, 3, 1), (1000, 1, 7), (3000, 8, 256)])
def test_equals_brute_force(n, d, k):
    points, centroids, _, _ = problem(n, d, k)
    codes = assign(points, centroids)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, brute_force(points, centroids))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_weighted_and_masked_equal_brute_force(weighted, masked):
    points, centroids, weights, mask = problem(3000, 5, 200)
    chosen = {"weights": weights if weighted else None, "mask": mask if masked else None}
    np.testing.assert_array_equal(
        assign(points, centroids, **chosen), brute_force(points, centroids, **chosen)
    )


# Values on a small grid: exact ties everywhere, all of them exact in float32 too.
GRID = st.integers(-4, 4).map(float)


@given(
    points=hnp.arrays(np.float32, (20, 2), elements=GRID),
    centroids=hnp.arrays(np.float32, (9, 2), elements=GRID),
    mask=hnp.arrays(np.bool_, (20, 2)),
)
def test_ties_go_to_the_lowest_index(points, centroids, mask):
    points, centroids, mask = jnp.asarray(points), jnp.asarray(centroids), jnp.asarray(mask)
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))
    np.testing.assert_array_equal(
        assign(points, centroids, mask=mask), brute_force(points, centroids, mask=mask)
    )


@pytest.mark.parametrize("d", [1, 8])
def test_repeated_centroids_change_no_code(d):
    points, centroids, weights, _ = problem(3001, d, 13)
    repeated = jnp.concatenate([centroids, centroids[::-1], centroids])
    for element_weights in (None, weights):
        np.testing.assert_array_equal(
            assign(points, repeated, weights=element_weights),
            assign(points, centroids, weights=element_weights),
        )


def test_common_offset_costs_no_digits():
    points, centroids, weights, _ = problem(2000, 8, 16)
    points, centroids = points + 3e4, centroids + 3e4
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))
    np.testing.assert_array_equal(
        assign(points, centroids, weights=weights), brute_force(points, centroids, weights)
    )


def test_one_far_centroid_blurs_none_of_the_others():
    points, centroids, _, _ = problem(2000, 8, 17)
    centroids = centroids.at[3].set(1e6)
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))


@pytest.mark.parametrize("offset", [1.0, 1e3, 1e6])
def test_near_ties_are_decided_by_the_last_bits(offset):
    # Midway between two centroids, and up to three floats off to either side.
    low, high = np.float32(offset), np.float32(offset * 1.5)
    centre = np.float32((np.float64(low) + np.float64(high)) / 2)
    step = np.spacing(centre)
    points = jnp.asarray((centre + step * np.arange(-3, 4, dtype=np.float32))[:, None])
    centroids = jnp.asarray([[low], [high], [low], [high]])
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))


def test_two_far_groups_are_told_apart_within():
    # |x|^2 is 10^12, the distances within a group are about 1: a product of points and centroids
    # would lose them.
    rng = np.random.default_rng(0)
    sides = np.float32(1e6) * rng.choice([-1, 1], size=(3000, 1))
    points = jnp.asarray(sides + rng.normal(size=(3000, 4)), jnp.float32)
    centroids = points[:64]
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))


def test_a_centroid_beyond_float32_when_squared_harms_none_of_the_others():
    points, centroids, _, _ = problem(500, 4, 16)
    far = centroids.at[5].set(1e30)
    np.testing.assert_array_equal(assign(points, far), brute_force(points, far))


def test_a_huge_point_harms_none_of_the_others():
    points, centroids, _, _ = problem(500, 4, 16)
    points = points.at[7].set(jnp.array([1e20, -1e20, 1e20, 1e20]))
    codes, expected = assign(points, centroids), brute_force(points, centroids)
    others = np.arange(500) != 7
    np.testing.assert_array_equal(np.asarray(codes)[others], expected[others])


@pytest.mark.parametrize("value", [1e15, 1e25, 3e38])
def test_what_does_not_count_may_be_anything(value):
    points, centroids, weights, mask = problem(500, 4, 16)
    expected = brute_force(points, centroids, weights, mask)
    filled = jnp.where(mask, points, value)
    np.testing.assert_array_equal(assign(filled, centroids, weights=weights, mask=mask), expected)
    zeroed = jnp.where(mask, weights, 0.0)
    np.testing.assert_array_equal(assign(filled, centroids, weights=zeroed), expected)
    # Nor may a coordinate of the centroids that no sub-vector has a weight for.
    points, mask = jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([[True, False]] * 2)
    far = jnp.array([[2.0, value], [1.0, -value]])
    assert assign(points, far, mask=mask).tolist() == [1, 0]


@pytest.mark.parametrize("size", [1e-30, 1e28])
def test_the_size_of_the_weights_does_not_matter(size):
    points, centroids, weights, _ = problem(500, 4, 16)
    np.testing.assert_array_equal(
        assign(points, centroids, weights=weights * size),
        assign(points, centroids, weights=weights),
    )


@pytest.mark.parametrize("width", [33, 100, 700])
def test_wide_sub_vectors(width):
    points, centroids, weights, _ = problem(200, width, 21)
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))
    np.testing.assert_array_equal(
        assign(points, centroids, weights=weights), brute_force(points, centroids, weights)
    )


def test_many_tiles_with_an_overlap():
    points, centroids, _, _ = problem(300_001, 2, 5)
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_scale_does_not_matter(scale):
    points, centroids, _, _ = problem(500, 4, 16)
    np.testing.assert_array_equal(
        assign(points * scale, centroids * scale), assign(points, centroids)
    )


def test_weights_per_sub_vector_change_no_code():
    points, centroids, weights, _ = problem(100, 3, 4)
    weights = weights[:, 0].at[:10].set(0.0)
    np.testing.assert_array_equal(
        assign(points, centroids, weights=weights), assign(points, centroids)
    )


def test_fully_masked_sub_vectors_get_code_zero():
    points, centroids, _, _ = problem(10, 3, 4)
    assert not assign(points, centroids, mask=jnp.zeros((10, 3), bool)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_compared_in_float32(dtype):
    points, centroids, _, _ = problem(500, 8, 16)
    points = points.astype(dtype)
    np.testing.assert_array_equal(assign(points, centroids), brute_force(points, centroids))


def test_jit_vmap_and_map_equal_plain():
    points, centroids, weights, _ = problem(300, 4, 6)
    plain = assign(points, centroids, weights=weights)
    np.testing.assert_array_equal(
        jax.jit(lambda *a: assign(a[0], a[1], weights=a[2]))(points, centroids, weights), plain
    )
    stack = jnp.stack([centroids, centroids[::-1]])
    expected = jnp.stack([assign(points, each) for each in stack])
    np.testing.assert_array_equal(jax.vmap(lambda c: assign(points, c))(stack), expected)
    np.testing.assert_array_equal(jax.lax.map(lambda c: assign(points, c), stack), expected)
