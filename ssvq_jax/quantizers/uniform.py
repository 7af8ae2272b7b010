"""Uniform quantization, trained with learned steps (LSQ)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

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

_SMALLEST_STEP = 2.0**-60  # its square is still a float32, so gradients stay finite
_CANDIDATES = 64  # steps tried between 1/64 of and the whole of the range


@dataclasses.dataclass(frozen=True)
class Uniform(Quantizer):
    """Symmetric uniform b-bit quantization; as QAT it trains the weights and the steps (LSQ).

    W_q = s * round(clip(W/s, -2^(b-1), 2^(b-1) - 1)). The rounding is straight-through for W and s,
    and the gradient of a step s is scaled by 1/sqrt(N * (2^(b-1) - 1)), N weights a step. Steps
    begin where the squared error is least, of 64 candidates up to the largest magnitude.

    Source: Esser et al., "Learned step size quantization", arXiv 1902.08153, equations 1-3.

    Attributes:
        bits: b, of a stored weight; 2 to 8.
        per_channel: one step an output channel instead of one a leaf.
        channel_axis: axis of the output channels; the last one in Flax, 0 in Equinox.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> Uniform(bits=8).storage(LeafSpec("w", (192, 768), "float32")).bits
        1191936
    """

    method: ClassVar[str] = "uniform"
    groups: ClassVar[Mapping[str, str]] = {"latent": "latent", "step": "scale"}

    bits: int = 8
    per_channel: bool = True
    channel_axis: int = -1

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, least=2, most=8)
        check_flag("per_channel", self.per_channel)
        check_integer("channel_axis", self.channel_axis, least=-MOST_AXES, most=MOST_AXES)

    @property
    def settings(self) -> str:
        """Bits and what a step covers."""
        return f"{self.bits} bit a {'channel' if self.per_channel else 'tensor'}"

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    def slice_check(self, spec: LeafSpec) -> None:
        """Raises ValueError for a step a channel of a leaf without that axis."""
        if self.per_channel:
            check_channel_axis(self.channel_axis, spec)

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Searches the steps by squared error; the latent weights begin at W."""
        values = self._columns(weight, spec)
        given = importance_of(calibration)
        importance = jnp.ones_like(values) if given is None else self._columns(given, spec)
        low, high = self.range
        full = jnp.max(jnp.abs(values), axis=0) / high

        def error(share: Float[Array, ""]) -> Float[Array, " steps"]:
            step = _positive(full * share)[None]
            levels = jnp.clip(jnp.round(values / step), low, high)
            return jnp.sum(importance * jnp.square(levels * step - values), axis=0)

        shares = jnp.arange(1, _CANDIDATES + 1, dtype=jnp.float32) / _CANDIDATES
        best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
        return Encoded({"latent": jnp.copy(weight), "step": _positive(full * best)}, {})

    def slice_parts(self, spec: LeafSpec) -> Parts:
        """Any part; steps are cut with their axis."""
        return Parts(channels={"step": self.channel_axis} if self.per_channel else {})

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """The latent weights begin anew at W."""
        return Encoded({"latent": jnp.copy(weight), "step": learned["step"]}, {})

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q, with LSQ's gradients."""
        step = _positive(learned["step"])
        # Scale the gradient of the step, not its value.
        share = 1.0 / math.sqrt(spec.size / self._steps(spec) * self.range[1])
        step = jax.lax.stop_gradient(step) + share * (step - jax.lax.stop_gradient(step))
        step = step[None]
        values = self._columns(learned["latent"], spec)
        clipped = jnp.clip(values / step, *self.range)
        return self._weight(straight_through(jnp.round(clipped), clipped) * step, spec)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Levels and steps."""
        levels = Stream("levels", spec.shape, "uint8", values=2**self.bits)
        return Storage((levels, Stream("step", (self._steps(spec),), "bfloat16")))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Levels, shifted to be non-negative, and steps."""
        step = _positive(learned["step"])
        values = self._columns(learned["latent"], spec)
        low, high = self.range
        levels = jnp.clip(jnp.round(values / step[None]), low, high) - low
        return {
            "levels": self._weight(levels, spec).astype(jnp.uint8),
            "step": step.astype(jnp.bfloat16),
        }

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Latent weights on their levels, and steps."""
        step = fields["step"].astype("float32")
        levels = self._columns(fields["levels"], spec) + self.range[0]
        return Encoded({"latent": self._weight(levels * step[None], spec), "step": step}, {})

    def _steps(self, spec: LeafSpec) -> int:
        return spec.shape[self.channel_axis] if self.per_channel else 1

    def _columns(self, weight: Shaped[Array, "..."], spec: LeafSpec) -> Float[Array, "n steps"]:
        """Float32 with a column a step."""
        weight = weight.astype("float32")
        if self.per_channel:
            weight = jnp.moveaxis(weight, self.channel_axis, -1)
        return weight.reshape(-1, self._steps(spec))

    def _weight(self, columns: Float[Array, "n steps"], spec: LeafSpec) -> Float[Array, "..."]:
        """Inverts ``_columns``."""
        if not self.per_channel:
            return columns.reshape(spec.shape)
        others = list(spec.shape)
        channels = others.pop(self.channel_axis)
        return jnp.moveaxis(columns.reshape(*others, channels), -1, self.channel_axis)


def _positive(step: Float[Array, " steps"]) -> Float[Array, " steps"]:
    """Steps as stored, with a floor that gradients pass: a step below it can come back."""
    return round_scale(straight_through(jnp.maximum(step, _SMALLEST_STEP), step))
