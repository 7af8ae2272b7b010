"""A clustering problem as the loops see it: tile by tile, on one device or a share of many."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int32

from ssvq_jax.clustering.tile import LANES, Tile

# Floats that a tile's coordinates and running results take: on the CPU what stays near a core (a
# tile is read k/16 times) and still outweighs starting a loop, on accelerators what fills one.
_TILE_FLOATS = {"cpu": 2**20}
_ACCELERATOR_TILE_FLOATS = 2**24
_LARGEST_COPY = 2**24  # numbers; 64 MiB in float32
# Wider sub-vectors are summed up by a loop: unrolled, they compile slowly.
_UNROLLED_WIDTH = 64
# Problems up to the largest of these sizes share compiled loops: their rows are padded to the next.
# The loops take a quarter at once, and leave out quarters that are nothing but padding.
_BUCKETS = (2**11, 2**13, 2**15, 2**17)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Sub-vectors with their weights; under ``jax.shard_map`` one device's share of them.

    Attributes:
        points: `[n, d]`, any float dtype.
        weights: `[n]` weight of each sub-vector, or `[n, d]` of each element; None for ones.
        mask: `[n, d]` bool; None for all True.
        count: rows of all devices that are no padding, int32.
        scale: power of two that brings the points to where squares fit float32 best.
        weight_scale: the same for the weights.
        columns: the points transposed, which is faster to read; None if they are too many to copy.
        block: rows that sampling takes together. It does not depend on the number of devices, whose
            shares are whole blocks, so that they draw what one device would.
        axis: name of the mesh axis over which the rows are cut; None on one device.
    """

    points: Float[Array, "n d"]
    weights: Float[Array, " n"] | Float[Array, "n d"] | None
    mask: Bool[Array, "n d"] | None
    count: Int32[Array, ""]
    scale: Float32[Array, ""]
    weight_scale: Float32[Array, ""]
    columns: Float[Array, "d n"] | None
    block: int = dataclasses.field(metadata={"static": True})
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def rows(self) -> int:
        """Rows on this device."""
        return self.points.shape[0]

    @property
    def dim(self) -> int:
        """Width d of a sub-vector."""
        return self.points.shape[1]

    @property
    def equal_elements(self) -> bool:
        """Whether all elements of a sub-vector weigh the same."""
        return self.mask is None and (self.weights is None or self.weights.ndim == 1)

    @property
    def devices(self) -> int:
        """Number of devices that hold a share."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    @property
    def counted(self) -> Bool[Array, " n"]:
        """Which rows of this device are no padding."""
        return lax.iota(jnp.int32, self.rows) + self.offset < self.count

    @property
    def tile_rows(self) -> int:
        """Rows of a tile; the last one overlaps the one before."""
        parts = 4 if _BUCKETS[0] < self.rows <= _BUCKETS[-1] else 1
        tiles = max(parts, -(-self.rows // _largest_tile(self.dim)))
        even = -(-self.rows // tiles)
        return min(self.rows, -(-even // LANES) * LANES)

    def tile(self, index: Int32[Array, ""] | int) -> Tile:
        """Takes out one tile; a row counts in the first tile that holds it."""
        size = self.tile_rows
        first = jnp.asarray(index, jnp.int32) * size
        start = jnp.minimum(first, self.rows - size)
        row = start + lax.iota(jnp.int32, size)
        counts = (row >= first) & (row + self.offset < self.count)

        def cut(values: Array) -> Array:
            return lax.dynamic_slice_in_dim(values, start, size)

        points = cut(self.points).astype(jnp.float32) * self.scale
        weights = counts.astype(jnp.float32)
        elements = None if self.mask is None else cut(self.mask).astype(jnp.float32)
        if self.weights is not None:
            given = cut(self.weights).astype(jnp.float32) * self.weight_scale
            if given.ndim == 1:
                weights = jnp.where(counts, given, 0.0)
            else:
                elements = given if elements is None else given * elements
        columns = None
        if self.columns is not None:
            across = lax.dynamic_slice_in_dim(self.columns, start, size, axis=1)
            columns = tuple(across[j].astype(jnp.float32) * self.scale for j in range(self.dim))
        elif self.dim <= _UNROLLED_WIDTH:
            columns = tuple(points[:, j] for j in range(self.dim))
        if self.mask is not None or self.weights is not None:
            # What does not count may be anything, too large to be squared even.
            used = jnp.broadcast_to(weights[:, None] > 0, points.shape)
            used = used if elements is None else used & (elements > 0)
            points = jnp.where(used, points, 0.0)
            if columns is not None:
                columns = tuple(jnp.where(used[:, j], x, 0.0) for j, x in enumerate(columns))
        return Tile(start, counts, points, columns, weights, elements)

    def fold(self, visit: Callable[[Tile, Any], Any], initial: Any) -> Any:
        """Carries a value through all tiles of this device that hold a row that counts."""
        here = jnp.clip(self.count - self.offset, 0, self.rows)
        tiles = (here + (self.tile_rows - 1)) // self.tile_rows
        zero = jnp.int32(0)
        return lax.fori_loop(zero, tiles, lambda i, carry: visit(self.tile(i), carry), initial)

    @property
    def offset(self) -> Int32[Array, ""]:
        """Row of all devices that this one's first row is."""
        if self.axis is None:
            return jnp.int32(0)
        return lax.axis_index(self.axis) * self.rows

    def unscaled(self, objective: Float32[Array, "*t"]) -> Float32[Array, "*t"]:
        """A mean squared error of scaled points, in the user's units."""
        unit = 1 / self.scale
        objective = objective * unit * unit  # the compiler would divide by the scale's square
        per_element = self.weights is not None and self.weights.ndim == 2
        return objective / self.weight_scale if per_element else objective  # of rows, it cancels

    def sum(self, values: Any) -> Any:
        """Sums over the devices."""
        return values if self.axis is None else lax.psum(values, self.axis)

    def max(self, values: Any) -> Any:
        """Maximum over the devices."""
        return values if self.axis is None else lax.pmax(values, self.axis)

    def gather(self, values: Array) -> Array:
        """Joins the devices' arrays along the first axis."""
        return values if self.axis is None else lax.all_gather(values, self.axis, tiled=True)

    def rows_at(self, rows: Int32[Array, " m"]) -> tuple[Array, Array | None]:
        """Fetches sub-vectors from wherever they are.

        Args:
            rows: `[m]` int32, counted over all devices; the same on all of them.

        Returns:
            The scaled sub-vectors `[m, d]` and their elements' weights, or None for ones.
        """
        local = jnp.clip(rows - self.offset, 0, self.rows - 1)
        mine = ((rows >= self.offset) & (rows < self.offset + self.rows))[:, None]

        def fetch(values: Array) -> Array:
            return self.sum(jnp.where(mine, values[local].astype(jnp.float32), 0.0))

        points = fetch(self.points) * self.scale
        elements = None if self.mask is None else fetch(self.mask)
        if self.weights is not None and self.weights.ndim == 2:
            given = fetch(self.weights) * self.weight_scale
            elements = given if elements is None else given * elements
        return points if elements is None else jnp.where(elements > 0, points, 0.0), elements


