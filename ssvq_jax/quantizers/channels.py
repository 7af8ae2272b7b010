"""Input channels of a weight: what their errors cost, and which of them matter most."""

from typing import Literal

import jax.numpy as jnp
import jax.scipy as jsp
from jaxtyping import Array, Float, Float32

from ssvq_jax.quantizers.calibration import Calibration, importance_of, input_rows
from ssvq_jax.tree import LeafSpec

ChannelImportance = Literal["diagonal", "inverse"]
_DAMPING = 0.01  # of the moments' mean diagonal, added to it before inversion
_LEAST_WEIGHT = 1e-6  # of the largest: something must weigh, whatever is clustered


def channel_importance(
    error: Float[Array, "c o"], moments: Float[Array, "c c"], formula: ChannelImportance
) -> Float[Array, " c"]:
    """Measures how much the error of each input channel matters.

    With r_ij the error of input channel i for output j:

    - ``"diagonal"``, the authors' code: mean over j of r_ij^2 times H_ii;
    - ``"inverse"``, the paper: max over j of r_ij^2 / (2 [H^-1]_ii).

    Args:
        error: of a first quantization.
        moments: H, mean x^T x of the layer's inputs x.
        formula: which one.

    Returns:
        The importance of every channel.

    Example:
        >>> moments = jnp.diag(jnp.array([1.0, 4.0]))
        >>> channel_importance(jnp.array([[3.0, 1.0], [2.0, 0.0]]), moments, "diagonal").tolist()
        [5.0, 8.0]
    """
    squared = jnp.square(error)
    if formula == "diagonal":
        return jnp.mean(squared, axis=1) * jnp.diagonal(moments)
    damping = _DAMPING * jnp.mean(jnp.diagonal(moments))
    damped = moments + damping * jnp.eye(len(moments))
    inverse = jsp.linalg.cho_solve(jsp.linalg.cho_factor(damped), jnp.eye(len(moments)))
    return jnp.max(squared, axis=1) / (2 * jnp.diagonal(inverse))


def channel_moments(
    calibration: Calibration | None, spec: LeafSpec, axis: int
) -> Float32[Array, "c c"]:
    """The moments H of a weight's inputs.

    Args:
        calibration: what data say about the weight.
        spec: description of the slice.
        axis: axis of the input channels, counted from the front.

    Returns:
        H; without moments, the mean importance of each channel on the diagonal; ones without that,
        and for an expert that saw no data.

    Raises:
        ValueError: if the moments are those of other axes, naming the leaf.
    """
    if calibration is not None and calibration.inputs is not None:
        check_axes(calibration.inputs.axes, spec, axis)
        given = calibration.inputs.matrix.astype(jnp.float32)
        return jnp.where(jnp.any(jnp.diagonal(given) > 0), given, jnp.eye(len(given)))
    importance = importance_of(calibration)
    if importance is None:
        return jnp.eye(spec.shape[axis])
    return jnp.diag(jnp.mean(input_rows(importance, (axis,)), axis=1))


def check_axes(axes: tuple[int, ...], spec: LeafSpec, axis: int) -> None:
    """Raises ValueError, naming the leaf, unless inputs run along the axis of the channels."""
    if axes == (axis,):
        return
    advice = f"choose axis={axes[0]}" if len(axes) == 1 else "give no moments, or use Vector"
    raise ValueError(
        f"leaf '{spec.path}' of shape {spec.shape}: the moments are those of inputs along axes "
        f"{axes}, but its input channels are those of axis {axis} alone: {advice}"
    )


def element_weights(
    calibration: Calibration | None, moments: Float32[Array, "c c"], spec: LeafSpec, axis: int
) -> Float32[Array, "..."]:
    """What an element's squared error weighs in k-means: its importance, else H_ii.

    Args:
        calibration: what data say about the weight.
        moments: H of `channel_moments`.
        spec: description of the slice.
        axis: axis of the input channels, counted from the front.

    Returns:
        Positive weights of the shape of the slice.
    """
    weights = importance_of(calibration)
    if weights is None:
        shape = [-1 if i == axis else 1 for i in range(len(spec.shape))]
        weights = jnp.broadcast_to(jnp.diagonal(moments).reshape(shape), spec.shape)
    return jnp.maximum(weights, _LEAST_WEIGHT * jnp.max(weights))
