"""N:M sparsity: which N weights of each group of M are kept, and the number of that choice."""

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from ssvq_jax.bitstream import number_dtype
from ssvq_jax.quantizers.base import Stream, check_integer

_MOST_GROUP = 16  # weights; the choices of 8 in 16 are a table of 12,870 rows


@dataclasses.dataclass(frozen=True)
class Pattern:
    """N:M sparsity of sub-vectors: each group of M = ``group`` weights keeps N = ``keep``.

    A group lies in one sub-vector. Its choice is stored as a number below binom(M, N): its place
    among all choices, read as binary numbers (weight i of the group is bit i) and sorted. That
    takes ceil(log2 binom(M, N)) bits, 11 for 4 of 16.

    Attributes:
        keep: N, 1 to M - 1.
        group: M, 2 to 16.

    Example:
        >>> pattern = Pattern(keep=1, group=2)
        >>> mask = pattern.choose(jnp.array([[0.5, 3.0, 2.0, 1.0]]))
        >>> mask.tolist(), pattern.number(mask).tolist()
        ([[False, True, True, False]], [[1, 0]])
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        check_integer("group", self.group, least=2, most=_MOST_GROUP)
        check_integer("keep", self.keep, least=1, most=self.group - 1)

    def check(self, dim: int) -> None:
        """Raises ValueError unless groups divide sub-vectors of this width."""
        if dim % self.group:
            raise ValueError(
                f"group={self.group} does not divide dim={dim}: every group of a mask lies in one "
                "sub-vector; choose another"
            )

    @property
    def choices(self) -> int:
        """binom(M, N)."""
        return math.comb(self.group, self.keep)

    @property
    def width(self) -> int:
        """Bits of a choice."""
        return (self.choices - 1).bit_length()

    def stream(self, count: int, dim: int) -> Stream:
        """The stored choices of ``count`` sub-vectors."""
        shape = (count, dim // self.group)
        return Stream("mask", shape, number_dtype(self.width).name, values=self.choices, lookups=1)

    def choose(self, scores: Float[Array, "n d"]) -> Bool[Array, "n d"]:
        """Keeps the highest scores of each group; of equal ones, the first."""
        groups = scores.reshape(-1, self.group)
        places = jnp.argsort(jnp.argsort(-groups, axis=1, stable=True), axis=1)
        return (places < self.keep).reshape(scores.shape)

    def number(self, mask: Bool[Array, "n d"]) -> UInt[Array, "n groups"]:
        """The numbers of the groups' choices."""
        groups = mask.reshape(mask.shape[0], -1, self.group).astype(jnp.int32)
        bits = jnp.sum(groups << lax.broadcasted_iota(jnp.int32, groups.shape, 2), axis=-1)
        found = jnp.searchsorted(jnp.asarray(_choices(self.keep, self.group)), bits)
        return found.astype(number_dtype(self.width))

    def mask(self, numbers: UInt[Array, "n groups"]) -> Bool[Array, "n d"]:
        """Inverts `number`."""
        bits = jnp.asarray(_choices(self.keep, self.group))[numbers.astype(jnp.int32)]
        shape = (*numbers.shape, self.group)
        kept = bits[..., None] >> lax.broadcasted_iota(jnp.int32, shape, 2) & 1
        return (kept == 1).reshape(numbers.shape[0], -1)

    def kept(self, values: Bool[Array, "n d"], mask: Bool[Array, "n d"]) -> Bool[Array, "n kept"]:
        """Takes the flags of kept weights out, in order."""
        places = self._places(mask)
        groups = values.reshape(*places.shape[:2], self.group)
        return jnp.take_along_axis(groups, places, axis=-1).reshape(values.shape[0], -1)

    def spread(self, kept: Bool[Array, "n kept"], mask: Bool[Array, "n d"]) -> Bool[Array, "n d"]:
        """Inverts `kept`; False for all other weights."""
        before = jnp.cumsum(mask.astype(jnp.int32).reshape(mask.shape[0], -1, self.group), axis=-1)
        place = jnp.maximum(before - 1, 0)
        groups = kept.reshape(*place.shape[:2], self.keep)
        return jnp.take_along_axis(groups, place, axis=-1).reshape(mask.shape) & mask

    def _places(self, mask: Bool[Array, "n d"]) -> Int[Array, "n groups keep"]:
        """Where the kept weights of each group are."""
        groups = mask.reshape(mask.shape[0], -1, self.group)
        return jnp.argsort(~groups, axis=-1, stable=True)[..., : self.keep]


@functools.lru_cache(maxsize=16)
def _choices(keep: int, group: int) -> np.ndarray:
    """All choices as binary numbers, sorted: int32 ``[binom(group, keep)]``."""
    kept = itertools.combinations(range(group), keep)
    return np.sort(np.array([sum(1 << i for i in places) for places in kept], np.int32))
