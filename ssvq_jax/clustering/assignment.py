"""Nearest-centroid assignment, exact, one tile of sub-vectors at a time."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from ssvq_jax.clustering.checks import check_centroids, check_points
from ssvq_jax.clustering.compilation import compiled
from ssvq_jax.clustering.problem import bucketed, make_problem
from ssvq_jax.clustering.tile import Tile

# Products unrolled into one loop body: longer ones take longer to compile and are no faster.
_UNROLLED = 256


def assign(
    points: Float[Array, "n d"],
    centroids: Float[Array, "k d"],
    *,
    weights: Float[Array, " n"] | Float[Array, "n d"] | None = None,
    mask: Bool[Array, "n d"] | None = None,
) -> Int32[Array, " n"]:
    """Finds the nearest centroid of every sub-vector; of equally near ones, the lowest index.

    The distance is sum_j w_ij (x_ij - c_j)^2, with w the element weights times the mask (all ones
    by default). Every centroid is compared, by sums of squared differences in float32: nothing
    cancels, whatever the points' norms, and only distances within some 2^-23 (d + 2) of each other
    may trade places. Numbers 10^24 times smaller than the largest weighted one, and those below
    float32's 1.2e-38, count as zero. A sub-vector without a weighted coordinate gets code 0.

    Memory besides the arguments and the codes is that of one tile (some 16 MiB on a CPU) and, for
    up to 2^24 numbers, of a transposed copy.

    Args:
        points: sub-vectors, `[n, d]`, any float dtype.
        centroids: `[k, d]`, any float dtype.
        weights: importance per element, `[n, d]`. One weight per sub-vector, `[n]`, scales its
            distances to all centroids alike and so changes no code.
        mask: `[n, d]` bool; False leaves a coordinate out of the distance.

    Returns:
        Codes, `[n]` int32 in [0, k).

    Raises:
        ValueError: for shapes that do not fit together, dtypes that are not float (bool for the
            mask), and, outside `jax.jit`, NaN, infinite or negative values.

    Example:
        >>> assign(jnp.array([[0.1], [0.9], [0.5]]), jnp.array([[0.0], [1.0]])).tolist()
        [0, 1, 0]
    """
    check_points(points, weights, mask)
    check_centroids("centroids", centroids, points)
    rows = points.shape[0]
    if rows == 0:
        return jnp.zeros(0, jnp.int32)
    if weights is not None and weights.ndim == 1:
        weights = None
    points, weights, mask = bucketed(points, weights, mask)
    return _assign(points, centroids, weights, mask, jnp.int32(rows))[:rows]


def _run(
    points: Float[Array, "n d"],
    centroids: Float[Array, "k d"],
    weights: Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
    count: Int32[Array, ""],
) -> Int32[Array, " n"]:
    problem = make_problem(points, weights, mask, count, centroids)
    scaled = centroids.astype(jnp.float32) * problem.scale

    def visit(tile: Tile, codes: Int32[Array, " n"]) -> Int32[Array, " n"]:
        return lax.dynamic_update_slice(codes, nearest(tile, scaled)[0], (tile.start,))

    return problem.fold(visit, jnp.zeros(problem.rows, jnp.int32))


_assign = compiled(_run)


def nearest(
    tile: Tile, centroids: Float32[Array, "k d"]
) -> tuple[Int32[Array, " t"], Float32[Array, " t"]]:
    """Finds the nearest centroid of every sub-vector of a tile, and how far it is.

    A loop over blocks of centroids, unrolled within a block, keeps the least distance so far and
    its index, sub-vector by sub-vector: the machine sees one long elementwise loop, which it
    vectorises over the sub-vectors, and no distance but the least is ever stored.

    Args:
        tile: sub-vectors, scaled.
        centroids: `[k, d]` float32, scaled alike.

    Returns:
        Codes `[t]` int32, and sum_j w_ij (x_ij - c_j)^2 for them, `[t]` float32.
    """
    codewords, dim = centroids.shape
    per_block = _UNROLLED // (dim if tile.elements is None else 2 * dim)
    size = max(1, min(codewords, per_block, 16))

    def visit(block: Int32[Array, ""] | int, state: Array) -> Array:
        # One complex array holds distance and index: two arrays would be the results of two loops,
        # each of which computed all distances.
        least, index = lax.real(state), lax.imag(state)
        first = jnp.minimum(jnp.asarray(block, jnp.int32) * size, codewords - size)
        for place in range(size):
            other = tile.errors(lax.dynamic_index_in_dim(centroids, first + place, keepdims=False))
            nearer = other < least
            least = jnp.where(nearer, other, least)
            index = jnp.where(nearer, (first + place).astype(jnp.float32), index)
        return lax.complex(least, index)

    shape = tile.points.shape[:1]
    start = lax.complex(jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    blocks = tile.hidden(-(-codewords // size))
    state = lax.fori_loop(jnp.int32(0), blocks, visit, start)
    return lax.imag(state).astype(jnp.int32), lax.real(state)
