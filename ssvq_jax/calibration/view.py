"""Which element of a weight is where in a value that holds the same numbers in another shape.

Reshapes and transposes of an array permute its elements without changing them. A `View` knows, axis
by axis of such a value, which parts of which axes of the weight run along it: enough to say along
which axes of the weight a product sums, and in which order, without a number an element.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from ssvq_jax.tree import LeafSpec

# Every result is the operand of the same number, but for its dtype, its place or its rounding.
_SAME = {
    *("convert_element_type", "copy", "copy_p", "device_put", "layout_constraint", "name"),
    *("optimization_barrier", "pcast", "pvary", "reduce_precision", "reshard"),
    *("sharding_constraint", "stop_gradient"),
}


class Factor(NamedTuple):
    """A part of an axis of the weight: every ``stride``-th element of ``size * stride``."""

    axis: int
    stride: int
    size: int


class Cut(NamedTuple):
    """What is left of a stacked axis.

    Attributes:
        start: the first slice.
        size: the number of slices.
        loop: the loop that goes through them one by one; None if there is none.
    """

    start: int
    size: int
    loop: Any = None


@dataclasses.dataclass(frozen=True)
class View:
    """Where the elements of a weight are in a value.

    Attributes:
        path: leaf path.
        shape: shape of the whole leaf.
        stack: what is left of its leading axes that stack independent weights.
        dims: for every axis of the value, what runs along it, slowest first.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[Cut, ...]
    dims: tuple[tuple[Factor, ...], ...]

    @classmethod
    def of(cls, spec: LeafSpec) -> "View":
        """The leaf itself."""
        dims = tuple((Factor(axis, 1, size),) for axis, size in enumerate(spec.shape))
        cuts = tuple(Cut(0, size) for size in spec.shape[: spec.stacked])
        return cls(spec.path, spec.shape, cuts, dims)

    def slices_along(self, dim: int) -> int | None:
        """The stacked axis all of whose slices run along an axis of the value, or None."""
        axes = {factor.axis for factor in self.dims[dim]}
        if len(axes) != 1 or not axes <= set(range(len(self.stack))):
            return None
        (axis,) = axes
        strides = [factor.stride for factor in self.dims[dim]]
        whole = math.prod(factor.size for factor in self.dims[dim]) == self.stack[axis].size
        return axis if whole and strides == sorted(strides, reverse=True) else None

    def in_loop(self, loop: Any) -> "View | None":
        """What a loop over the first axis of the value takes in one round, or None."""
        axis = self.slices_along(0) if self.dims else None
        if axis is None:
            return None
        return self._cut(axis, self.stack[axis]._replace(loop=loop), self.dims[1:])

    def after(self, eqn: JaxprEqn) -> "View | None":
        """The result of an equation of this value alone; None where it is not the same numbers."""
        name = eqn.primitive.name
        if name == "transpose":
            return self._with(self.dims[axis] for axis in eqn.params["permutation"])
        if name == "reshape":
            return None if eqn.params["dimensions"] else self._reshaped(eqn.params["new_sizes"])
        if name == "squeeze":
            gone = eqn.params["dimensions"]
            return self._with(dim for axis, dim in enumerate(self.dims) if axis not in gone)
        if name in ("broadcast_in_dim", "expand_dims"):
            shape: Any = eqn.outvars[0].aval
            return self._reshaped(shape.shape)  # None if anything is repeated
        return self._sliced(eqn.params) if name == "slice" else None

    def _with(self, dims: Any) -> "View":
        return dataclasses.replace(self, dims=tuple(dims))

    def _cut(self, axis: int, cut: Cut, dims: Sequence[tuple[Factor, ...]]) -> "View":
        stack = (*self.stack[:axis], cut, *self.stack[axis + 1 :])
        return dataclasses.replace(self, stack=stack, dims=tuple(dims))

    def _reshaped(self, sizes: Sequence[int]) -> "View | None":
        left = [factor for dim in self.dims for factor in dim if factor.size > 1]
        if math.prod(factor.size for factor in left) != math.prod(sizes):
            return None
        left.reverse()
        dims = []
        for size in sizes:
            dim: list[Factor] = []
            while size > 1:
                axis, stride, whole = left.pop()
                take = math.gcd(size, whole)
                if take not in (size, whole):
                    return None  # the new axis begins within a part and ends in another
                if take < whole:
                    left.append(Factor(axis, stride, whole // take))
                dim.append(Factor(axis, stride * (whole // take), take))
                size //= take
            dims.append(tuple(dim))
        return self._with(dims)

    def _sliced(self, params: dict[str, Any]) -> "View | None":
        """Cuts slices out of the stack; parts of one weight are not followed."""
        starts, ends = params["start_indices"], params["limit_indices"]
        if set(params["strides"] or (1,)) != {1}:
            return None
        view = self
        for dim, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end - start == math.prod(factor.size for factor in self.dims[dim]):
                continue
            axis = view.slices_along(dim)
            if axis is None or len(view.dims[dim]) != 1:
                return None
            cut = Cut(view.stack[axis].start + start, end - start)
            part = (Factor(axis, 1, cut.size),)
            view = view._cut(axis, cut, (*view.dims[:dim], part, *view.dims[dim + 1 :]))
        return view


def is_same(eqn: JaxprEqn) -> bool:
    """Whether every result of an equation is one of its operands, but for dtype or place."""
    return eqn.primitive.name in _SAME
