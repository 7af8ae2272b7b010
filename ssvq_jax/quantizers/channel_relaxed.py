"""CRVQ: vector quantization with further codebooks for the input channels that matter most."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from ssvq_jax.bitstream import number_dtype
from ssvq_jax.blocks import BlockLayout, block_layout
from ssvq_jax.clustering import assign, kmeans
from ssvq_jax.quantizers.additive import Codebooks, Codes, Problem, refine
from ssvq_jax.quantizers.base import Encoded, Fields, Storage, Stream, check_integer
from ssvq_jax.quantizers.calibration import Calibration, input_rows
from ssvq_jax.quantizers.channels import (
    ChannelImportance,
    channel_importance,
    channel_moments,
    element_weights,
)
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.tree import LeafSpec

ChannelOrder = Literal["critical", "importance"]


@dataclasses.dataclass(frozen=True)
class ChannelRelaxed(CodebookQuantizer):
    """CRVQ: VQ along input channels, with further codebooks for the critical ones.

    Sub-vectors are d consecutive input channels of one output, after the most important channels
    were moved to the front. All have a codeword of the base codebook C, those of the first
    floor(critical * c / d) groups of channels besides one of each extended codebook E_m:

        W_q = s * (C[A] + sum over m of E_m[B_m])

    with codes A and B and a scale s an output. Codes and codebooks minimise, in turn,
    trace(E^T H E) with E the error of the weight and H the moments of its inputs
    (`Calibration.inputs`); see `ssvq_jax.quantizers.additive`. Codebooks and scales are then
    fine-tuned; codes and order stay. Without moments H is diagonal: the mean importance of each
    channel, or ones. Stored: ceil(log2 k)/d bits a weight, m * ceil(log2 r)/d a critical weight,
    the order, the codebooks and scales.

    A leaf with fewer than d/critical input channels has no critical ones, and is encoded as
    `Vector` would be, in its own order and whatever the moments.

    Source: arXiv 2412.09282 and its authors' code. The paper trains codebooks by Adam (100 steps a
    round), here they are solved for; their bits leave out the order.

    Attributes:
        axis: axis of the input channels (of one slice, for stacked leaves), along which sub-vectors
            run; 0 for a dense kernel ``[in, out]`` in Flax, 1 in Equinox.
        critical: share of the input channels that are critical, at least 0 and below 1.
        extended: number of extended codebooks.
        extended_codewords: r, rows of an extended codebook; as many as there are critical
            sub-vectors, where those are fewer.
        importance: how a channel's importance is measured, see `channel_importance`.
        order: ``"critical"`` moves critical channels to the front, a bit a channel; by
            ``"importance"`` all are sorted, as in the paper, ceil(log2 c) bits a channel.
        channel_scale: see `CodebookQuantizer`; the paper's scales, and so the default here.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> spec = LeafSpec("w", (4096, 4096), "float32")
        >>> ChannelRelaxed(codebook_dtype="float16").storage(spec).bits / spec.size
        1.0705566406...
    """

    method: ClassVar[str] = "channel_relaxed"
    separable: ClassVar[bool] = False
    groups: ClassVar[Mapping[str, str]] = {
        **CodebookQuantizer.groups,
        "extended_codebook": "codebook",
    }

    codewords: int = 256
    dim: int = 8
    axis: int = 0
    channel_scale: bool = True
    critical: float = 0.02
    extended: int = 3
    extended_codewords: int = 256
    importance: ChannelImportance = "diagonal"
    order: ChannelOrder = "critical"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("extended", self.extended, least=1, most=16)
        check_integer("extended_codewords", self.extended_codewords, least=2, most=2**31)
        number = isinstance(self.critical, int | float) and not isinstance(self.critical, bool)
        if not number or not 0 <= self.critical < 1:
            raise ValueError(
                f"critical={self.critical!r}: the share of critical channels must be a number of 0 "
                "or more and below 1"
            )
        for name, choices in (("importance", ChannelImportance), ("order", ChannelOrder)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {get_args(choices)}"
                )

    @property
    def settings(self) -> str:
        """Those of the codebook, and of what is critical."""
        if not self.critical:
            return super().settings
        return f"{super().settings} critical={self.critical:g} +{self.extended}"

    def critical_groups(self, spec: LeafSpec) -> int:
        """How many groups of input channels are critical: floor(critical * c / d)."""
        channels = spec.shape[self.layout(spec).axis]
        return math.floor(self.critical * channels / self.dim + 1e-9)  # 0.29 * 100 is 28.99...

    def critical_layout(self, spec: LeafSpec) -> BlockLayout:
        """The cut of the critical channels into sub-vectors."""
        axis = self.layout(spec).axis
        channels = self.critical_groups(spec) * self.dim
        shape = (*spec.shape[:axis], channels, *spec.shape[axis + 1 :])
        return block_layout(shape, self.dim, axis, path=spec.path)

    def extended_rows(self, spec: LeafSpec) -> int:
        """Rows of an extended codebook of this leaf."""
        return min(self.extended_codewords, self.critical_layout(spec).count)

    def slice_check(self, spec: LeafSpec) -> None:
        """Raises ValueError if the leaf cannot be cut, or has one critical sub-vector alone."""
        super().slice_check(spec)
        axes = range(len(spec.shape))
        if self.channel_scale and axes[self.channel_axis] == axes[self.axis]:
            raise ValueError(
                f"leaf '{spec.path}' of shape {spec.shape}: axis={self.axis} and channel_axis="
                f"{self.channel_axis} are the same, but scales are those of outputs: choose "
                "another channel_axis, or channel_scale=False"
            )
        if self.critical_groups(spec) and self.critical_layout(spec).count < 2:
            raise ValueError(
                f"leaf '{spec.path}' of shape {spec.shape} has one critical sub-vector, too few "
                "for a codebook: use critical=0.0, or keep the leaf dense"
            )

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """VQ, importance of channels, VQ in their order, residual VQ, refinement."""
        return self.encode(key, weight.astype("float32"), None, spec, calibration)

    def encode(
        self,
        key: Key[Array, ""],
        weight: Float32[Array, "..."],
        signs: Float32[Array, "..."] | None,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Encodes a weight, or the magnitudes of one with its signs (0 counts as 1).

        The signs take part in the refinement: errors of two channels add up or cancel by them.
        """
        layout = self.layout(spec)
        axis, outputs = layout.axis, spec.size // spec.shape[layout.axis]
        values, scales = self.unscale(weight)
        codebook, codes = self.cluster(key, values, spec, calibration, scales)
        plain = {**scales, "codebook": codebook}, {"codes": codes}
        if not self.critical_groups(spec):
            return Encoded(*plain)

        moments = channel_moments(calibration, spec, axis)
        error = weight - self.rescale(self.look_up(*plain, spec), scales)
        importance = channel_importance(input_rows(error, (axis,)), moments, self.importance)
        ordering = self._encode_order(importance, spec)
        order = jnp.argsort(self._places(ordering, spec), stable=True)
        values = jnp.take(values, order, axis)
        weights = jnp.take(element_weights(calibration, moments, spec, axis), order, axis)
        codebook, codes = self.cluster(key, values, spec, Calibration(weights), scales)

        scale = self.rescale(jnp.ones(spec.shape), scales)
        left = values - self.look_up({"codebook": codebook}, {"codes": codes}, spec)
        weights = weights * jnp.square(scale / jnp.max(scale))
        extended, extended_codes = self._residual(key, left, weights, spec)
        scale = input_rows(scale, (axis,))[0][:, None]
        if signs is not None:
            # Padding is positive: 0 does not tell the scale.
            own = layout.split(jnp.take(signs, order, axis)).reshape(outputs, -1)
            scale = scale * jnp.where(own < 0, -1.0, 1.0)
        problem = Problem(
            layout.split(values).reshape(outputs, -1) * scale,
            jnp.pad(moments[order][:, order], (0, layout.padding)),
            scale,
        )
        codebooks, found = refine(
            problem,
            Codebooks(codebook, extended),
            Codes(
                codes.reshape(outputs, -1).astype(jnp.int32),
                extended_codes.reshape(self.extended, outputs, -1),
            ),
            self.codebook_dtype,
        )
        learned = {"codebook": codebooks.base, "extended_codebook": codebooks.extended}
        fixed = {
            "codes": found.base.reshape(-1).astype(codes.dtype),
            "extended_codes": found.extended.reshape(self.extended, -1).astype(
                self._stream("extended_codes", spec).dtype
            ),
            **ordering,
        }
        return Encoded({**scales, **learned}, fixed)

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q = s * (C[A] + sum over m of E_m[B_m]), in the channels' own order."""
        values = self.look_up(learned, fixed, spec)
        if self.critical_groups(spec):
            cut, axis = self.critical_layout(spec), self.layout(spec).axis
            books = jax.vmap(self.stored_codebook)(learned["extended_codebook"])
            first, rest = jnp.split(values, [cut.shape[axis]], axis)
            for m in range(self.extended):
                first = first + cut.join(books[m][fixed["extended_codes"][m]])
            values = jnp.concatenate([first, rest], axis)
            values = jnp.take(values, self._places(fixed, spec), axis, mode="clip")
        return self.rescale(values, learned)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Codes, codebooks, scales and the order."""
        streams = self.codebook_storage(spec).streams
        if not self.critical_groups(spec):
            return Storage(streams)
        names = ["extended_codes", "extended_codebook", self._order_field]
        if self.codebook_dtype == "int8":
            names.insert(2, "extended_codebook_scale")
        return Storage((*streams, *(self._stream(name, spec) for name in names)))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Codes, codebooks, scales and the order."""
        fields = self.codebook_pack(learned, fixed)
        if not self.critical_groups(spec):
            return fields
        packed = jax.vmap(self.pack_codebook)(learned["extended_codebook"])
        return {
            **fields,
            **{f"extended_{name}": field for name, field in packed.items()},
            "extended_codes": fixed["extended_codes"],
            self._order_field: fixed[self._order_field],
        }

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Codes, codebooks, scales and the order."""
        learned, fixed = self.codebook_unpack(fields), {"codes": fields["codes"]}
        if self.critical_groups(spec):
            packed = {
                name.removeprefix("extended_"): field
                for name, field in fields.items()
                if name.startswith("extended_codebook")
            }
            learned["extended_codebook"] = jax.vmap(self.unpack_codebook)(packed)
            fixed |= {name: fields[name] for name in ("extended_codes", self._order_field)}
        return Encoded(learned, fixed)

    def slice_exist(self, fields: Fields, spec: LeafSpec) -> Bool[Array, ""] | None:
        """Whether there are as many critical channels as must be, or every place is taken once."""
        if not self.critical_groups(spec):
            return None
        if self.order == "critical":
            return jnp.sum(fields["critical"]) == self.critical_groups(spec) * self.dim
        places = jnp.sort(fields["places"].astype(jnp.int32))
        return jnp.all(places == jnp.arange(places.size, dtype=jnp.int32))

    def _stream(self, name: str, spec: LeafSpec) -> Stream:
        """What is stored of a leaf with critical channels."""
        rows, count = self.extended_rows(spec), self.critical_layout(spec).count
        channels = spec.shape[self.layout(spec).axis]

        def numbers(shape: tuple[int, ...], values: int, lookups: int) -> Stream:
            dtype = number_dtype((values - 1).bit_length()).name
            return Stream(name, shape, dtype, values=values, lookups=lookups)

        match name:
            case "extended_codes":
                return numbers((self.extended, count), rows, 1)
            case "places":
                return numbers((channels,), channels, 0)
            case "critical":
                return Stream(name, (channels,), "bool", values=2)
            case "extended_codebook_scale":
                return Stream(name, (self.extended,), "bfloat16")
            case _:
                return Stream(name, (self.extended, rows, self.dim), self.codebook_dtype)

    @property
    def _order_field(self) -> str:
        return "critical" if self.order == "critical" else "places"

    def _encode_order(self, importance: Float32[Array, " c"], spec: LeafSpec) -> dict[str, Array]:
        """Which channels are critical, or the place of each by importance."""
        places = jnp.argsort(jnp.argsort(-importance, stable=True), stable=True)
        if self.order == "critical":
            return {"critical": places < self.critical_groups(spec) * self.dim}
        return {"places": places.astype(self._stream("places", spec).dtype)}

    def _places(self, fixed: Fields, spec: LeafSpec) -> Int32[Array, " c"]:
        """The place of each channel in the order that sub-vectors are cut from."""
        if self.order == "importance":
            return fixed["places"].astype(jnp.int32)
        critical = fixed["critical"].astype(jnp.int32)
        rest = jnp.cumsum(1 - critical) + self.critical_groups(spec) * self.dim
        return jnp.where(critical == 1, jnp.cumsum(critical), rest) - 1

    def _residual(
        self,
        key: Key[Array, ""],
        left: Float32[Array, "..."],
        weights: Float32[Array, "..."],
        spec: LeafSpec,
    ) -> tuple[Float32[Array, "m r d"], Int32[Array, "m n"]]:
        """Clusters what is left of the critical sub-vectors, codebook after codebook."""
        cut, axis = self.critical_layout(spec), self.layout(spec).axis
        left, weights = (
            cut.split(jnp.split(array, [cut.shape[axis]], axis)[0]) for array in (left, weights)
        )
        rows, books, codes = self.extended_rows(spec), [], []
        for m in range(self.extended):
            own = jax.random.fold_in(key, m)
            result = kmeans(own, left, rows, iterations=self.iterations, weights=weights)
            book = self.stored_codebook(result.centroids)
            codes.append(assign(left, book, weights=weights))
            books.append(result.centroids)
            left = left - book[codes[-1]]
        return jnp.stack(books), jnp.stack(codes)
