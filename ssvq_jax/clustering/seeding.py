"""Initial centroids: k-means++ and distinct sub-vectors at random."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key


def plus_plus(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    weights: Float[Array, " n"],
    elements: Float[Array, "n d"] | None,
    *,
    codewords: int,
) -> Float[Array, "k d"]:
    """Draws sub-vectors one by one, each with probability proportional to its weighted error.

    The first is drawn with probability p_i sum_j w_ij, the others with p_i D(x_i)^2, where
    D(x)^2 = min_c sum_j w_j (x_j - c_j)^2 over the centroids c drawn so far. A drawn sub-vector has
    D = 0 and is not drawn again, unless fewer than k of them differ; then the remaining draws
    repeat the first one's probabilities.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007,
    section 2.2; here with weights.

    Args:
        key: typed PRNG key.
        points: sub-vectors x, `[n, d]` float32.
        weights: weight per sub-vector p, `[n]` float32.
        elements: weight per element w, `[n, d]` float32; None for ones.
        codewords: k.

    Returns:
        Centroids, `[k, d]` float32. Coordinates of weight zero hold the coordinate's mean.
    """
    first_mass = weights if elements is None else weights * elements.sum(axis=1)
    fallback = _means(points, weights, elements)

    def draw(
        nearest: Float[Array, " n"], uniforms: Float[Array, "2"]
    ) -> tuple[Float[Array, " n"], Float[Array, " d"]]:
        worst = nearest.max()  # infinite before the first draw
        mass = jnp.where((worst > 0) & (worst < jnp.inf), nearest, first_mass)
        centroid = _take(sample(uniforms, mass)[None], points, elements, fallback)
        squares = jnp.square(points - centroid)
        squares = squares if elements is None else elements * squares
        return jnp.minimum(nearest, weights * squares.sum(axis=1)), centroid[0]

    start = jnp.full(points.shape[:1], jnp.inf, jnp.float32)
    return lax.scan(draw, start, jax.random.uniform(key, (codewords, 2), jnp.float32))[1]


def random_distinct(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    weights: Float[Array, " n"],
    elements: Float[Array, "n d"] | None,
    *,
    codewords: int,
) -> Float[Array, "k d"]:
    """Draws k rows of `points` without replacement, uniformly over those of positive weight.

    Rows of weight zero are drawn only where too few others exist. Arguments and result are those
    of `plus_plus`.
    """
    mass = weights if elements is None else weights * elements.sum(axis=1)
    lots = (jax.random.bits(key, mass.shape, jnp.uint32) >> jnp.uint32(1)).astype(jnp.int32)
    rows = lax.top_k(jnp.where(mass > 0, lots, -1), codewords)[1]
    return _take(rows, points, elements, _means(points, weights, elements))


def sample(uniforms: Float[Array, "2"], mass: Float[Array, " n"]) -> Int32[Array, ""]:
    """Draws an index with probability proportional to `mass`; never one of mass zero.

    In two levels, a row of a square and then a place in it: a float32 sum over millions of entries
    has steps wider than most entries, and a float32 uniform has fewer values than there are
    entries; over their square root both are fine. If all mass is zero, the index is 0.

    Args:
        uniforms: two independent numbers in [0, 1), one a level.
        mass: `[n]` float32, zero or more.

    Returns:
        The index, int32.
    """
    count = mass.shape[0]
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    square = jnp.pad(mass, (0, rows * columns - count)).reshape(rows, columns)
    row = _sample_flat(uniforms[0], square.sum(axis=1))
    return row * columns + _sample_flat(uniforms[1], square[row])


def _sample_flat(uniform: Float[Array, ""], mass: Float[Array, " m"]) -> Int32[Array, ""]:
    cumulative = jnp.cumsum(mass)
    target = uniform * cumulative[-1]
    index = lax.iota(jnp.int32, mass.shape[0])
    # A parallel cumulative sum may step over an empty entry, or end just below the target: look at
    # the mass itself, and fall back on the last entry that has some.
    first = jnp.where((cumulative > target) & (mass > 0), index, mass.shape[0]).min()
    last = jnp.where(mass > 0, index, 0).max()
    return jnp.minimum(first, last)


def _means(
    points: Float[Array, "n d"],
    weights: Float[Array, " n"],
    elements: Float[Array, "n d"] | None,
) -> Float[Array, " d"] | None:
    """Mean of each coordinate where it has weight: what stands in where a drawn row has none."""
    if elements is None:
        return None
    pull = weights[:, None] * elements
    mass = pull.sum(axis=0)
    return (pull * points).sum(axis=0) / jnp.where(mass > 0, mass, 1.0)


def _take(
    rows: Int32[Array, " k"],
    points: Float[Array, "n d"],
    elements: Float[Array, "n d"] | None,
    fallback: Float[Array, " d"] | None,
) -> Float[Array, "k d"]:
    if elements is None or fallback is None:
        return points[rows]
    return jnp.where(elements[rows] > 0, points[rows], fallback[None])
