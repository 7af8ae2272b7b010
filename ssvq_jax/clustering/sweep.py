"""What a Lloyd iteration consists of: a pass over the tiles, the update, the repair."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from ssvq_jax.clustering.assignment import nearest
from ssvq_jax.clustering.problem import Problem
from ssvq_jax.clustering.tile import Tile, lane_sum


class Sums(NamedTuple):
    """What one pass finds for given centroids.

    Attributes:
        pull: `[k, d]`, sum over members of p_i w_ij (x_ij - c_ij).
        mass: `[k, d]` (or `[k, 1]` for equal weights of elements), sum over members of p_i w_ij.
        members: `[k]`, sum over members of p_i.
        error: sum over all sub-vectors of p_i sum_j w_ij (x_ij - c_ij)^2.
        total: sum over all sub-vectors of p_i.
    """

    pull: Float32[Array, "k d"]
    mass: Float32[Array, "k w"]
    members: Float32[Array, " k"]
    error: Float32[Array, ""]
    total: Float32[Array, ""]

    @property
    def objective(self) -> Float32[Array, ""]:
        """Weighted mean squared error per sub-vector, of the scaled points."""
        return self.error / jnp.where(self.total > 0, self.total, 1.0)

    @property
    def imbalance(self) -> Float32[Array, ""]:
        """Imbalance of the members, k sum_c m_c^2 / (sum_c m_c)^2."""
        held = self.members.sum()
        share = self.members / jnp.where(held > 0, held, 1.0)
        return self.members.size * jnp.square(share).sum()


def no_sums(problem: Problem, centroids: Float32[Array, "k d"]) -> Sums:
    """The sums over no sub-vectors."""
    codewords, dim = centroids.shape
    return Sums(
        jnp.zeros((codewords, dim), jnp.float32),
        jnp.zeros((codewords, 1 if problem.equal_elements else dim), jnp.float32),
        jnp.zeros((codewords,), jnp.float32),
        jnp.float32(0),
        jnp.float32(0),
    )


def sweep(
    problem: Problem, centroids: Float32[Array, "k d"], codes: Int32[Array, " n"]
) -> tuple[Sums, Int32[Array, " n"]]:
    """Assigns all sub-vectors and sums up, tile by tile, what the next update needs.

    Args:
        problem: the sub-vectors.
        centroids: `[k, d]`, scaled as the problem says.
        codes: `[n]`, overwritten.

    Returns:
        The sums over all devices, and this device's codes.
    """
    codewords = centroids.shape[0]
    shared = problem.equal_elements

    def visit(tile: Tile, carry: tuple[Sums, Array]) -> tuple[Sums, Array]:
        sums, codes = carry
        found, errors = nearest(tile, centroids)
        # From the difference to the old centroid: the sums stay small, so they round little.
        pull = tile.mass * (tile.points - centroids[found])
        members = tile.members
        parts = (pull, members) if shared else (pull, members, tile.mass)
        added = [jax.ops.segment_sum(part, found, codewords) for part in parts]
        sums = Sums(
            sums.pull + added[0],
            sums.mass + (added[1][:, None] if shared else added[2]),
            sums.members + added[1],
            sums.error + lane_sum(tile.weights * errors),
            sums.total + lane_sum(tile.weights),
        )
        return sums, lax.dynamic_update_slice(codes, found, (tile.start,))

    sums, codes = problem.fold(visit, (no_sums(problem, centroids), codes))
    return problem.sum(sums), codes


def move(
    problem: Problem,
    centroids: Float32[Array, "k d"],
    codes: Int32[Array, " n"],
    sums: Sums,
    *,
    empty: Bool[Array, " k"],
    mass: Float32[Array, "k w"] | None = None,
) -> tuple[Float32[Array, "k d"], Int32[Array, ""]]:
    """Moves the centroids to their members' means, and the empty ones to the worst-served rows.

    Args:
        problem: the sub-vectors.
        centroids: `[k, d]`, those of `sums`.
        codes: `[n]`, those of `sums`.
        sums: from `sweep`.
        empty: `[k]`, codewords to re-seed.
        mass: what divides the pull; by default that of the members, which gives their mean.

    Returns:
        The new centroids, and how many of the empty ones were re-seeded.
    """
    if mass is None:
        mass = sums.mass
    # A step from the old centroid: exact where members equal it, and precise where they lie close
    # together far from the origin.
    moved = centroids + sums.pull / jnp.where(mass > 0, mass, 1.0)
    return lax.cond(
        empty.any(),
        _reseed,
        lambda problem, codes, old, moved, empty: (moved, jnp.int32(0)),
        *(problem, codes, centroids, moved, empty),
    )


def _reseed(
    problem: Problem,
    codes: Int32[Array, " n"],
    old: Float32[Array, "k d"],
    moved: Float32[Array, "k d"],
    empty: Bool[Array, " k"],
) -> tuple[Float32[Array, "k d"], Int32[Array, ""]]:
    """Moves the i-th empty codeword onto the sub-vector with the i-th largest error."""
    codewords = old.shape[0]

    def visit(tile: Tile, best: tuple[Array, Array]) -> tuple[Array, Array]:
        size = tile.points.shape[0]
        found = lax.dynamic_slice_in_dim(codes, tile.start, size)
        errors = (tile.mass * jnp.square(tile.points - old[found])).sum(axis=1)
        rows = problem.offset + tile.start + lax.iota(jnp.int32, size)
        return _largest(
            jnp.concatenate([best[0], errors]), jnp.concatenate([best[1], rows]), codewords
        )

    none = (jnp.full((codewords,), -1.0, jnp.float32), jnp.zeros((codewords,), jnp.int32))
    worst, rows = problem.fold(visit, none)
    if problem.axis is not None:
        worst, rows = _largest(problem.gather(worst), problem.gather(rows), codewords)
    rank = jnp.maximum(jnp.cumsum(empty, dtype=jnp.int32) - 1, 0)
    points, elements = problem.rows_at(rows[rank])
    # A sub-vector without an error gains nothing.
    moves = (empty & (worst[rank] > 0))[:, None]
    reseeded = moves.sum(dtype=jnp.int32)
    if elements is not None:
        moves = moves & (elements > 0)
    return jnp.where(moves, points, moved), reseeded


def _largest(
    errors: Float32[Array, " m"], rows: Int32[Array, " m"], count: int
) -> tuple[Float32[Array, " k"], Int32[Array, " k"]]:
    """The largest errors with their rows; of equal ones, those of the lowest rows."""
    best, places = lax.top_k(errors, count)
    return best, rows[places]
