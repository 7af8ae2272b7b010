"""MVQ: vector quantization of what N:M pruning leaves; and SSVQ of the same."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from ssvq_jax.quantizers.base import Encoded, Fields, Storage, Stream
from ssvq_jax.quantizers.calibration import Calibration, importance_of
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.quantizers.pattern import Pattern
from ssvq_jax.quantizers.sign_split import SignedCodebook
from ssvq_jax.tree import LeafSpec


@dataclasses.dataclass(frozen=True)
class MaskedCodebook(CodebookQuantizer):
    """Base of the methods that keep N of every M consecutive weights of a sub-vector.

    Attributes:
        keep: N, kept weights of a group; those of the largest magnitude (times the root of their
            importance, where there is one).
        group: M, consecutive weights of a sub-vector; divides ``dim``, 16 at most.
    """

    keep: int = 3
    group: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pattern.check(self.dim)

    @property
    def pattern(self) -> Pattern:
        """The N:M pattern."""
        return Pattern(self.keep, self.group)

    @property
    def settings(self) -> str:
        """Those of the codebook, and the sparsity."""
        return f"{super().settings} {self.keep}:{self.group}"

    def choose(
        self, weight: Float[Array, "..."], spec: LeafSpec, calibration: Calibration | None
    ) -> Bool[Array, "n d"]:
        """The mask of largest magnitudes, by sub-vector; padding comes last."""
        scores = jnp.abs(weight.astype(jnp.float32))
        importance = importance_of(calibration)
        if importance is not None:
            scores = scores * jnp.sqrt(importance)
        layout = self.layout(spec)
        real = layout.real()
        blocks = layout.split(scores)
        return self.pattern.choose(blocks if real is None else jnp.where(real, blocks, -1.0))

    def masked(
        self, values: Float[Array, "..."], fixed: Fields, spec: LeafSpec
    ) -> Float[Array, "..."]:
        """Zeros for what is pruned."""
        kept = self.layout(spec).join(fixed["mask"])
        return jnp.where(kept, values, jnp.zeros_like(values))


@dataclasses.dataclass(frozen=True)
class Masked(MaskedCodebook):
    """MVQ: N:M magnitude pruning, then k-means on what is kept.

    W_q = m * C[A] with the mask m of W's shape, codebook C ``[k, d]`` and codes A. Pruned weights
    have no part in the clustering: a sub-vector w goes to the codeword with the least
    |m * (w - c)|^2, and coordinate j of a codeword is the mean sum m_j w_j / sum m_j of its
    members. Nor do they have one in training: the gradient of a codeword is that of its members'
    kept weights. The mask and A stay. Stored: ceil(log2 k)/d + ceil(log2 binom(M, N))/M bits a
    weight and the codebook.

    Source: arXiv 2412.10261. Its depthwise convolutions stay dense, and so in the presets.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> spec = LeafSpec("w", (192, 768), "float32")
        >>> Masked(codewords=512, dim=16, keep=4, group=16).storage(spec).bits / spec.size
        1.6945...
    """

    method: ClassVar[str] = "masked"

    codewords: int = 64
    dim: int = 8

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Prunes W, then clusters what is kept (divided by its channel scales, if asked)."""
        mask = self.choose(weight, spec, calibration)
        values, learned = self.unscale(weight.astype("float32"))
        codebook, codes = self.cluster(key, values, spec, calibration, learned, mask)
        return Encoded({**learned, "codebook": codebook}, {"codes": codes, "mask": mask})

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Prunes W anew, and finds the nearest codewords of what is kept."""
        mask = self.choose(weight, spec, calibration)
        codes = self.recode(weight, learned, spec, calibration, mask)
        return Encoded(codes.learned, {**codes.fixed, "mask": mask})

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q = m * C[A]."""
        values = self.look_up(learned, fixed, spec)
        return self.rescale(self.masked(values, fixed, spec), learned)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Codes, codebook and the groups' choices."""
        mask = self.pattern.stream(self.layout(spec).count, self.dim)
        return Storage((*self.codebook_storage(spec).streams, mask))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Codes, codebook and the groups' choices."""
        mask = self.pattern.number(fixed["mask"])
        return {**self.codebook_pack(learned, fixed), "mask": mask}

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Codes, codebook and mask."""
        mask = self.pattern.mask(fields["mask"])
        return Encoded(self.codebook_unpack(fields), {"codes": fields["codes"], "mask": mask})


@dataclasses.dataclass(frozen=True)
class MaskedSignSplit(MaskedCodebook, SignedCodebook):
    """SSVQ of what N:M pruning leaves: k-means on |W|, a trained sign for each kept weight.

    W_q = m * C[A] * sign(L); see `Masked` for the mask m, `SignSplit` for codebook C, codes A and
    latents L. Only kept weights have a stored sign: ceil(log2 k)/d + N/M +
    ceil(log2 binom(M, N))/M bits a weight and the codebook. The combination is ours.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> spec = LeafSpec("w", (192, 768), "float32")
        >>> MaskedSignSplit(codewords=32, dim=8, keep=2, group=8).storage(spec).bits / spec.size
        1.5139...
    """

    method: ClassVar[str] = "masked_sign_split"

    codewords: int = 32
    dim: int = 8
    keep: int = 2

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Prunes W, then clusters the magnitudes of what is kept; L = alpha * W."""
        mask = self.choose(weight, spec, calibration)
        values, learned = self.unscale(jnp.abs(weight.astype("float32")))
        codebook, codes = self.cluster(key, values, spec, calibration, learned, mask)
        signs = self.encode_signs(weight, spec)
        return Encoded(
            {**learned, **signs.learned, "codebook": codebook},
            {**signs.fixed, "codes": codes, "mask": mask},
        )

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Prunes W anew; the nearest codewords to |W| of what is kept; L = alpha * W."""
        mask = self.choose(weight, spec, calibration)
        codes = self.recode(jnp.abs(weight), learned, spec, calibration, mask)
        signs = self.encode_signs(weight, spec)
        return Encoded(
            {**codes.learned, **signs.learned}, {**codes.fixed, **signs.fixed, "mask": mask}
        )

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q = m * C[A] * sign(L)."""
        values = self.signed(self.look_up(learned, fixed, spec), learned, fixed)
        return self.rescale(self.masked(values, fixed, spec), learned)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Codes, codebook, the groups' choices, and one bit a kept weight."""
        count = self.layout(spec).count
        mask = self.pattern.stream(count, self.dim)
        signs = Stream("signs", (count, self.dim // self.group * self.keep), "bool", values=2)
        return Storage((*self.codebook_storage(spec).streams, mask, signs))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Codes, codebook, the groups' choices and the kept weights' sign bits."""
        negative = self.layout(spec).split(self.negative(learned, fixed))
        return {
            **self.codebook_pack(learned, fixed),
            "mask": self.pattern.number(fixed["mask"]),
            "signs": self.pattern.kept(negative, fixed["mask"]),
        }

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Codes, codebook, mask and signs; pruned weights are positive."""
        mask = self.pattern.mask(fields["mask"])
        negative = self.layout(spec).join(self.pattern.spread(fields["signs"], mask))
        signs = self.unpack_signs(negative, spec)
        return Encoded(
            {**self.codebook_unpack(fields), **signs.learned},
            {**signs.fixed, "codes": fields["codes"], "mask": mask},
        )
