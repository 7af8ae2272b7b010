"""Sampling in proportion to mass, and the ways to seed; jitted, as `kmeans` runs them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.clustering import seeding as rules
from ssvq_jax.clustering.problem import block_rows, make_problem

KEY = jax.random.key(0)


def problem(points, weights=None, mask=None):
    count = points.shape[0]
    return make_problem(points, weights, mask, jnp.int32(count), block=block_rows(count))


@jax.jit
def sample(pairs, mass):
    made = problem(jnp.zeros((mass.size, 1)))
    filled = jnp.pad(mass, (0, -mass.size % made.block))
    return rules.sample(pairs, filled, made)


def seeding(rule, **options):
    """Jitted, for unscaled sub-vectors."""

    @partial(jax.jit, static_argnames="codewords")
    def seed(key, points, weights=None, mask=None, *, codewords):
        made = problem(points, weights, mask)
        return rule(key, made, codewords, **options) / made.scale

    return seed


plus_plus = seeding(rules.plus_plus)
plain_plus_plus = seeding(rules.plus_plus, trials=1)
random_distinct = seeding(rules.random_distinct)
SEEDINGS = pytest.mark.parametrize("seeding", [plus_plus, plain_plus_plus, random_distinct])


def test_sample_is_proportional_to_mass():
    # Every pair of a fine grid of uniforms once: the frequencies are the masses, exactly but for
    # the grid's steps.
    mass = jnp.array([0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 4.0, 0.5, 0.0, 0.5])
    steps = (jnp.arange(100.0) + 0.5) / 100
    pairs = jnp.stack(jnp.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    drawn = sample(pairs, mass)
    frequency = np.bincount(drawn, minlength=10) / drawn.size
    np.testing.assert_allclose(frequency, mass / mass.sum(), atol=0.02)
    assert (frequency[np.asarray(mass) == 0] == 0).all()


def test_sample_reaches_both_ends_and_nothing_empty():
    mass = jnp.array([0.0, 0.0, 3.0, 0.0, 1.0, 0.0, 0.0])
    assert sample(jnp.array([[0.0, 0.0], [1 - 2**-24] * 2]), mass).tolist() == [2, 4]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_sample_of_one_mass_finds_it(count):
    for place in range(count):
        mass = jnp.asarray(np.eye(count)[place] * 1e-30, jnp.float32)
        pairs = jnp.array([[0.0] * 2, [0.5] * 2, [1 - 2**-24] * 2])
        assert sample(pairs, mass).tolist() == [place] * 3


def test_sample_without_mass_is_in_range():
    assert sample(jnp.full((1, 2), 0.7), jnp.zeros(5)).tolist() == [0]


@pytest.mark.slow
def test_sample_of_millions_is_uniform():
    count = 5_000_000
    mass = jnp.full(count, 0.1)
    uniforms = jax.random.uniform(KEY, (1000, 2))
    drawn = np.sort(sample(uniforms, mass))
    # Kolmogorov-Smirnov distance: 1.95 / sqrt(1000) is exceeded once in a thousand.
    expected = np.arange(1000) / 1000
    assert np.abs(drawn / count - expected).max() < 1.95 / np.sqrt(1000)
    assert np.unique(drawn).size > 990  # of equal chances: a tenth of a repeat is expected


@SEEDINGS
def test_seeds_are_distinct_rows(seeding):
    points = jnp.arange(24.0).reshape(12, 2)
    centroids = seeding(KEY, points, codewords=12)
    np.testing.assert_array_equal(np.sort(centroids[:, 0]), points[:, 0])
    np.testing.assert_array_equal(centroids[:, 1] - centroids[:, 0], np.ones(12))


@SEEDINGS
def test_rows_without_weight_are_not_drawn(seeding):
    points = jnp.arange(50.0)[:, None]
    weights = (jnp.arange(50) % 10 == 3).astype(jnp.float32)
    centroids = seeding(KEY, points, weights, codewords=5)
    assert sorted(centroids[:, 0].tolist()) == [3, 13, 23, 33, 43]
    centroids = seeding(KEY, points, weights[:, None], codewords=5)
    assert sorted(centroids[:, 0].tolist()) == [3, 13, 23, 33, 43]


@SEEDINGS
def test_coordinates_without_weight_hold_the_mean(seeding):
    points = jnp.array([[1.0, -50.0], [2.0, 4.0], [3.0, 8.0]])
    elements = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 3.0]])
    centroids = seeding(KEY, points, elements, codewords=3)
    rows = centroids[jnp.argsort(centroids[:, 0])]
    np.testing.assert_allclose(rows, [[1, 7], [2, 4], [3, 8]])


def test_plus_plus_follows_the_squared_distance():
    # From 0 the next is 1 with mass 1 or 3 with mass 9; from 1: 0 or 3, masses 1 and 4; from 3:
    # 0 or 1, masses 9 and 4. Weights of 2, 1, 1 double the mass of 0.
    points, weights = jnp.array([[0.0], [1.0], [3.0]]), jnp.array([2.0, 1.0, 1.0])
    keys = jax.random.split(KEY, 20_000)
    draw = jax.vmap(lambda key: plain_plus_plus(key, points, weights, codewords=2))
    pairs = draw(keys)[..., 0]
    first, second = np.asarray(pairs, int).T
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1 / 20_000)
    expected = np.zeros((4, 4))
    expected[0, [1, 3]] = 0.5 * np.array([1, 9]) / 10
    expected[1, [0, 3]] = 0.25 * np.array([2, 4]) / 6
    expected[3, [0, 1]] = 0.25 * np.array([18, 4]) / 22
    np.testing.assert_allclose(table, expected, atol=5 * 0.5 / np.sqrt(20_000))
    assert (table[expected == 0] == 0).all()


def test_plus_plus_measures_only_weighted_coordinates():
    # By the first coordinate the last row is far; by the mask it is a copy of the others.
    points = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, 5.0], [100.0, 0.0]])
    mask = jnp.array([[True, True], [True, True], [True, True], [False, True]])
    keys = jax.random.split(KEY, 50)
    seeds = jax.vmap(lambda key: plus_plus(key, points, None, mask, codewords=2))(keys)
    assert (seeds[..., 1].sum(axis=1) == 5).all()


def test_careful_starts_are_lower():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(16, 4)) * 10
    points = jnp.asarray(centres[rng.integers(16, size=800)] + rng.normal(size=(800, 4)), "float32")

    def error(seeding, key):
        centroids = seeding(key, points, codewords=16)
        return jnp.square(points[:, None] - centroids[None]).sum(axis=2).min(axis=1).mean()

    keys = jax.random.split(KEY, 20)
    greedy, plain, uniform = (
        jax.vmap(lambda key, s=seeding: error(s, key))(keys).mean()
        for seeding in (plus_plus, plain_plus_plus, random_distinct)
    )
    assert greedy < 0.8 * plain < 0.8 * 0.7 * uniform


def test_quantiles_share_the_weight():
    points = jnp.array([[9.0], [1.0], [2.0], [3.0], [4.0], [-7.0]])
    quantiles = seeding(rules.quantiles)
    assert quantiles(KEY, points, codewords=3).tolist() == [[-7.0], [2.0], [4.0]]
    # Masses in order: 1, 0, 1, 5, 1, 0: the halves of 8 end within the 3.
    weights = jnp.array([0.0, 0.0, 1.0, 5.0, 1.0, 1.0])
    assert quantiles(KEY, points, weights, codewords=2).tolist() == [[2.0], [3.0]]
    assert quantiles(KEY, points, weights[:, None], codewords=2).tolist() == [[2.0], [3.0]]
    assert quantiles(KEY, jnp.ones((5, 1)), codewords=4).tolist() == [[1.0]] * 4
