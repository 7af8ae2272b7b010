"""SSVQ: sign-splitting vector quantization."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from ssvq_jax.quantizers.base import (
    Encoded,
    Fields,
    Storage,
    Stream,
    check_flag,
    straight_through,
)
from ssvq_jax.quantizers.calibration import Calibration
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.tree import LeafSpec

LatentDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class SignedCodebook(CodebookQuantizer):
    """Base of the methods that keep a sign for each weight beside a codebook of magnitudes.

    Attributes:
        alpha: scale of the latents' start; signs flip sooner with a smaller one.
        learn_signs: train the signs; if False they stay those of W, as one fixed bit.
        latent_dtype: what the latents are kept in while training, None for the leaf's own dtype.
            They are the largest thing that is trained, and only their signs are stored. In bfloat16
            an update below a 512th of a latent is lost, so that large latents stand still; those
            near zero, which decide the signs, move as in float32.
    """

    groups: ClassVar[Mapping[str, str]] = {**CodebookQuantizer.groups, "sign_latent": "sign"}

    alpha: float = 1.0
    learn_signs: bool = True
    latent_dtype: LatentDtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("learn_signs", self.learn_signs)
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: the latents' scale must be positive and finite")
        if self.latent_dtype not in (None, *get_args(LatentDtype)):
            raise ValueError(
                f"latent_dtype={self.latent_dtype!r}: choose one of {get_args(LatentDtype)}, or "
                "None for the leaf's own"
            )

    @property
    def settings(self) -> str:
        """Codewords, dimension, and whether the signs are trained."""
        return super().settings + ("" if self.learn_signs else " fixed signs")

    def encode_signs(self, weight: Float[Array, "..."], spec: LeafSpec) -> Encoded:
        """L = alpha * W, or the fixed bits (W < 0)."""
        if not self.learn_signs:
            return Encoded({}, {"signs": weight < 0})
        latent = (self.alpha * weight.astype("float32")).astype(self.latent_dtype or spec.dtype)
        return Encoded({"sign_latent": latent}, {})

    def signed(
        self, magnitude: Float[Array, "..."], learned: Fields, fixed: Fields
    ) -> Float[Array, "..."]:
        """Multiplies by the signs, straight-through for the latents."""
        if not self.learn_signs:
            return magnitude * jnp.where(fixed["signs"], -1.0, 1.0).astype(magnitude.dtype)
        latent = learned["sign_latent"].astype(magnitude.dtype)
        sign = jnp.where(latent < 0, -1.0, 1.0).astype(latent.dtype)
        return magnitude * straight_through(sign, latent)

    def negative(self, learned: Fields, fixed: Fields) -> Bool[Array, "..."]:
        """The sign bits."""
        return learned["sign_latent"] < 0 if self.learn_signs else fixed["signs"]

    def unpack_signs(self, negative: Bool[Array, "..."], spec: LeafSpec) -> Encoded:
        """Signs from their bits; latents come back as -1 and +1."""
        if not self.learn_signs:
            return Encoded({}, {"signs": negative})
        latent = jnp.where(negative, -1.0, 1.0)
        return Encoded({"sign_latent": latent.astype(self.latent_dtype or spec.dtype)}, {})


def sign_stream(spec: LeafSpec) -> Stream:
    """One bit a weight."""
    return Stream("signs", spec.shape, "bool", values=2)


@dataclasses.dataclass(frozen=True)
class SignSplit(SignedCodebook):
    """SSVQ: k-means on |W|, one stored sign bit a weight, signs trained through latents.

    W_q = C[A] * sign(L) with codebook C of magnitudes ``[k, d]``, codes A and the sign latent L of
    W's shape, which begins at alpha * W. The backward pass is straight-through on the sign:

        dL = dW_q * C[A],    dC = sum over the members of dW_q * sign(L)

    C and L are trained jointly, A stays. C starts non-negative and is not held there. Stored:
    ceil(log2 k)/d + 1 bits a weight and the codebook; the sign bit is (L < 0), zero is positive.

    Source: arXiv 2503.08668, section 3. Learning rates, alpha and the codebook's width are not
    published; the defaults are ours.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> SignSplit(codewords=16, dim=8).storage(LeafSpec("w", (192, 768), "float32")).bits
        222224
    """

    method: ClassVar[str] = "sign_split"

    codewords: int = 16
    dim: int = 8

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Clusters |W| (divided by its channel scales, if asked); L = alpha * W."""
        values, learned = self.unscale(jnp.abs(weight.astype("float32")))
        codebook, codes = self.cluster(key, values, spec, calibration, learned)
        signs = self.encode_signs(weight, spec)
        return Encoded(
            {**learned, "codebook": codebook, **signs.learned}, {"codes": codes, **signs.fixed}
        )

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """The nearest codewords to |W|; L = alpha * W."""
        codes = self.recode(jnp.abs(weight), learned, spec, calibration)
        signs = self.encode_signs(weight, spec)
        return Encoded({**codes.learned, **signs.learned}, {**codes.fixed, **signs.fixed})

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q = C[A] * sign(L)."""
        return self.rescale(
            self.signed(self.look_up(learned, fixed, spec), learned, fixed), learned
        )

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Codes, codebook and one bit a weight."""
        return Storage((*self.codebook_storage(spec).streams, sign_stream(spec)))

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Codes, codebook and sign bits."""
        return {**self.codebook_pack(learned, fixed), "signs": self.negative(learned, fixed)}

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Codes, codebook and signs."""
        signs = self.unpack_signs(fields["signs"], spec)
        return Encoded(
            {**self.codebook_unpack(fields), **signs.learned},
            {"codes": fields["codes"], **signs.fixed},
        )
