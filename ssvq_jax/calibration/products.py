"""Inputs of a weight, read from the product that it is used in: x^T x of the other operand."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Int

from ssvq_jax.calibration.view import Cut, View

PRODUCTS = ("dot_general", "conv_general_dilated")


class Use(NamedTuple):
    """Where a weight is multiplied: uses that are alike are added up.

    Attributes:
        path: leaf path.
        axes: axes of one slice of the leaf that inputs run along, as in `InputMoments`.
        stack: the part of the stacked axes that is multiplied.
    """

    path: str
    axes: tuple[int, ...]
    stack: tuple[Cut, ...]


class Found(NamedTuple):
    """Sum of x^T x over inputs x.

    Attributes:
        matrix: float32 ``[*stack, c, c]``; an axis that a loop goes through has length 1.
        number: of inputs that are not all zero, int32 ``[*stack]``: experts are fed zeros in the
            places that no token takes.
    """

    matrix: Float[Array, "*stack c c"]
    number: Int[Array, "*stack"]


def read_product(eqn: JaxprEqn, view: View, side: int, other: Array) -> tuple[Use, Found] | str:
    """Reads the inputs of a weight from a product.

    Args:
        eqn: a ``dot_general`` or ``conv_general_dilated``.
        view: the weight's operand.
        side: which of the two operands that is.
        other: the other operand.

    Returns:
        The use and its sum; or, where inputs are no rows of one matrix, why.
    """
    if eqn.primitive.name == "conv_general_dilated":
        if side == 0 or eqn.params["feature_group_count"] * eqn.params["batch_group_count"] > 1:
            return "a grouped convolution" if side else "the input of a convolution"
        numbers = eqn.params["dimension_numbers"]
        return _read(view, _patches(eqn, view, other), (), numbers.rhs_spec[1:])
    contracted, batch = eqn.params["dimension_numbers"]
    mine, theirs = contracted[side], contracted[1 - side]
    rest = [axis for axis in range(other.ndim) if axis not in (*theirs, *batch[1 - side])]
    rows = other.transpose(*batch[1 - side], *rest, *theirs)
    return _read(view, rows, batch[side], mine)


def _read(
    view: View, rows: Array, batch: Sequence[int], contracted: Sequence[int]
) -> tuple[Use, Found] | str:
    """Sums over ``rows`` ``[*batch, *summed, *contracted]``; the others are axes of the view."""
    stacked, summed = len(view.stack), rows.ndim - len(batch) - len(contracted)
    slices = [view.slices_along(dim) for dim in batch]
    for dim, axis in zip(batch, slices, strict=True):
        if axis is None and math.prod(factor.size for factor in view.dims[dim]) > 1:
            return f"a product for each of its parts, with stacked={stacked}"
    inputs = [factor for dim in contracted for factor in view.dims[dim]]
    axes = tuple(sorted({factor.axis for factor in inputs}))
    if any(axis < stacked for axis in axes):
        return f"a sum over its first {stacked} axes, which stack weights"
    size = math.prod(factor.size for factor in inputs)
    if size != math.prod(view.shape[axis] for axis in axes):
        return "a product with a part of its input axes"
    ranked = [axis for axis in slices if axis is not None]
    if any(c.size > 1 and c.loop is None and a not in ranked for a, c in enumerate(view.stack)):
        return f"a product of several of its slices at once, with stacked={stacked}"
    lead = rows.shape[: len(batch)]
    middle = rows.shape[len(batch) : len(batch) + summed]
    x = rows.astype(jnp.float32).reshape(*lead, *middle, *(factor.size for factor in inputs))
    places = [-1 if axis is None else axis for axis in slices]
    front = sorted(range(len(batch)), key=places.__getitem__)
    between = range(len(batch), len(batch) + summed)
    # Rows in the weight's own order: its axes ascending, the last one fastest.
    order = sorted(range(len(inputs)), key=lambda i: (inputs[i].axis, -inputs[i].stride))
    x = x.transpose(*front, *between, *(len(batch) + summed + i for i in order))
    x = x.reshape(*(lead[i] for i in front), *middle, size)
    summing, kept = tuple(between), tuple(range(len(batch)))
    matrix = lax.dot_general(
        x,
        x,
        ((summing, summing), (kept, kept)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    stack = [1 if cut.loop is not None else cut.size for cut in view.stack]
    count = jnp.sum(jnp.any(x != 0, axis=-1), axis=summing, dtype=jnp.int32)
    use = Use(view.path, tuple(axis - stacked for axis in axes), view.stack)
    return use, Found(matrix.reshape(*stack, size, size), count.reshape(stack))


def _patches(eqn: JaxprEqn, view: View, images: Array) -> Array:
    """What every output of a convolution sees, ``[n, channels, *window]``."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    window = [math.prod(factor.size for factor in view.dims[axis]) for axis in numbers.rhs_spec[2:]]
    channels = images.shape[numbers.lhs_spec[1]]
    spatial = "TDHW"[4 - len(window) :]
    patches = lax.conv_general_dilated_patches(
        images.transpose(numbers.lhs_spec).astype(jnp.float32),
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=("NC" + spatial, "OI" + spatial, "NC" + spatial),
        precision=lax.Precision.HIGHEST,
    )
    patches = jnp.moveaxis(patches, 1, -1)
    return patches.reshape(-1, channels, *window)


def add(one: Found, other: Found) -> Found:
    """Sums over the inputs of both."""
    return jax.tree.map(jnp.add, one, other)


def add_uses(one: dict[Use, Any], other: dict[Use, Any]) -> dict[Use, Any]:
    """Adds up sums of equal uses."""
    both = dict(one)
    for use, found in other.items():
        both[use] = add(both[use], found) if use in both else found
    return both
