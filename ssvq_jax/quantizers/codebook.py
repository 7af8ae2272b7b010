"""What the codebook methods share: clustering, look-up, codebook precision, stored fields."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt

from ssvq_jax.bitstream import number_dtype
from ssvq_jax.blocks import BlockLayout, block_layout
from ssvq_jax.clustering import assign, kmeans
from ssvq_jax.quantizers.base import (
    MOST_AXES,
    Encoded,
    Fields,
    Parts,
    Quantizer,
    Storage,
    Stream,
    check_channel_axis,
    check_flag,
    check_integer,
    round_scale,
    straight_through,
)
from ssvq_jax.quantizers.calibration import Calibration, importance_of
from ssvq_jax.tree import LeafSpec

CodebookDtype = Literal["int8", "float16", "float32"]
_INT8_MAX = 127.0


@dataclasses.dataclass(frozen=True)
class CodebookQuantizer(Quantizer):
    """Base of the methods that store a row index of a codebook per sub-vector.

    Attributes:
        codewords: k, rows of the codebook; codes take ceil(log2 k) bits.
        dim: d, weights in a sub-vector.
        axis: axis along which sub-vectors run (of one slice, for stacked leaves).
        pad: append zeros where ``dim`` does not divide the axis.
        codebook_dtype: what the file holds and training sees (straight-through); int8 comes with
            one 16-bit scale a codebook.
        channel_scale: divide every output channel by its root mean square before clustering, and
            keep that as a trained 16-bit scale.
        channel_axis: axis of the output channels; the last one in Flax, 0 in Equinox.
        iterations: Lloyd iterations at most.
        separable: every sub-vector is decoded from its own numbers, wherever it lies, so that
            leaves can share a codebook and rows can be decoded apart (class attribute).
    """

    groups: ClassVar[Mapping[str, str]] = {"codebook": "codebook", "scale": "scale"}
    separable: ClassVar[bool] = True

    codewords: int
    dim: int
    axis: int = -1
    pad: bool = False
    codebook_dtype: CodebookDtype = "int8"
    channel_scale: bool = False
    channel_axis: int = -1
    iterations: int = 50

    def __post_init__(self) -> None:
        check_integer("codewords", self.codewords, least=2, most=2**31)
        check_integer("dim", self.dim, least=1)
        check_integer("iterations", self.iterations, least=1)
        for name in ("axis", "channel_axis"):
            check_integer(name, getattr(self, name), least=-MOST_AXES, most=MOST_AXES)
        for name in ("pad", "channel_scale"):
            check_flag(name, getattr(self, name))
        if self.codebook_dtype not in get_args(CodebookDtype):
            raise ValueError(
                f"codebook_dtype={self.codebook_dtype!r}: choose one of {get_args(CodebookDtype)}"
            )

    @property
    def code_width(self) -> int:
        """Bits of a code: ceil(log2 k)."""
        return (self.codewords - 1).bit_length()

    @property
    def settings(self) -> str:
        """Codewords and dimension."""
        return f"k={self.codewords} d={self.dim}"

    def layout(self, spec: LeafSpec) -> BlockLayout:
        """The cut of one slice into sub-vectors."""
        return block_layout(spec.shape, self.dim, self.axis, pad=self.pad, path=spec.path)

    def slice_check(self, spec: LeafSpec) -> None:
        """Raises ValueError if the leaf cannot be cut, or has fewer sub-vectors than codewords."""
        count = self.layout(spec).count
        if self.channel_scale:
            check_channel_axis(self.channel_axis, spec)
        if self.codewords > count:
            raise ValueError(
                f"leaf '{spec.path}' of shape {spec.shape} has {count} sub-vectors of dim "
                f"{self.dim}, fewer than codewords={self.codewords}: use fewer codewords, a "
                "smaller dim, or keep the leaf dense"
            )

    def unscale(
        self, values: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], dict[str, Float[Array, " out"]]]:
        """Divides by the root mean square of every output channel (1 where that is zero).

        Returns:
            The values to cluster and the learned scales; neither changes without channel_scale.
        """
        if not self.channel_scale:
            return values, {}
        channels = jnp.moveaxis(values, self.channel_axis, -1)
        mean_square = jnp.mean(jnp.square(channels), axis=tuple(range(values.ndim - 1)))
        scale = round_scale(jnp.where(mean_square > 0, jnp.sqrt(mean_square), 1.0))
        return values / self.per_channel(scale, values.ndim), {"scale": scale}

    def cluster(
        self,
        key: Key[Array, ""],
        values: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
        scales: Fields,
        kept: Bool[Array, "n d"] | None = None,
    ) -> tuple[Float[Array, "k d"], UInt[Array, " n"]]:
        """Clusters the sub-vectors of an array of the weight's shape.

        What is minimised is the error of the weight, importance times scale squared times the error
        of the values.

        Args:
            key: typed PRNG key.
            values: what to cluster, from `unscale`.
            spec: description of the slice.
            calibration: importance of the weight's elements.
            scales: the channel scales from `unscale`.
            kept: False for what has no part in it, by sub-vector; all have by default.

        Returns:
            The codebook (float32) and the codes, which are nearest to the codebook as stored.
        """
        points, weights, mask = self._points(values, spec, calibration, scales, kept)
        result = kmeans(
            key,
            points,
            self.codewords,
            iterations=self.iterations,
            weights=weights,
            mask=mask,
        )
        stored = self.stored_codebook(result.centroids)
        codes = assign(points, stored, weights=weights, mask=mask)
        return result.centroids, codes.astype(number_dtype(self.code_width))

    def slice_parts(self, spec: LeafSpec) -> Parts:
        """Whole sub-vectors; channel scales are cut with their axis."""
        if not self.separable:
            return super().slice_parts(spec)
        channels = {"scale": self.channel_axis} if self.channel_scale else {}
        return Parts(self.dim, self.layout(spec).axis, channels)

    def recode(
        self,
        values: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
        kept: Bool[Array, "n d"] | None = None,
    ) -> Encoded:
        """Finds the nearest codewords of the codebook there is.

        Args:
            values: of the weight's shape, before they are divided by the channel scales.
            learned: codebook and channel scales, which are returned as they are.
            spec: description of the slice, or of a part of it.
            calibration: importance of the weight's elements.
            kept: False for what has no part in it, by sub-vector; all have by default.
        """
        taken = {name: learned[name] for name in ("codebook", "scale") if name in learned}
        values = values.astype(jnp.float32)
        if self.channel_scale:
            scale = self.per_channel(round_scale(learned["scale"]), values.ndim)
            values = values / jnp.where(scale == 0, jnp.ones_like(scale), scale)
        points, weights, mask = self._points(values, spec, calibration, learned, kept)
        stored = self.stored_codebook(learned["codebook"])
        codes = assign(points, stored, weights=weights, mask=mask)
        return Encoded(taken, {"codes": codes.astype(number_dtype(self.code_width))})

    def _points(
        self,
        values: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
        scales: Fields,
        kept: Bool[Array, "n d"] | None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "n d"] | None, Bool[Array, "n d"] | None]:
        """The sub-vectors, their elements' weights and their mask, as clustering takes them."""
        layout = self.layout(spec)
        weights = importance_of(calibration)
        if self.channel_scale:
            squared = self.per_channel(jnp.square(scales["scale"]), values.ndim)
            squared = squared / jnp.max(squared)
            weights = squared * (jnp.ones_like(values) if weights is None else weights)
        mask = layout.real()
        if kept is not None:
            mask = kept if mask is None else kept & mask
        points = layout.split(values.astype(jnp.float32))
        return points, None if weights is None else layout.split(weights), mask

    def stored_codebook(self, codebook: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """The codebook as the file holds it, straight-through."""
        return round_codebook(codebook, self.codebook_dtype)

    def look_up(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """C[A] as an array of the weight's shape, before signs and channel scales."""
        codebook = self.stored_codebook(learned["codebook"])
        return self.layout(spec).join(codebook[fixed["codes"]])

    def rescale(self, values: Float[Array, "..."], learned: Fields) -> Float[Array, "..."]:
        """Multiplies by the channel scales, if there are any."""
        if not self.channel_scale:
            return values
        return values * self.per_channel(round_scale(learned["scale"]), values.ndim)

    def per_channel(self, scale: Float[Array, " out"], ndim: int) -> Float[Array, "..."]:
        """Lines scales up with the channel axis of ``ndim`` axes."""
        shape = [1] * ndim
        shape[self.channel_axis] = -1
        return scale.reshape(shape)

    def codebook_storage(self, spec: LeafSpec) -> Storage:
        """Codes, codebook and scales of one slice."""
        code_dtype = number_dtype(self.code_width).name
        count = self.layout(spec).count
        streams = [
            Stream("codes", (count,), code_dtype, values=self.codewords, lookups=1),
            Stream("codebook", (self.codewords, self.dim), self.codebook_dtype),
        ]
        if self.codebook_dtype == "int8":
            streams.append(Stream("codebook_scale", (), "bfloat16"))
        if self.channel_scale:
            streams.append(Stream("scale", (spec.shape[self.channel_axis],), "bfloat16"))
        return Storage(tuple(streams))

    def codebook_pack(self, learned: Fields, fixed: Fields) -> dict[str, Array]:
        """The fields of `codebook_storage`."""
        fields = {"codes": fixed["codes"], **self.pack_codebook(learned["codebook"])}
        if self.channel_scale:
            fields["scale"] = learned["scale"].astype(jnp.bfloat16)
        return fields

    def pack_codebook(self, codebook: Float[Array, "k d"]) -> dict[str, Array]:
        """The codebook as the file holds it, and the scale of an int8 one."""
        if self.codebook_dtype != "int8":
            return {"codebook": self.stored_codebook(codebook).astype(self.codebook_dtype)}
        levels, scale = _int8(codebook)
        return {
            "codebook": levels.astype(jnp.int8), "codebook_scale": scale.astype(jnp.bfloat16),
        }  # fmt: skip

    def codebook_unpack(self, fields: Fields) -> dict[str, Array]:
        """The learned arrays that `codebook_pack` stored."""
        learned = {"codebook": self.unpack_codebook(fields)}
        if self.channel_scale:
            learned["scale"] = fields["scale"].astype(jnp.float32)
        return learned

    def unpack_codebook(self, fields: Fields) -> Float[Array, "k d"]:
        """The codebook that `pack_codebook` stored."""
        codebook = fields["codebook"].astype(jnp.float32)
        if self.codebook_dtype == "int8":
            codebook = codebook * fields["codebook_scale"].astype(jnp.float32)
        return codebook


def round_codebook(
    codebook: Float[Array, "k d"], codebook_dtype: CodebookDtype
) -> Float[Array, "k d"]:
    """Rounds a codebook to what is stored, straight-through."""
    if codebook_dtype == "float32":
        return codebook
    if codebook_dtype == "float16":
        return straight_through(jax.lax.reduce_precision(codebook, 5, 10), codebook)
    levels, scale = _int8(codebook)
    return straight_through(levels * scale, codebook)


def _int8(codebook: Float[Array, "k d"]) -> tuple[Float[Array, "k d"], Float[Array, ""]]:
    """Symmetric int8 levels (as floats) and their scale.

    Unpacking gives levels * scale, and quantizing that again gives the same levels and scale: the
    scale is at most 2^-9 off max|C|/127, so the largest entry always lands on level 127.
    """
    largest = jnp.max(jnp.abs(codebook))
    scale = jnp.maximum(largest / _INT8_MAX, jnp.finfo(jnp.float32).tiny)
    scale = jax.lax.reduce_precision(scale, 8, 7)
    levels = jnp.clip(jnp.round(codebook / scale), -_INT8_MAX, _INT8_MAX)
    return levels, scale
