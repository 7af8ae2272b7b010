"""Initial centroids: greedy k-means++, distinct sub-vectors at random, quantiles on a line."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Key

from ssvq_jax.clustering.problem import Problem, bucket
from ssvq_jax.clustering.tile import Tile, lane_sum

Seeding = Callable[[Key[Array, ""], Problem, int], Float32[Array, "k d"]]


def plus_plus(
    key: Key[Array, ""], problem: Problem, codewords: int, *, trials: int | None = None
) -> Float32[Array, "k d"]:
    """Draws sub-vectors one by one, each with probability proportional to its weighted error.

    The first is drawn with probability p_i sum_j w_ij. For each other, a few candidates are drawn
    with p_i D(x_i)^2, where D(x)^2 = min_c sum_j w_j (x_j - c_j)^2 over the centroids c so far, and
    the one that leaves the least error is taken. A taken sub-vector has D = 0 and is not drawn
    again, unless fewer than k of them differ; then the draws repeat the first one's probabilities.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, section 2.2
    and, for the candidates, section 7; here with weights.

    Args:
        key: typed PRNG key.
        problem: the sub-vectors.
        codewords: k.
        trials: candidates per centroid; by default 2 + floor(ln k), as in scikit-learn.

    Returns:
        Centroids, `[k, d]`, scaled as the problem says. Coordinates of weight zero hold the
        coordinate's mean.
    """
    trials = 2 + int(math.log(codewords)) if trials is None else trials
    rows = problem.rows + -problem.rows % problem.block
    mean = _means(problem)

    def by_weight(tile: Tile, mass: Array) -> Array:
        found = tile.mass.sum(axis=1)
        return _put(mass, found, tile)

    first_mass = problem.fold(by_weight, jnp.zeros(rows, jnp.float32))

    def candidates(uniforms: Float32[Array, "m 2"], mass: Array) -> Float32[Array, "m d"]:
        points, elements = problem.rows_at(sample(uniforms, mass, problem))
        return points if elements is None else jnp.where(elements > 0, points, mean)

    def left(tile: Tile, nearest: Array, point: Float32[Array, " d"]) -> Float32[Array, " t"]:
        """Errors that remain with one more centroid."""
        return jnp.minimum(nearest, tile.weights * tile.errors(point))

    def draw(nearest: Array, each: tuple[Array, Array]) -> tuple[Array, Float32[Array, " d"]]:
        index, uniforms = each
        worst = problem.max(nearest.max())  # infinite before the first draw
        unset = (worst == 0) | (worst == jnp.inf)
        points = candidates(uniforms, jnp.where(unset, first_mass, nearest))

        def judge(tile: Tile, sums: Float32[Array, " m"]) -> Float32[Array, " m"]:
            before = _cut(nearest, tile)

            def remains(point: Float32[Array, " d"]) -> Float32[Array, ""]:
                return lane_sum(jnp.where(tile.weights > 0, left(tile, before, point), 0.0))

            return sums + lax.map(remains, points)

        none = jnp.zeros(trials, jnp.float32)
        best = jnp.argmin(problem.sum(problem.fold(judge, none)))
        point = points[jnp.where(index == 0, 0, best)]

        def take(tile: Tile, nearest: Array) -> Array:
            once = tile.hidden(1)  # a loop, so that its input is laid out first, which is faster
            found = lax.fori_loop(
                jnp.int32(0),
                once,
                lambda _, nearest: left(tile, nearest, point),
                _cut(nearest, tile),
            )
            return _put(nearest, found, tile)

        return problem.fold(take, nearest), point

    uniforms = jax.random.uniform(key, (codewords, trials, 2), jnp.float32)
    nearest = jnp.where(first_mass > 0, jnp.float32(jnp.inf), 0.0)
    return lax.scan(draw, nearest, (lax.iota(jnp.int32, codewords), uniforms))[1]


def random_distinct(key: Key[Array, ""], problem: Problem, codewords: int) -> Float32[Array, "k d"]:
    """Draws k sub-vectors without replacement, uniformly over those of positive weight.

    Those of weight zero are drawn only where too few others exist. Arguments and result are those
    of `plus_plus`.
    """
    total = problem.rows * problem.devices
    bits = jax.random.bits(key, (max(bucket(total), total),), jnp.uint32)
    # As positive floats, of which top_k on a CPU finds the largest far sooner than of integers:
    # all patterns from the least normal number to the largest.
    patterns = bits % jnp.uint32(0x7F000000) + jnp.uint32(0x00800000)
    lots = lax.bitcast_convert_type(patterns, jnp.float32)
    lots = lax.dynamic_slice_in_dim(lots, problem.offset, problem.rows)

    def visit(tile: Tile, lots: Array) -> Array:
        drawn = jnp.where(tile.members > 0, _cut(lots, tile), -1.0)
        return _put(lots, drawn, tile)

    lots = problem.fold(visit, lots)
    lots = jnp.where(problem.counted, lots, -2.0)
    best, rows = lax.top_k(lots, min(codewords, problem.rows))
    best, rows = problem.gather(best), problem.gather(rows + problem.offset)
    rows = rows[lax.top_k(best, codewords)[1]]
    points, elements = problem.rows_at(rows)
    return points if elements is None else jnp.where(elements > 0, points, _means(problem))


def quantiles(key: Key[Array, ""], problem: Problem, codewords: int) -> Float32[Array, "k 1"]:
    """Spreads centroids on a line so that each gets the same weight: quantiles (i + 1/2) / k.

    Arguments and result are those of `plus_plus`; d must be 1, and the key is not used.
    """
    del key
    masses = jnp.zeros(problem.rows, jnp.float32)
    masses = problem.fold(lambda tile, mass: _put(mass, tile.mass[:, 0], tile), masses)
    values = problem.gather(problem.points[:, 0].astype(jnp.float32) * problem.scale)
    masses = problem.gather(masses)
    values = jnp.where(masses > 0, values, jnp.inf)  # last: they have no share
    values, masses = lax.sort((values, masses), num_keys=1)
    reached = jnp.cumsum(masses)
    shares = (lax.iota(jnp.float32, codewords) + 0.5) / codewords
    return values[jnp.searchsorted(reached, shares * reached[-1])][:, None]


SEEDINGS: dict[str, Seeding] = {
    "k-means++": plus_plus,
    "quantile": quantiles,
    "random": random_distinct,
}


def sample(
    uniforms: Float32[Array, "m 2"], mass: Float32[Array, " n"], problem: Problem
) -> Int32[Array, " m"]:
    """Draws rows with probability proportional to `mass`; never one of mass zero.

    In two levels, a block of rows and then a row in it: a float32 sum over millions of entries has
    steps wider than most entries, and a float32 uniform has fewer values than there are entries;
    over their square root both are fine. If all mass is zero, it is row 0.

    Args:
        uniforms: two independent numbers in [0, 1) a draw, one a level.
        mass: of this device's rows, filled up to whole blocks; zero or more.
        problem: says how rows are blocked and distributed.

    Returns:
        Rows counted over all devices, int32.
    """
    blocks = mass.reshape(-1, problem.block)
    sums = problem.gather(blocks.sum(axis=1))
    block = jax.vmap(_sample_flat, (0, None))(uniforms[:, 0], sums)
    local = block - problem.offset // problem.block
    mine = (local >= 0) & (local < blocks.shape[0])
    members = problem.sum(
        jnp.where(mine[:, None], blocks[jnp.clip(local, 0, blocks.shape[0] - 1)], 0.0)
    )
    return block * problem.block + jax.vmap(_sample_flat)(uniforms[:, 1], members)


def _sample_flat(uniform: Float32[Array, ""], mass: Float32[Array, " m"]) -> Int32[Array, ""]:
    cumulative = jnp.cumsum(mass)
    target = uniform * cumulative[-1]
    index = lax.iota(jnp.int32, mass.shape[0])
    # A parallel cumulative sum may step over an empty entry, or end just below the target: look at
    # the mass itself, and fall back on the last entry that has some.
    first = jnp.where((cumulative > target) & (mass > 0), index, mass.shape[0]).min()
    last = jnp.where(mass > 0, index, 0).max()
    return jnp.minimum(first, last)


def _means(problem: Problem) -> Float32[Array, " d"]:
    """Mean of each coordinate where it has weight: what stands in where a drawn row has none."""
    zeros = jnp.zeros(problem.dim, jnp.float32)

    def visit(tile: Tile, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        pull = tile.mass * tile.points
        return sums[0] + pull.sum(axis=0), sums[1] + jnp.broadcast_to(
            tile.mass.sum(axis=0), zeros.shape
        )

    pull, mass = problem.sum(problem.fold(visit, (zeros, zeros)))
    return pull / jnp.where(mass > 0, mass, 1.0)


def _cut(values: Array, tile: Tile) -> Array:
    return lax.dynamic_slice_in_dim(values, tile.start, tile.points.shape[0])


def _put(values: Array, found: Array, tile: Tile) -> Array:
    """Writes a tile's values, but not over those of rows that another tile counts."""
    found = jnp.where(tile.counts, found, _cut(values, tile))
    return lax.dynamic_update_slice(values, found, (tile.start,))
