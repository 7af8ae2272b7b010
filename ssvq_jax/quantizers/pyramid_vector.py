"""PVQ: pyramid vector quantization of weights, with directions that need no codebook."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Key, UInt32
from scipy.special import betaincinv

from ssvq_jax.bitstream import number_dtype
from ssvq_jax.blocks import BlockLayout, block_layout
from ssvq_jax.quantizers import pyramid
from ssvq_jax.quantizers.base import (
    MOST_AXES,
    Encoded,
    Fields,
    Parts,
    Quantizer,
    Storage,
    Stream,
    check_flag,
    check_integer,
    round_scale,
)
from ssvq_jax.quantizers.calibration import Calibration, importance_of
from ssvq_jax.rotation import Rotation
from ssvq_jax.tree import LeafSpec

_MOST_WIDTH = 256  # bits of an index: compiling takes longer with every word
_TINY = float(np.finfo(np.float32).tiny)
_FITS = 2  # rounds of amplitudes, then scales


@dataclasses.dataclass(frozen=True)
class Pyramid(Quantizer):
    """PVQ: groups of D weights as a point of a pyramid, an amplitude and the scale of their row.

    A row is what lies along ``axis``, M weights, rotated first if asked (`Rotation`; decode
    rotates back). A group of a row is s * a * p / |p|_2, with the row's scale s (16 bits, trained),
    one of 2^b amplitudes a and a point p of P(D, K), stored as Fischer's index. Of a row of
    independent normal weights, which a rotation makes of any, the square of a group's norm is the
    row's times a Beta(D/2, (M-D)/2) share: the amplitudes are the roots of its quantiles at
    (i + 1/2) / 2^b, times sqrt(M). Stored: (ceil(log2 N(D, K)) + b) / D + 16 / M bits a weight.

    Source: "Pyramid vector quantization for LLMs", arXiv 2410.16926.

    Attributes:
        dim: D, weights in a group.
        pulses: K, the sum of a point's magnitudes; see `pulses_for`.
        amplitude_bits: b, 0 to 8.
        rotate: rotate every row along ``axis``.
        seed: of the rotation's signs.
        axis: axis along which rows and groups run (of one slice, for stacked leaves): the last one,
            of the outputs in Flax, by default.
        pad: append zeros where ``dim`` does not divide the (rotated) row.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> spec = LeafSpec("w", (192, 768), "float32")
        >>> Pyramid(dim=16, pulses=10, amplitude_bits=3).storage(spec).bits / spec.size
        2.0208...
    """

    method: ClassVar[str] = "pyramid"
    groups: ClassVar[Mapping[str, str]] = {"scale": "scale"}

    dim: int = 16
    pulses: int = 10
    amplitude_bits: int = 3
    rotate: bool = True
    seed: int = 0
    axis: int = -1
    pad: bool = False

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, least=1, most=pyramid.MOST_DIM)
        check_integer("pulses", self.pulses, least=1, most=pyramid.MOST_PULSES)
        check_integer("amplitude_bits", self.amplitude_bits, least=0, most=8)
        check_integer("seed", self.seed, least=0)
        check_integer("axis", self.axis, least=-MOST_AXES, most=MOST_AXES)
        for name in ("rotate", "pad"):
            check_flag(name, getattr(self, name))
        width = pyramid.width(self.dim, self.pulses)
        if width > _MOST_WIDTH:
            raise ValueError(
                f"dim={self.dim}, pulses={self.pulses}: an index has {width} bits, and "
                f"{_MOST_WIDTH} are the most: use fewer pulses or a smaller dim"
            )

    @property
    def settings(self) -> str:
        """Dimension, pulses, amplitudes, and whether rows are rotated."""
        rotated = " rotated" if self.rotate else ""
        return f"d={self.dim} K={self.pulses} a={self.amplitude_bits}{rotated}"

    @property
    def index_words(self) -> int:
        """Words of 32 bits of an index."""
        return pyramid.words(self.dim, self.pulses)

    def layout(self, spec: LeafSpec) -> BlockLayout:
        """The cut of one slice into groups."""
        return block_layout(spec.shape, self.dim, self.axis, pad=self.pad, path=spec.path)

    def slice_check(self, spec: LeafSpec) -> None:
        """Raises ValueError if rows cannot be cut into groups."""
        self.layout(spec)

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Searches points, then fits amplitudes and scales by least squares, in turns.

        Importance weighs the squared errors; of rotated rows, whose weights mix, it has no part.
        """
        rows = self._rows(weight, spec)
        weights = self._weights(calibration, spec)
        points = self._search(rows, weights)
        scale, codes = _fit(rows, weights, self._directions(points), self._levels(spec))
        return Encoded({"scale": scale}, self._fixed(points, codes))

    def slice_parts(self, spec: LeafSpec) -> Parts:
        """Whole rows; scales are cut with the other axis.

        Raises:
            ValueError: naming the leaf, if it is no matrix.
        """
        if len(spec.shape) != 2:
            raise ValueError(
                f"leaf '{spec.path}' of shape {spec.shape}: rows of a pyramid are encoded in parts "
                "for matrices only: leave the leaf out, or choose another method"
            )
        axis = self.layout(spec).axis
        return Parts(spec.shape[axis], axis, {"scale": 1 - axis})

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Chooses points and amplitudes anew, with the scales there are."""
        rows = self._rows(weight, spec)
        weights = self._weights(calibration, spec)
        scale = round_scale(learned["scale"])
        points = self._search(rows, weights)
        weights = jnp.ones_like(rows) if weights is None else weights
        directions = self._directions(points)
        along = jnp.sum(weights * rows * directions, axis=-1)
        own = jnp.sum(weights * jnp.square(directions), axis=-1)
        # Where a scale is negative (training moved it), its groups point the other way.
        points = jnp.where(scale[:, None, None] < 0, -points, points)
        codes = _choose(along, own, jnp.abs(scale), self._levels(spec))
        return Encoded({**learned}, self._fixed(points, codes))

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """Computes s * a * p / |p|, rotated back; the scale comes last: a row has one."""
        layout = self.layout(spec)
        points = pyramid.point(fixed["codes"], self.dim, self.pulses)
        levels = self._levels(spec)
        chosen = levels[fixed["amplitudes"].astype(jnp.int32)] if self.amplitude_bits else levels
        factor = self._inverse_norms(points) * chosen
        # With 15 bits of it, products with pulses are exact: the same bits however they are fused.
        factor = lax.reduce_precision(factor, 8, 14)
        values = factor[:, None] * points.astype(jnp.float32)
        length = spec.shape[layout.axis]
        rows = values.reshape(-1, length + layout.padding)[:, :length]
        if self.rotate:
            rows = Rotation(length, self.seed).inverse(rows)
        rows = rows * round_scale(learned["scale"])[:, None]
        others = spec.shape[: layout.axis] + spec.shape[layout.axis + 1 :]
        return jnp.moveaxis(rows.reshape(*others, length), -1, layout.axis)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Indices, amplitudes and scales.

        An index of several words is the field ``codes`` of its highest word, in the bits that this
        needs, and ``low_words`` of the others.
        """
        layout = self.layout(spec)
        low = self.index_words - 1
        highest = (pyramid.count(self.dim, self.pulses) - 1 >> 32 * low) + 1
        dtype = number_dtype((highest - 1).bit_length()).name
        streams = [Stream("codes", (layout.count,), dtype, values=highest, lookups=self.dim)]
        if low:
            streams.append(Stream("low_words", (layout.count, low), "uint32", values=2**32))
        if self.amplitude_bits:
            values = 2**self.amplitude_bits
            streams.append(Stream("amplitudes", (layout.count,), "uint8", values=values))
        rows = spec.size // spec.shape[layout.axis]
        return Storage((*streams, Stream("scale", (rows,), "bfloat16")))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """The fields of `slice_storage`."""
        stored = self.slice_storage(spec).streams[0].dtype
        fields = {
            "codes": fixed["codes"][:, -1].astype(stored),
            "scale": learned["scale"].astype(jnp.bfloat16),
        }
        if self.index_words > 1:
            fields["low_words"] = fixed["codes"][:, :-1]
        if self.amplitude_bits:
            fields["amplitudes"] = fixed["amplitudes"]
        return fields

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Inverts ``slice_pack``."""
        fixed = {"codes": self._index(fields)}
        if self.amplitude_bits:
            fixed["amplitudes"] = fields["amplitudes"]
        return Encoded({"scale": fields["scale"].astype(jnp.float32)}, fixed)

    def slice_exist(self, fields: Fields, spec: LeafSpec) -> Array:
        """Whether every index is below N(D, K)."""
        return jnp.all(pyramid.exists(self._index(fields), self.dim, self.pulses))

    def _index(self, fields: Fields) -> UInt32[Array, "n w"]:
        highest = fields["codes"].astype(jnp.uint32)[:, None]
        if self.index_words == 1:
            return highest
        return jnp.concatenate([fields["low_words"], highest], axis=1)

    def _rows(self, weight: Float[Array, "..."], spec: LeafSpec) -> Float[Array, "rows groups d"]:
        """Rows of groups, rotated if asked."""
        if not self.rotate:
            return self._line(weight, spec)
        axis = self.layout(spec).axis
        last = jnp.moveaxis(weight.astype(jnp.float32), axis, -1)
        rotated = Rotation(spec.shape[axis], self.seed).apply(last)
        return self._line(jnp.moveaxis(rotated, -1, axis), spec)

    def _weights(
        self, calibration: Calibration | None, spec: LeafSpec
    ) -> Float[Array, "rows groups d"] | None:
        """Importance by group; of rotated rows it has no part."""
        importance = importance_of(calibration)
        return None if importance is None or self.rotate else self._line(importance, spec)

    def _line(self, weight: Float[Array, "..."], spec: LeafSpec) -> Float[Array, "rows groups d"]:
        layout = self.layout(spec)
        groups = layout.split(weight.astype(jnp.float32))
        return groups.reshape(spec.size // spec.shape[layout.axis], -1, self.dim)

    def _search(
        self, rows: Float[Array, "rows groups d"], weights: Float[Array, "rows groups d"] | None
    ) -> Int32[Array, "rows groups d"]:
        flat = None if weights is None else weights.reshape(-1, self.dim)
        points = pyramid.nearest(rows.reshape(-1, self.dim), self.pulses, flat)
        return points.reshape(rows.shape)

    def _directions(self, points: Int32[Array, "rows groups d"]) -> Float[Array, "rows groups d"]:
        norms = self._inverse_norms(points.reshape(-1, self.dim)).reshape(*points.shape[:2], 1)
        return points.astype(jnp.float32) * norms

    def _inverse_norms(self, points: Int32[Array, "n d"]) -> Float[Array, " n"]:
        """1 / |p|_2, from a table: the same bits everywhere."""
        squares = jnp.minimum(jnp.sum(jnp.square(points), axis=1), self.pulses**2)
        return jnp.asarray(_inverse_roots(self.pulses))[squares]

    def _levels(self, spec: LeafSpec) -> Float[Array, " levels"]:
        length = self.layout(spec)
        row = length.shape[length.axis] + length.padding
        return jnp.asarray(amplitude_levels(self.dim, row, self.amplitude_bits))

    def _fixed(
        self, points: Int32[Array, "rows groups d"], codes: Int32[Array, "rows groups"]
    ) -> dict[str, Array]:
        fixed: dict[str, Array] = {
            "codes": pyramid.index(points.reshape(-1, self.dim), self.pulses)
        }
        if self.amplitude_bits:
            fixed["amplitudes"] = codes.reshape(-1).astype(jnp.uint8)
        return fixed


def pulses_for(bits: int | float, dim: int, amplitude_bits: int) -> int:
    """Finds the most pulses for a budget, row scales left out.

    Args:
        bits: bits a weight for index and amplitude.
        dim: D, weights in a group.
        amplitude_bits: b, of a group.

    Returns:
        The largest K with (ceil(log2 N(D, K)) + b) / D <= bits.

    Raises:
        ValueError: if one pulse takes more, or an index would be too wide, saying what is nearest.

    Example:
        >>> pulses_for(2.0, dim=16, amplitude_bits=4)
        9
    """
    check_integer("dim", dim, least=1, most=pyramid.MOST_DIM)
    check_integer("amplitude_bits", amplitude_bits, least=0, most=8)
    budget = math.floor(bits * dim + 1e-9) - amplitude_bits  # 1e-9: of sums like 3 * 0.1
    least = pyramid.width(dim, 1)
    if budget < least:
        raise ValueError(
            f"bits={bits} with dim={dim}, amplitude_bits={amplitude_bits}: one pulse takes "
            f"{(least + amplitude_bits) / dim} bits a weight, and nothing less is to be had: allow "
            "these, or choose a larger dim or fewer amplitude_bits"
        )
    most = next(
        (k - 1 for k in range(2, pyramid.MOST_PULSES + 1) if pyramid.width(dim, k) > budget), None
    )
    if most is None or pyramid.width(dim, most) > _MOST_WIDTH:
        fitting = [
            k
            for k in range(1, pyramid.MOST_PULSES + 1)
            if pyramid.width(dim, k) <= min(budget, _MOST_WIDTH)
        ]
        reached = (pyramid.width(dim, fitting[-1]) + amplitude_bits) / dim
        raise ValueError(
            f"bits={bits} with dim={dim}, amplitude_bits={amplitude_bits}: the most to be had are "
            f"{reached} bits a weight, with {fitting[-1]} pulses: ask for these, or choose another "
            "dim"
        )
    return most


@functools.lru_cache(maxsize=256)
def amplitude_levels(dim: int, length: int, bits: int) -> Float[np.ndarray, " levels"]:
    """Calculates the norms of groups of a row, in units of the row's root mean square.

    sqrt(M q_i) with q_i the Beta(D/2, (M-D)/2) quantile at (i + 1/2) / 2^b, to 16 binary places, so
    that machines have the same though they compute quantiles to the last bit differently.

    Args:
        dim: D, weights in a group.
        length: M, weights in the row.
        bits: b.

    Returns:
        float32 ``[2^b]``, rising; sqrt(D) where a group is the whole row.

    Example:
        >>> [round(float(level), 2) for level in amplitude_levels(8, 64, 1)]
        [2.3, 3.19]
    """
    places = (np.arange(2**bits) + 0.5) / 2**bits
    if length <= dim:
        shares = np.ones_like(places)
    else:
        shares = betaincinv(dim / 2, (length - dim) / 2, places)
    return np.asarray(np.round(np.sqrt(length * shares) * 2**16) / 2**16, np.float32)


@functools.lru_cache(maxsize=64)
def _inverse_roots(pulses: int) -> Float[np.ndarray, " squares"]:
    squares = np.maximum(np.arange(pulses**2 + 1), 1)
    return np.asarray(1 / np.sqrt(squares), np.float32)


@jax.jit
def _fit(
    rows: Float[Array, "rows groups d"],
    weights: Float[Array, "rows groups d"] | None,
    directions: Float[Array, "rows groups d"],
    levels: Float[Array, " levels"],
) -> tuple[Float[Array, " rows"], Int32[Array, "rows groups"]]:
    """Scales and amplitudes of least squared error, in turns."""
    unit = jnp.max(jnp.abs(rows), axis=(1, 2), keepdims=True)
    unit = jnp.where(unit > 0, unit, 1.0)
    rows = rows / unit
    if weights is None:
        weights = jnp.ones_like(rows)
    norm = jnp.sum(weights * jnp.square(directions), axis=-1)
    along = jnp.sum(weights * rows * directions, axis=-1)
    scale = jnp.sqrt(jnp.mean(jnp.square(rows), axis=(1, 2)))
    for _ in range(_FITS):
        level = levels[_choose(along, norm, scale, levels)]
        square = jnp.sum(jnp.square(level) * norm, axis=1)
        scale = jnp.sum(level * along, axis=1) / jnp.maximum(square, _TINY)
    scale = round_scale(scale * unit[:, 0, 0])
    return scale, _choose(along, norm, scale / unit[:, 0, 0], levels)


def _choose(
    along: Float[Array, "rows groups"],
    norm: Float[Array, "rows groups"],
    scale: Float[Array, " rows"],
    levels: Float[Array, " levels"],
) -> Int32[Array, "rows groups"]:
    """The level of least error for directions of a weighted squared norm: next to along / norm."""
    wanted = along / jnp.maximum(norm, _TINY) / jnp.where(scale > 0, scale, 1.0)[:, None]
    between = (levels[1:] + levels[:-1]) / 2.0
    return jnp.searchsorted(between, wanted).astype(jnp.int32)
