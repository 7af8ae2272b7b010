"""What data say about a weight: importance of its elements, moments of its inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssvq_jax.tree import LeafSpec

_MOST_PLACES = 8  # in a message


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Second moments of the inputs that a weight is multiplied with.

    With the weight as a matrix W ``[c, o]`` of `input_rows`, a layer gives x W for inputs x
    ``[n, c]``, and the mean squared change of an output by an error E ``[c, o]`` of the weight is
    ``trace(E^T H E)`` with H = mean x^T x.

    Attributes:
        matrix: H, symmetric, float32 ``[*stacked, c, c]``.
        axes: axes of the weight (of one slice, for stacked leaves) that inputs run along, counted
            from the front; c is the product of their lengths, the last one runs fastest. (0,) for a
            dense kernel ``[in, out]``, (0, 1) for ``[heads, head_dim, out]``, (0, 1, 2) for a
            convolution HWIO, (1,) for an embedding ``[vocabulary, features]`` used as a head.
    """

    matrix: Float[Array, "*stacked c c"]
    axes: tuple[int, ...]

    def check(self, spec: LeafSpec) -> None:
        """Raises ValueError, naming the leaf, if the moments are not of its inputs."""
        shape = spec.slice_spec().shape
        if len(set(self.axes)) != len(self.axes) or not all(0 <= a < len(shape) for a in self.axes):
            raise ValueError(
                f"input moments of leaf '{spec.path}': axes={self.axes} are not different axes of "
                f"shape {shape}"
            )
        channels = math.prod(shape[axis] for axis in self.axes)
        wanted = (*spec.shape[: spec.stacked], channels, channels)
        if self.matrix.shape != wanted:
            raise ValueError(
                f"input moments of leaf '{spec.path}' have shape {self.matrix.shape}, its input "
                f"axes {self.axes} of {shape} need {wanted}"
            )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["importance", "inputs"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Calibration:
    """What data say about a weight.

    Attributes:
        importance: non-negative weight of every element's squared error, of the leaf's shape.
        inputs: second moments of what the weight is multiplied with; leaves that share a codebook
            are clustered without.
    """

    importance: Float[Array, "..."] | None = None
    inputs: InputMoments | None = None


def input_rows(weight: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "c o"]:
    """A weight as a matrix with a row an input channel.

    Args:
        weight: one slice of a leaf.
        axes: the axes that inputs run along.

    Returns:
        ``[c, o]``, the axes in the given order and then all others in theirs.

    Example:
        >>> input_rows(jnp.arange(6.0).reshape(2, 3), (1,)).tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    front = jnp.moveaxis(weight, axes, range(len(axes)))
    return front.reshape(math.prod(front.shape[: len(axes)]), -1)


def from_input_rows(
    rows: Float[Array, "c o"], shape: tuple[int, ...], axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """Inverts `input_rows` for a weight of this shape.

    Example:
        >>> from_input_rows(jnp.arange(6.0).reshape(3, 2), (2, 3), (1,)).tolist()
        [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    others = [n for axis, n in enumerate(shape) if axis not in axes]
    front = rows.reshape(*(shape[axis] for axis in axes), *others)
    return jnp.moveaxis(front, range(len(axes)), axes)


def unseen_slices(values: Array, axes: int) -> str:
    """Lists the slices of a stack whose values are all zero: data have not reached them.

    Args:
        values: moments or importance, ``[*stacked, *slice]``.
        axes: number of axes of a slice.

    Returns:
        Their places, e.g. ``slices 3; 5 of 8``, or ``it`` for a weight that is no stack; empty if
        there are none.

    Example:
        >>> unseen_slices(jnp.array([[[1.0]], [[0.0]]]), 2)
        'slices 1 of 2'
    """
    lead = values.shape[: values.ndim - axes]
    zero = np.asarray(jnp.all(values == 0, axis=tuple(range(len(lead), values.ndim))))
    if not zero.any():
        return ""
    if not lead:
        return "it"
    places = [",".join(map(str, place)) for place in np.argwhere(zero).tolist()]
    more = ", …" if len(places) > _MOST_PLACES else ""
    return f"slices {'; '.join(places[:_MOST_PLACES])}{more} of {' x '.join(map(str, lead))}"


def importance_of(calibration: Calibration | None) -> Float[Array, "..."] | None:
    """Importance of every element, or None where there is no calibration.

    Of a slice without any importance (an expert that saw no data) all elements count alike.
    """
    if calibration is None or calibration.importance is None:
        return None
    given = calibration.importance.astype(jnp.float32)
    return jnp.where(jnp.any(given > 0), given, jnp.ones_like(given))
