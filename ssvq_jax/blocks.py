"""Weight arrays as sub-vectors, and back.

A sub-vector is ``dim`` consecutive weights along one axis. In Flax's layouts the last axis is the
output axis of dense kernels ``[in, out]``, HWIO convolutions ``[h, w, in, out]`` (depthwise ones
``[h, w, 1, channels]`` included) and attention kernels ``[in, heads, head_dim]``, and the feature
axis of embeddings ``[vocabulary, features]``: the default works for all of them.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """How one weight array is cut into ``[count, dim]`` sub-vectors. Made by `block_layout`.

    Attributes:
        shape: shape of the weight.
        dim: weights in a sub-vector.
        axis: the axis along which sub-vectors run, counted from the front.
        padding: zeros appended to that axis so that ``dim`` divides it.
    """

    shape: tuple[int, ...]
    dim: int
    axis: int
    padding: int

    @property
    def count(self) -> int:
        """Number of sub-vectors, padded ones included."""
        rows = math.prod(self.shape) // self.shape[self.axis]
        return rows * (self.shape[self.axis] + self.padding) // self.dim

    def split(self, weight: Shaped[Array, "..."]) -> Shaped[Array, "n d"]:
        """Cuts a weight of shape ``shape`` into sub-vectors ``[count, dim]``."""
        rows = jnp.moveaxis(weight, self.axis, -1)
        if self.padding:
            rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, self.padding)])
        return rows.reshape(-1, self.dim)

    def join(self, blocks: Shaped[Array, "n d"]) -> Shaped[Array, "..."]:
        """Puts sub-vectors ``[count, dim]`` together to a weight; drops the padding."""
        length = self.shape[self.axis]
        others = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        rows = blocks.reshape(*others, length + self.padding)[..., :length]
        return jnp.moveaxis(rows, -1, self.axis)

    def real(self) -> Bool[Array, "n d"] | None:
        """Marks the coordinates that hold a weight, or gives None where nothing is padded."""
        if not self.padding:
            return None
        return self.split(jnp.ones(self.shape, bool))


def block_layout(
    shape: tuple[int, ...], dim: int, axis: int = -1, *, pad: bool = False, path: str = "weight"
) -> BlockLayout:
    """Plans the cut of a weight into sub-vectors.

    Args:
        shape: shape of the weight.
        dim: weights in a sub-vector.
        axis: the axis along which sub-vectors run; negative counts from the back.
        pad: append zeros where ``dim`` does not divide the axis. The codes of padded sub-vectors
            are stored and counted like all others.
        path: name of the leaf for messages.

    Returns:
        The layout.

    Raises:
        ValueError: if the axis does not exist, is empty, or ``dim`` does not divide it and ``pad``
            is False.

    Example:
        >>> layout = block_layout((3, 4), dim=2)
        >>> layout.count
        6
        >>> layout.split(jnp.arange(12.0).reshape(3, 4))[0].tolist()
        [0.0, 1.0]
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"leaf '{path}' of shape {shape} has no axis {axis} for its sub-vectors: "
            "keep it dense (quantizer None) or choose another axis"
        )
    axis = int(np.arange(len(shape))[axis])
    length = shape[axis]
    if math.prod(shape) == 0:
        raise ValueError(f"leaf '{path}' of shape {shape} is empty: keep it dense (quantizer None)")
    padding = -length % dim
    if padding and not pad:
        divisors = [d for d in range(1, min(length, 2 * dim, 256) + 1) if length % d == 0]
        raise ValueError(
            f"leaf '{path}' of shape {shape}: dim={dim} does not divide axis {axis} of length "
            f"{length}; choose a dim of {divisors}, another axis, or pad=True "
            f"(adds {padding} zeros to each row, counted in the bits)"
        )
    return BlockLayout(shape, dim, axis, padding)
