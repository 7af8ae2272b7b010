"""Nearest-centroid assignment, one tile of sub-vectors at a time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from ssvq_jax.clustering.checks import check_centroids, check_points

# Scores held at once (sub-vectors of a tile times centroids). 2^18 floats are 1 MiB: the tile
# stays in a CPU core's L2 cache between the product and its two reductions.
_TILE_SCORES = 2**18


def assign(
    points: Float[Array, "n d"],
    centroids: Float[Array, "k d"],
    *,
    weights: Float[Array, " n"] | Float[Array, "n d"] | None = None,
    mask: Bool[Array, "n d"] | None = None,
) -> Int32[Array, " n"]:
    """Finds the nearest centroid of every sub-vector; of equally near ones, the lowest index.

    The distance is sum_j w_ij (x_ij - c_j)^2, with w the element weights times the mask (all ones
    by default). Every centroid is compared, in float32: distances that differ by no more than its
    rounding may trade places. At most 2^18 distances (or one sub-vector's) exist at a time. A
    sub-vector without a weighted coordinate gets code 0.

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
    return _assign(points, centroids, weights, mask)


@jax.jit
def _assign(
    points: Float[Array, "n d"],
    centroids: Float[Array, "k d"],
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
) -> Int32[Array, " n"]:
    centroids = centroids.astype(jnp.float32)
    elements = element_weights(weights, mask)
    shape = tile_shape(points.shape[0], centroids.shape[0])
    tiles = (
        into_tiles(points.astype(jnp.float32), shape),
        None if elements is None else into_tiles(elements, shape),
    )
    codes = lax.map(lambda tile: nearest(tile[0], centroids, tile[1]), tiles)
    return codes.reshape(-1)[: points.shape[0]]


def nearest(
    points: Float[Array, "t d"],
    centroids: Float[Array, "k d"],
    elements: Float[Array, "t d"] | None,
) -> Int32[Array, " t"]:
    """Calculates the codes of one tile, with all its scores `[k, t]` in memory.

    A score is half the squared distance less the term that all centroids share, in one product
    with the norms folded in: s_ki = <(c_k, |c_k|^2 / 2), (-x_i, 1)>, and with element weights
    s_ki = <(c_k, c_k^2 / 2), (-w_i x_i, w_i)>.
    """
    codewords = centroids.shape[0]
    # An offset common to points and centroids would cancel in s only after costing digits. The
    # median is one of the centroids' own values, so differences of values on a grid (integers,
    # duplicates) stay exact and true ties stay ties; and one far centroid does not move it.
    centre = jnp.sort(centroids, axis=0)[codewords // 2][None]
    points, centroids = points - centre, centroids - centre
    half = 0.5 * jnp.square(centroids)
    if elements is None:
        half = half.sum(axis=1, keepdims=True)
        points, elements = -points, jnp.ones((points.shape[0], 1), jnp.float32)
    else:
        points = -elements * points
    # Full float32: accelerators would otherwise round the factors to bfloat16 or tf32.
    scores = lax.dot_general(
        jnp.concatenate([centroids, half], axis=1),
        jnp.concatenate([points, elements], axis=1),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    # Two minima in place of argmin, which XLA does not vectorise on the CPU. The barrier keeps
    # both from computing the scores anew, each with its own rounding.
    scores = lax.optimization_barrier(scores)
    best = scores.min(axis=0, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    codes = jnp.where(scores == best, index, codewords).min(axis=0)
    return jnp.minimum(codes, codewords - 1)  # NaN equals no minimum; codes must stay in range


def tile_shape(count: int, codewords: int) -> tuple[int, int]:
    """Chooses (tiles, sub-vectors a tile) for `count` sub-vectors, evenly, with little padding."""
    largest = max(1, _TILE_SCORES // codewords)
    tiles = max(1, -(-count // largest))
    return tiles, max(1, -(-count // tiles))


def into_tiles(
    values: Float[Array, " n *rest"], shape: tuple[int, int]
) -> Float[Array, "m t *rest"]:
    """Pads the leading axis with zeros to `shape[0] * shape[1]` and splits it so."""
    padding = shape[0] * shape[1] - values.shape[0]
    values = jnp.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
    return values.reshape(*shape, *values.shape[1:])


def element_weights(
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
) -> Float[Array, "n d"] | None:
    """Joins weights per element and mask to one float32 `[n, d]`; None where all are one."""
    elements = None if mask is None else mask.astype(jnp.float32)
    if weights is not None and weights.ndim == 2:
        weights = weights.astype(jnp.float32)
        elements = weights if elements is None else weights * elements
    return elements
