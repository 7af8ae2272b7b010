"""Uniform quantization, trained with learned steps (LSQ)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ssvq_jax.quantizers.base import (
    Calibration,
    Encoded,
    Fields,
    Quantizer,
    Storage,
    Stream,
    round_scale,
    straight_through,
)
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
        per_channel: one step an output channel (last axis) instead of one a leaf.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> Uniform(bits=8).storage(LeafSpec("w", (192, 768), "float32")).bits
        1191936
    """

    method: ClassVar[str] = "uniform"
    groups: ClassVar[Mapping[str, str]] = {"latent": "latent", "step": "scale"}

    bits: int = 8
    per_channel: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: uniform quantization takes 2 to 8 bits")

    @property
    def settings(self) -> str:
        """Bits and what a step covers."""
        return f"{self.bits} bit a {'channel' if self.per_channel else 'tensor'}"

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    def slice_check(self, spec: LeafSpec) -> None:
        """Raises ValueError for a leaf without weights, or per-channel without an axis."""
        if spec.size == 0:
            raise ValueError(f"leaf '{spec.path}' of shape {spec.shape} is empty: keep it dense")
        if self.per_channel and not spec.shape:
            raise ValueError(f"leaf '{spec.path}' is a scalar: use per_channel=False")

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Searches the steps by squared error; the latent weights begin at W."""
        values = weight.astype("float32").reshape(-1, self._steps(spec))
        importance = jnp.ones_like(values)
        if calibration is not None and calibration.importance is not None:
            importance = calibration.importance.astype("float32").reshape(values.shape)
        low, high = self.range
        full = jnp.max(jnp.abs(values), axis=0) / high

        def error(share: Float[Array, ""]) -> Float[Array, " steps"]:
            step = _positive(full * share)[None]
            levels = jnp.clip(jnp.round(values / step), low, high)
            return jnp.sum(importance * jnp.square(levels * step - values), axis=0)

        shares = jnp.arange(1, _CANDIDATES + 1, dtype=jnp.float32) / _CANDIDATES
        best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
        return Encoded({"latent": weight, "step": _positive(full * best)}, {})

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q, with LSQ's gradients."""
        latent = learned["latent"].astype("float32")
        step = _positive(learned["step"])
        # Scale the gradient of the step, not its value.
        share = 1.0 / math.sqrt(spec.size / self._steps(spec) * self.range[1])
        step = jax.lax.stop_gradient(step) + share * (step - jax.lax.stop_gradient(step))
        step = step[None]
        values = latent.reshape(-1, self._steps(spec))
        clipped = jnp.clip(values / step, *self.range)
        return (straight_through(jnp.round(clipped), clipped) * step).reshape(spec.shape)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Levels and steps."""
        return Storage(
            (Stream("levels", spec.size, self.bits), Stream("step", self._steps(spec), 16))
        )

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Levels, shifted to be non-negative, and steps."""
        step = _positive(learned["step"])
        values = learned["latent"].astype("float32").reshape(-1, self._steps(spec))
        low, high = self.range
        levels = jnp.clip(jnp.round(values / step[None]), low, high) - low
        return {
            "levels": levels.reshape(spec.shape).astype(jnp.uint8),
            "step": step.astype(jnp.bfloat16),
        }

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Latent weights on their levels, and steps."""
        step = fields["step"].astype("float32")
        levels = fields["levels"].astype("float32") + self.range[0]
        latent = levels.reshape(-1, self._steps(spec)) * step[None]
        return Encoded({"latent": latent.reshape(spec.shape), "step": step}, {})

    def _steps(self, spec: LeafSpec) -> int:
        return spec.shape[-1] if self.per_channel else 1


def _positive(step: Float[Array, " steps"]) -> Float[Array, " steps"]:
    """Steps as stored. A step that training drives below the floor stops there."""
    return round_scale(jnp.maximum(step, _SMALLEST_STEP))
