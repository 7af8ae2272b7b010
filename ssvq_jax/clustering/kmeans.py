"""k-means: Lloyd's iterations over tiles, weighted, masked, with repair of empty codewords."""

import dataclasses
from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from ssvq_jax.clustering.assignment import element_weights, into_tiles, nearest, tile_shape
from ssvq_jax.clustering.checks import check_centroids, check_mass, check_points
from ssvq_jax.clustering.seeding import plus_plus, random_distinct

_SEEDINGS = {"k-means++": plus_plus, "random": random_distinct}


@no_type_check  # pytree functions put shapes, axes or shardings in the place of the arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KMeansResult:
    """Centroids, codes and the course of a k-means run; a pytree.

    The report holds one value an iteration (t of them). Its last values belong to the returned
    centroids and codes, except `empty`, which tells what the iteration found and repaired.

    Attributes:
        centroids: `[k, d]` float32.
        codes: `[n]` int32 in [0, k): for each sub-vector its nearest centroid.
        objective: `[t]` float32, weighted mean squared error per sub-vector:
            sum_i p_i sum_j w_ij (x_ij - c_ij)^2 over sum_i p_i, with p the weights `[n]` (else
            ones, so that the divisor is n) and w the weights `[n, d]` times the mask (else ones).
        empty: `[t]` int32, codewords without a member of positive weight before the update; they
            were re-seeded as far as sub-vectors with an error remained.
        imbalance: `[t]` float32, k sum_c m_c^2 / (sum_c m_c)^2, where m_c is the sum of p over the
            members of codeword c: 1 for equal shares, k if one codeword has all.
    """

    centroids: Float32[Array, "k d"]
    codes: Int32[Array, " n"]
    objective: Float32[Array, " t"]
    empty: Int32[Array, " t"]
    imbalance: Float32[Array, " t"]


def kmeans(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    codewords: int,
    *,
    iterations: int,
    init: str | Float[Array, "k d"] = "k-means++",
    weights: Float[Array, " n"] | Float[Array, "n d"] | None = None,
    mask: Bool[Array, "n d"] | None = None,
) -> KMeansResult:
    """Clusters sub-vectors into k codewords by Lloyd's iterations.

    Minimises sum_i p_i sum_j w_ij (x_ij - c_j(i))^2 over centroids and codes: seed and assign;
    then, each iteration, move every centroid to the weighted mean of its members, re-seed the
    codewords that have none from the sub-vectors with the largest weighted errors (each from
    another one, the worst first), and assign again. No step raises the objective beyond float32
    rounding. All iterations run; there is no early stop.

    Works under `jax.jit`, `jax.vmap` and `jax.lax.map`; `codewords`, `iterations` and a string
    `init` are static. (`jax.vmap` runs the repair in every iteration, needed or not.) Memory
    besides the arguments is a padded copy of them, a few values per sub-vector and one tile of
    distances; an `[n, k]` array never exists.

    Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2), 1982.

    Args:
        key: typed PRNG key (`jax.random.key`); unused where `init` gives the centroids.
        points: sub-vectors x, `[n, d]`, any float dtype; arithmetic is float32.
        codewords: k, from 1 to n.
        iterations: number of Lloyd iterations t, 1 or more.
        init: `"k-means++"`, `"random"` (distinct sub-vectors) or centroids to start from, `[k, d]`.
        weights: importance per sub-vector p, `[n]`, or per element w, `[n, d]`.
        mask: `[n, d]` bool; False leaves an element out of distances and means. A coordinate of a
            centroid that no member has keeps its value.

    Returns:
        Centroids, codes and the report per iteration, see `KMeansResult`.

    Raises:
        ValueError: for k < 1 or k > n, iterations < 1, an unknown `init`, shapes that do not fit
            together, dtypes that are not float (bool for the mask), and, outside `jax.jit`, NaN,
            infinite or negative values, and weights or a mask that leave nothing to cluster.

    Example:
        >>> points = jnp.array([[0.0], [1.0], [10.0], [11.0]])
        >>> start = jnp.array([[0.0], [1.0]])
        >>> result = kmeans(jax.random.key(0), points, 2, iterations=3, init=start)
        >>> result.centroids.tolist(), result.codes.tolist()
        ([[0.5], [10.5]], [0, 0, 1, 1])
        >>> [round(float(value), 2) for value in result.objective]
        [5.39, 0.25, 0.25]
    """
    check_points(points, weights, mask)
    check_mass(weights, mask)
    if codewords < 1:
        raise ValueError(f"k={codewords} codewords asked for: pass 1 or more")
    if codewords > points.shape[0]:
        raise ValueError(
            f"k={codewords} is larger than the number of sub-vectors n={points.shape[0]}: "
            "pass fewer codewords or narrower sub-vectors"
        )
    if iterations < 1:
        raise ValueError(f"iterations={iterations} asked for: pass 1 or more")
    start = None
    if not isinstance(init, str):
        check_centroids("init", init, points)
        if init.shape[0] != codewords:
            raise ValueError(f"init has {init.shape[0]} rows: pass k={codewords} of them")
        start, init = init, "given"
    elif init not in _SEEDINGS:
        raise ValueError(
            f"init={init!r} is unknown: pass one of {sorted(_SEEDINGS)} or centroids "
            f"[{codewords}, {points.shape[1]}]"
        )
    return _lloyd(
        key, points, start, weights, mask, codewords=codewords, iterations=iterations, init=init
    )