def make_problem(
    points: Float[Array, "n d"],
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
    count: Int32[Array, ""],
    centroids: Float[Array, "k d"] | None = None,
    *,
    block: int = 1,
    axis: str | None = None,
) -> Problem:
    """Sets up a problem and finds its scale.

    Scaling by a power of two rounds nothing, and keeps squares of very large or small values from
    overflowing or vanishing. What counts is the largest weighted element, or, where all of them are
    smaller, the nearest given centroid. It comes to 2^20: so high, for values 10^24 times smaller
    keep their squares; no higher, for sums of weighted squares have to fit, too.

    Args:
        points: sub-vectors, `[n, d]`; under ``jax.shard_map`` this device's.
        weights: `[n]` or `[n, d]`; None for ones.
        mask: `[n, d]` bool; None for all True.
        count: rows of all devices that are no padding.
        centroids: `[k, d]` with which they will be compared, if there are any yet.
        block: rows that sampling takes together, from `block_rows`.
        axis: mesh axis over which the rows are cut.
    """
    small = points.size <= _LARGEST_COPY and points.shape[1] <= _UNROLLED_WIDTH
    one = jnp.float32(1)
    columns = points.T if small else None
    problem = Problem(points, weights, mask, count, one, one, columns, block, axis)
    if weights is not None:
        largest = problem.max(jnp.max(weights).astype(jnp.float32))
        problem = dataclasses.replace(problem, weight_scale=_power_of_two(largest, 0))

    def visit(tile: Tile, largest: Float32[Array, " d"]) -> Float32[Array, " d"]:
        counted = jnp.where(tile.mass > 0, jnp.abs(tile.points), -1.0)
        return jnp.maximum(largest, counted.max(axis=0))

    largest = problem.max(problem.fold(visit, jnp.full(problem.dim, -1.0, jnp.float32)))
    unit = largest.max()
    if centroids is not None:
        across = jnp.where(largest[None] >= 0, jnp.abs(centroids.astype(jnp.float32)), 0.0)
        unit = jnp.maximum(unit, across.max(axis=1).min())
    return dataclasses.replace(problem, scale=_power_of_two(unit, 20))


def _power_of_two(largest: Float32[Array, ""], target: int) -> Float32[Array, ""]:
    """The factor that brings a positive value to about 2^target; 1 for zero, infinity and NaN."""
    exponent = lax.bitcast_convert_type(jnp.maximum(largest, 0.0), jnp.int32) >> 23
    factor = jnp.clip(254 + target - exponent, 1, 253) << 23
    usable = (exponent > 0) & (exponent < 255)
    return jnp.where(usable, lax.bitcast_convert_type(factor, jnp.float32), 1.0)


def _largest_tile(dim: int) -> int:
    """Chooses how many sub-vectors of width `dim` the loops take at once."""
    floats = _TILE_FLOATS.get(jax.default_backend(), _ACCELERATOR_TILE_FLOATS)
    return max(LANES, floats // (dim + 8) // LANES * LANES)


def bucket(rows: int) -> int:
    """Number of rows to which as many are padded, so that few shapes are compiled."""
    return next((size for size in _BUCKETS if rows <= size), rows)


def block_rows(rows: int) -> int:
    """Rows that sampling takes together of so many (padding not counted): about the root."""
    return math.isqrt(bucket(rows) - 1) + 1


def bucketed(
    points: Float[Array, "n d"],
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
    multiple: int = 1,
) -> tuple[Array, Array | None, Array | None]:
    """Pads the rows to their `bucket` and to a multiple; what is being traced stays as it is."""
    rows = points.shape[0]
    size = rows if isinstance(points, Tracer) else bucket(rows)
    padding = size + (-size % multiple) - rows

    def pad(values: Array) -> Array:
        if padding == 0:
            return values
        return jnp.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))

    return pad(points), *jax.tree.map(pad, (weights, mask))
