"""VQ: vector quantization of the weights themselves."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float, Key

from ssvq_jax.quantizers.base import Encoded, Fields, Storage
from ssvq_jax.quantizers.calibration import Calibration
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.tree import LeafSpec


@dataclasses.dataclass(frozen=True)
class Vector(CodebookQuantizer):
    """VQ: k-means on the sub-vectors of W; the codebook is then fine-tuned.

    W_q = C[A] with codebook C ``[k, d]`` and codes A; the gradient of a codeword is the sum over
    its members, A stays. Stored: ceil(log2 k)/d bits a weight and the codebook.

    Source: the baseline of arXiv 2503.08668; Gong et al., "Compressing deep convolutional networks
    using vector quantization", arXiv 1412.6115.

    Example:
        >>> from ssvq_jax import LeafSpec
        >>> Vector(codewords=64, dim=4).storage(LeafSpec("w", (192, 768), "float32")).bits
        223248
    """

    method: ClassVar[str] = "vector"

    codewords: int = 64
    dim: int = 4

    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Clusters W (divided by its channel scales, if asked)."""
        values, learned = self.unscale(weight.astype("float32"))
        codebook, codes = self.cluster(key, values, spec, calibration, learned)
        return Encoded({**learned, "codebook": codebook}, {"codes": codes})

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """The nearest codewords."""
        return self.recode(weight, learned, spec, calibration)

    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """W_q = C[A]."""
        return self.rescale(self.look_up(learned, fixed, spec), learned)

    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Codes and codebook."""
        return self.codebook_storage(spec)

    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Codes and codebook."""
        return self.codebook_pack(learned, fixed)

    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Codes and codebook."""
        return Encoded(self.codebook_unpack(fields), {"codes": fields["codes"]})