class _Tiles(NamedTuple):
    """The problem, padded and split: `[m, t, d]` and `[m, t]`, zero weights in the padding."""

    points: Array
    weights: Array
    elements: Array | None


class _Sweep(NamedTuple):
    """What one pass over the tiles finds for given centroids."""

    codes: Array  # [m, t]
    errors: Array  # [m, t], p_i sum_j w_ij (x_ij - c_ij)^2
    pull: Array  # [k, d], sum over members of p_i w_ij (x_ij - c_ij)
    mass: Array  # [k, d] or [k, 1], sum over members of p_i w_ij
    members: Array  # [k], sum over members of p_i


@partial(jax.jit, static_argnames=("codewords", "iterations", "init"))
def _lloyd(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    start: Float[Array, "k d"] | None,
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
    *,
    codewords: int,
    iterations: int,
    init: str,
) -> KMeansResult:
    count = points.shape[0]
    shape = tile_shape(count, codewords)
    points = points.astype(jnp.float32)
    elements = element_weights(weights, mask)
    if weights is None or weights.ndim == 2:
        weights = jnp.ones((count,))
    weights = weights.astype(jnp.float32)
    total = into_tiles(weights, shape).sum(axis=1).sum()
    if elements is not None:
        # A sub-vector without a weighted element is no member: it neither moves nor holds a
        # codeword. It still counts in the objective's divisor.
        weights = jnp.where((elements > 0).any(axis=1), weights, 0.0)
    if start is None:
        start = _SEEDINGS[init](key, points, weights, elements, codewords=codewords)
    start = start.astype(jnp.float32)
    tiles = _Tiles(
        into_tiles(points, shape),
        into_tiles(weights, shape),
        None if elements is None else into_tiles(elements, shape),
    )

    def iterate(
        state: tuple[Array, _Sweep], _: None
    ) -> tuple[tuple[Array, _Sweep], tuple[Array, Array, Array]]:
        centroids, sweep = state
        # The mean, as a step from the old centroid: exact where members equal it, and precise where
        # they lie close together far from the origin.
        step = sweep.pull / jnp.where(sweep.mass > 0, sweep.mass, 1.0)
        centroids = jnp.where(sweep.mass > 0, centroids + step, centroids)
        empty = sweep.members == 0
        centroids = lax.cond(
            empty.any(), _reseed, lambda *arguments: arguments[0], centroids, empty, sweep, tiles
        )
        sweep = _sweep(tiles, centroids)
        objective = sweep.errors.sum(axis=1).sum() / jnp.where(total > 0, total, 1.0)
        share = sweep.members / jnp.where(total > 0, sweep.members.sum(), 1.0)
        imbalance = codewords * jnp.square(share).sum()
        return (centroids, sweep), (objective, empty.sum(dtype=jnp.int32), imbalance)

    (centroids, sweep), (objective, empty, imbalance) = lax.scan(
        iterate, (start, _sweep(tiles, start)), None, iterations
    )
    return KMeansResult(centroids, sweep.codes.reshape(-1)[:count], objective, empty, imbalance)


def _sweep(tiles: _Tiles, centroids: Float32[Array, "k d"]) -> _Sweep:
    """Assigns all sub-vectors and sums up, tile by tile, what the next update needs."""
    codewords, dim = centroids.shape

    def visit(
        sums: tuple[Array, Array, Array], tile: _Tiles
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        codes = nearest(tile.points, centroids, tile.elements)
        # From the difference itself, not from the scores: those lose small errors to cancellation.
        difference = tile.points - centroids[codes]
        mass = tile.weights[:, None]
        if tile.elements is not None:
            mass = mass * tile.elements
        pull = mass * difference
        found = (pull, mass, tile.weights)
        sums = jax.tree.map(
            lambda total, part: total + jax.ops.segment_sum(part, codes, codewords), sums, found
        )
        return sums, (codes, (pull * difference).sum(axis=1))

    width = 1 if tiles.elements is None else dim
    zeros = (
        jnp.zeros((codewords, dim), jnp.float32),
        jnp.zeros((codewords, width), jnp.float32),
        jnp.zeros((codewords,), jnp.float32),
    )
    (pull, mass, members), (codes, errors) = lax.scan(visit, zeros, tiles)
    return _Sweep(codes, errors, pull, mass, members)


def _reseed(
    centroids: Float32[Array, "k d"], empty: Bool[Array, " k"], sweep: _Sweep, tiles: _Tiles
) -> Float32[Array, "k d"]:
    """Moves the i-th empty codeword onto the sub-vector with the i-th largest error."""
    worst, rows = lax.top_k(sweep.errors.reshape(-1), centroids.shape[0])
    rank = jnp.cumsum(empty) - 1
    rows = rows[rank]
    # A sub-vector without an error gains nothing, and it may be padding.
    moves = (empty & (worst[rank] > 0))[:, None]
    if tiles.elements is not None:
        moves = moves & (tiles.elements.reshape(-1, centroids.shape[1])[rows] > 0)
    return jnp.where(moves, tiles.points.reshape(-1, centroids.shape[1])[rows], centroids)
