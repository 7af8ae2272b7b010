"""CRVQ of magnitudes, with SSVQ's signs."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ssvq_jax.quantizers.base import Encoded, Fields, Storage
from ssvq_jax.quantizers.calibration import Calibration
from ssvq_jax.quantizers.channel_relaxed import ChannelRelaxed
from ssvq_jax.quantizers.sign_split import SignedCodebook, sign_stream
from ssvq_jax.tree import LeafSpec


@dataclasses.dataclass(frozen=True)
class ChannelRelaxedSignSplit(ChannelRelaxed, SignedCodebook):
    """CRVQ of |W|, with a sign for each weight that can be trained.

    W_q = s * sign(L) * (C[A] + sum over m of E_m[B_m]); see `ChannelRelaxed` for codebooks, codes
    and scales, `SignSplit` for the latents L. Codes and codebooks are refined for the error of the
    signed weights. Stored: a bit a weight besides what `ChannelRelaxed` stores, so that fewer
    codewords are enough. A leaf without critical channels is encoded as `SignSplit` would be. The
    combination is ours.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> spec = LeafSpec("w", (4096, 4096), "float32")
        >>> quantizer = ChannelRelaxedSignSplit(codewords=4, codebook_dtype="float16")
        >>> quantizer.storage(spec).bits / spec.size
        1.3186...
    """

    method: ClassVar[str] = "channel_relaxed_sign_split"
    groups: ClassVar[Mapping[str, str]] = {**SignedCodebook.groups, **ChannelRelaxed.groups}

    codewords: int = 16

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """CRVQ of the magnitudes; L = alpha * W."""
        signs = self.encode_signs(weight, spec)
        weight = weight.astype("float32")
        found = self.encode(key, jnp.abs(weight), jnp.sign(weight), spec, calibration)
        return Encoded({**found.learned, **signs.learned}, {**found.fixed, **signs.fixed})

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q = s * sign(L) * (C[A] + sum over m of E_m[B_m])."""
        return self.signed(super().slice_decode(learned, fixed, spec), learned, fixed)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """What `ChannelRelaxed` stores, and one bit a weight."""
        return Storage((*super().slice_storage(spec).streams, sign_stream(spec)))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """What `ChannelRelaxed` stores, and the sign bits."""
        fields = super().slice_pack(learned, fixed, spec)
        return {**fields, "signs": self.negative(learned, fixed)}

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """What `ChannelRelaxed` stores, and signs."""
        found = super().slice_unpack(fields, spec)
        signs = self.unpack_signs(fields["signs"], spec)
        return Encoded({**found.learned, **signs.learned}, {**found.fixed, **signs.fixed})
