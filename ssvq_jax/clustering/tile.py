"""A tile: the sub-vectors that the clustering loops take at once."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

LANES = 128  # tiles are whole multiples of it, and sums have as many parts


class Tile(NamedTuple):
    """Consecutive sub-vectors.

    Attributes:
        start: row of the first among those of this device.
        counts: `[t]` bool, whether a row is to be counted here: not if it is padding, or if another
            tile, which overlaps with this one, counts it.
        points: `[t, d]` float32, times the problem's scale.
        columns: the same, coordinate by coordinate, `[t]` each; None for wide sub-vectors.
        weights: `[t]` float32, weight p of each; zero where it does not count.
        elements: `[t, d]` float32, weights w of the elements; None for ones.
    """

    start: Int32[Array, ""]
    counts: Bool[Array, " t"]
    points: Float32[Array, "t d"]
    columns: tuple[Float32[Array, " t"], ...] | None
    weights: Float32[Array, " t"]
    elements: Float32[Array, "t d"] | None

    @property
    def mass(self) -> Float32[Array, "t w"]:
        """Weights p_i w_ij, `[t, d]`, or `[t, 1]` where they are the same for all elements."""
        mass = self.weights[:, None]
        return mass if self.elements is None else mass * self.elements

    @property
    def members(self) -> Float32[Array, " t"]:
        """Weights p of those that have a weighted element: others neither move nor hold a codeword.

        They still count in the objective's divisor.
        """
        if self.elements is None:
            return self.weights
        return jnp.where((self.elements > 0).any(axis=1), self.weights, 0.0)

    def errors(self, point: Float32[Array, " d"]) -> Float32[Array, " t"]:
        """Weighted squared differences to one point, sum_j w_ij (x_ij - c_j)^2."""
        if self.columns is None:
            return _weighted(jnp.square(self.points - point[None]), self.elements).sum(axis=1)
        total = jnp.zeros_like(self.weights)
        for j, column in enumerate(self.columns):
            elements = None if self.elements is None else self.elements[:, j]
            total += _weighted(jnp.square(column - point[j]), elements)
        return total

    def hidden(self, count: int) -> Int32[Array, ""]:
        """A number of rounds that the compiler cannot see, so that a loop of one stays a loop.

        What a loop reads is laid out before, and what it returns is computed once, whoever reads
        it: both are faster than what the compiler's fusion would make of the same operations.
        """
        return jnp.where(self.start >= 0, jnp.int32(count), jnp.int32(0))


def _weighted(squares: Array, elements: Array | None) -> Array:
    """Weights squares; one that has no weight may even be infinite."""
    return squares if elements is None else jnp.where(elements > 0, elements * squares, 0.0)


def lane_sum(values: Float32[Array, " t"]) -> Float32[Array, ""]:
    """Sums in as many parts as a processor has lanes: faster, and with smaller rounding errors."""
    padded = jnp.pad(values, (0, -values.shape[0] % LANES))
    return padded.reshape(-1, LANES).sum(axis=0).sum()
