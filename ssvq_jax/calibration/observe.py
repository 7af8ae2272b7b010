"""Inputs of every weight, read out of any pure function of the parameters.

The function is traced, and its operations are carried out one by one; a value that holds the
numbers of a weight in another shape is followed up to the product that it is used in. To the traced
operations linen, nnx, equinox and plain functions are the same, and no model is edited.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array, Float, Int

from ssvq_jax.calibration.products import (
    PRODUCTS,
    Found,
    Use,
    add,
    add_uses,
    read_product,
)
from ssvq_jax.calibration.view import View, is_same
from ssvq_jax.tree import PyTree, leaf_specs

# Primitives that call one jaxpr on all their operands, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "composite": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["matrix", "count"], meta_fields=["axes"]
)
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the inputs of a weight: of x^T x, and of one.

    Attributes:
        matrix: sum of x^T x, float32 ``[*stacked, c, c]``.
        count: number of inputs x that are not all zero, int32 ``[*stacked]``.
        axes: as in `InputMoments`.
    """

    matrix: Float[Array, "*stacked c c"]
    count: Int[Array, "*stacked"]
    axes: tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["outputs", "sums"], meta_fields=["missed"]
)
@dataclasses.dataclass(frozen=True)
class Observed:
    """What `observe` gives; may leave a jitted function.

    Attributes:
        outputs: what the function gives.
        sums: by leaf path; leaves that are in no product which can be read are not there.
        missed: leaf paths with what else is done with the leaf, which has no inputs as rows of a
            matrix.
    """

    outputs: PyTree
    sums: dict[str, Sums]
    missed: tuple[tuple[str, str], ...]


def observe(
    apply: Callable[..., Any], params: PyTree, paths: Mapping[str, int], *inputs: Any
) -> Observed:
    """Calls ``apply(params, *inputs)`` and sums x^T x over the inputs x of weights.

    Followed are casts, reshapes, transposes and slices of a stack, through ``jit``, ``remat``,
    custom derivatives, ``scan``, ``while`` and ``cond``, up to ``dot_general`` (with stacked axes
    as its batch axes) and ``conv_general_dilated`` (windows are inputs; not grouped). Inputs of a
    weight that is used several times are added up. Of branches by platform the default is computed.
    Call it under ``jax.jit``: what is only needed for ``outputs`` is then left out where they are
    not used.

    Args:
        apply: computes outputs from a tree of parameters and more arguments.
        params: the tree of float arrays.
        paths: weights to observe: how many leading axes stack independent ones, by leaf path.
        *inputs: arrays or pytrees with them; what is no array is passed on as it is.

    Returns:
        Outputs and sums.

    Raises:
        ValueError: if a path is not in the tree.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3))}
        >>> seen = observe(lambda p, x: x @ p["kernel"], params, {"kernel": 0}, jnp.eye(2) + 1.0)
        >>> seen.sums["kernel"].matrix.tolist(), int(seen.sums["kernel"].count)
        ([[5.0, 4.0], [4.0, 5.0]], 2)
    """
    specs = leaf_specs(params)
    unknown = sorted(set(paths) - set(specs))
    if unknown:
        raise ValueError(f"leaves {unknown} are not in the tree, which has {sorted(specs)}")
    given, structure = jax.tree.flatten((params, inputs))
    arrays = [i for i, leaf in enumerate(given) if isinstance(leaf, _ARRAYS)]

    def traced(*values: Any) -> Any:
        full = list(given)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        params, inputs = structure.unflatten(full)
        return apply(params, *inputs)

    jaxpr, shape = jax.make_jaxpr(traced, return_shape=True)(*(given[i] for i in arrays))
    views = [
        View.of(dataclasses.replace(spec, stacked=paths[path])) if path in paths else None
        for path, spec in specs.items()
    ]
    views += [None] * (len(arrays) - len(views))  # params come first, and all of them are arrays
    observer = _Observer()
    values = [_Value(jnp.asarray(given[i]), view) for i, view in zip(arrays, views, strict=True)]
    results, uses = observer.run(jaxpr, values)
    outputs = jax.tree.structure(shape).unflatten([value.array for value in results])
    sums = {}
    for path, spec in specs.items():
        mine = {use: found for use, found in uses.items() if use.path == path}
        axes = sorted({use.axes for use in mine})
        if len(axes) > 1:  # its inputs have no one matrix of moments
            observer.missed.setdefault(path, {})[f"products along its axes {axes}"] = None
        elif mine:
            sums[path] = _total(mine, spec.shape[: paths[path]])
    missed = tuple((path, ", ".join(why)) for path, why in observer.missed.items())
    return Observed(outputs, sums, missed)


_ARRAYS = (jax.Array, np.ndarray, np.generic)


def _total(uses: Mapping[Use, Found], stack: tuple[int, ...]) -> Sums:
    """Puts sums over parts of a stack together, all along the same axes."""
    (axes,) = {use.axes for use in uses}
    total: Any = None
    for use, found in uses.items():
        if all(cut.size == whole for cut, whole in zip(use.stack, stack, strict=True)):
            part = found
        else:
            at = tuple(slice(cut.start, cut.start + cut.size) for cut in use.stack)
            zeros = (jnp.zeros((*stack, *x.shape[len(stack) :]), x.dtype) for x in found)
            part = Found(*(zero.at[at].set(x) for zero, x in zip(zeros, found, strict=True)))
        total = part if total is None else add(total, part)
    return Sums(total.matrix, total.number, axes)


class _Value(NamedTuple):
    """A value of the traced function, and where a weight's elements are in it."""

    array: Any
    view: View | None = None


_Result = tuple[list[_Value], dict[Use, Found]]


@dataclasses.dataclass(frozen=True)
class _Observer:
    """Carries out equations.

    Attributes:
        missed: what cannot be followed, by leaf path, each once.
    """

    missed: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[_Value]) -> _Result:
        """Gives the values of a jaxpr's results, and the uses of weights in it."""
        consts = jaxpr.consts if isinstance(jaxpr, ClosedJaxpr) else ()
        within = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        values = dict(zip(within.constvars, map(_Value, consts), strict=True))
        values |= dict(zip(within.invars, inputs, strict=True))

        def read(atoms: Sequence[Any]) -> list[_Value]:
            return [_literal(x) if isinstance(x, Literal) else values[x] for x in atoms]

        uses: dict[Use, Found] = {}
        for eqn in within.eqns:
            results, found = self._equation(eqn, within, read(eqn.invars))
            values.update(zip(eqn.outvars, results, strict=True))
            uses = add_uses(uses, found)
        return read(within.outvars), uses

    def _equation(self, eqn: JaxprEqn, within: Jaxpr, inputs: list[_Value]) -> _Result:
        views = [value.view for value in inputs]
        name = eqn.primitive.name
        if any(views) and name in _CALLS:
            return self.run(eqn.params[_CALLS[name]], inputs)
        if any(views) and name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(eqn, inputs)
        results = [_Value(x) for x in _apply(eqn, within, [value.array for value in inputs])]
        if not any(views):
            return results, {}
        if is_same(eqn):
            return [self._cast(x.array, view) for x, view in zip(results, views, strict=True)], {}
        if name in PRODUCTS and None in views:
            side = 0 if views[0] else 1
            view = views[side]
            assert view is not None
            found = read_product(eqn, view, side, jnp.asarray(inputs[1 - side].array))
            if not isinstance(found, str):
                return results, dict([found])
            self._miss(view, found)
        elif len(inputs) == 1 and views[0] and (after := views[0].after(eqn)):
            return [results[0]._replace(view=after)], {}
        else:
            for view in views:
                self._miss(view, name)
        return results, {}

    def _cast(self, array: Array, view: View | None) -> _Value:
        """A weight in another dtype; whole numbers are no longer the weight."""
        if view and jnp.issubdtype(array.dtype, jnp.floating):
            return _Value(array, view)
        self._miss(view, f"a cast to {array.dtype}")
        return _Value(array)

    def _miss(self, view: View | None, why: str) -> None:
        if view is not None:
            self.missed.setdefault(view.path, {})[why] = None

    def _carried(self, body: Jaxpr, start: int, carry: list[_Value]) -> list[_Value]:
        """Weights that a loop hands on as they are; of others only the numbers are known."""
        kept = []
        for i, value in enumerate(carry):
            same = body.outvars[i] is body.invars[start + i]
            if not same:
                self._miss(value.view, "a loop that changes it")
            kept.append(value if same else _Value(value.array))
        return kept

    def _scan(self, eqn: JaxprEqn, inputs: list[_Value]) -> _Result:
        params = eqn.params
        begin = params["num_consts"]
        end = begin + params["num_carry"]
        consts, stacks = inputs[:begin], inputs[end:]
        carry = self._carried(params["jaxpr"].jaxpr, begin, inputs[begin:end])
        loop = object()
        cuts = []
        for value in stacks:
            cuts.append(value.view and value.view.in_loop(loop))
            if value.view and not cuts[-1]:
                stacked = len(value.view.stack)
                self._miss(value.view, f"a scan over it, with stacked={stacked} in its rule")

        def body(arrays: list[Array], slices: list[Array]) -> tuple[list[Any], dict[Use, Found]]:
            moving = [x._replace(array=a) for x, a in zip(carry, arrays, strict=True)]
            layer = [_Value(x, cut) for x, cut in zip(slices, cuts, strict=True)]
            results, uses = self.run(params["jaxpr"], [*consts, *moving, *layer])
            return [value.array for value in results], uses

        start = [value.array for value in carry]
        whole = [value.array for value in stacks]
        first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in whole]
        zeros = _zeros(lambda slices: body(start, slices)[1], first)
        once = [use for use in zeros if all(cut.loop is not loop for cut in use.stack)]

        def step(state: Any, slices: list[Array]) -> Any:
            arrays, totals = state
            results, uses = body(arrays, slices)
            totals = [
                jax.tree.map(jnp.add, x, uses[use]) for x, use in zip(totals, once, strict=True)
            ]
            mine = [found for use, found in uses.items() if use not in once]
            return (results[: len(start)], totals), (results[len(start) :], mine)

        kept = {name: params[name] for name in ("length", "reverse", "unroll")}
        (last, totals), (outputs, mine) = lax.scan(
            step, (start, [zeros[use] for use in once]), whole, **kept
        )
        uses = dict(zip(once, totals, strict=True))
        for use, found in zip([use for use in zeros if use not in once], mine, strict=True):
            uses = add_uses(uses, dict([_leave(loop, params["length"], use, found)]))
        values = [x._replace(array=a) for x, a in zip(carry, last, strict=True)]
        return values + [_Value(x) for x in outputs], uses

    def _while(self, eqn: JaxprEqn, inputs: list[_Value]) -> _Result:
        params = eqn.params
        begin = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        for_cond = inputs[: begin[0]]
        for value in for_cond:
            self._miss(value.view, "the condition of a while loop")
        consts = inputs[begin[0] : begin[1]]
        carry = self._carried(params["body_jaxpr"].jaxpr, len(consts), inputs[begin[1] :])

        def body(arrays: list[Array]) -> tuple[list[Any], dict[Use, Found]]:
            moving = [x._replace(array=a) for x, a in zip(carry, arrays, strict=True)]
            results, uses = self.run(params["body_jaxpr"], [*consts, *moving])
            return [value.array for value in results], uses

        start = [value.array for value in carry]
        zeros = _zeros(lambda: body(start)[1])

        def goes_on(state: Any) -> Array:
            arrays = [value.array for value in for_cond]
            return jaxpr_as_fun(params["cond_jaxpr"])(*arrays, *state[0])[0]

        def step(state: Any) -> Any:
            results, uses = body(state[0])
            return results, [
                jax.tree.map(jnp.add, x, uses[use]) for x, use in zip(state[1], zeros, strict=True)
            ]

        last, totals = lax.while_loop(goes_on, step, (start, list(zeros.values())))
        values = [x._replace(array=a) for x, a in zip(carry, last, strict=True)]
        return values, dict(zip(zeros, totals, strict=True))

    def _cond(self, eqn: JaxprEqn, inputs: list[_Value]) -> _Result:
        branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
        if platforms:  # what one platform computes in its own way is the default elsewhere
            branch = branches[platforms.index(None) if None in platforms else 0]
            return self.run(branch, inputs[1:])
        zeros: dict[Use, Found] = {}
        for branch in branches:
            zeros |= _zeros(functools.partial(lambda x: self.run(x, inputs[1:])[1], branch))

        def call(branch: ClosedJaxpr) -> Any:
            results, uses = self.run(branch, inputs[1:])
            return [value.array for value in results], [uses.get(use, zeros[use]) for use in zeros]

        outputs, totals = lax.switch(
            inputs[0].array, [functools.partial(call, branch) for branch in branches]
        )
        return [_Value(x) for x in outputs], dict(zip(zeros, totals, strict=True))


def _literal(literal: Literal) -> _Value:
    kind: Any = literal.aval
    return _Value(jnp.asarray(literal.val, kind.dtype))


def _zeros(function: Callable[..., dict[Use, Found]], *inputs: Any) -> dict[Use, Found]:
    """Zeros of the shapes of the sums that a function gives, without computing them."""
    found: list[Use] = []

    def values(*inputs: Any) -> list[Found]:
        uses = function(*inputs)
        found.extend(uses)
        return list(uses.values())

    shapes = jax.eval_shape(values, *inputs)
    zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one) for one in shapes]
    return dict(zip(found, zeros, strict=True))


def _leave(loop: Any, length: int, use: Use, found: Found) -> tuple[Use, Found]:
    """Puts the rounds of a loop, along the first axis, where its slices are in the stack."""
    (axis,) = (i for i, cut in enumerate(use.stack) if cut.loop is loop)
    cut = use.stack[axis]._replace(size=length, loop=None)
    stack = (*use.stack[:axis], cut, *use.stack[axis + 1 :])
    move = lambda x: jnp.moveaxis(jnp.squeeze(x, axis + 1), 0, axis)  # noqa: E731
    return use._replace(stack=stack), Found(*map(move, found))


def _apply(eqn: JaxprEqn, within: Jaxpr, arrays: Sequence[Any]) -> list[Any]:
    """Computes one equation, as a jaxpr of its own: how to bind a primitive is not JAX's API."""
    inputs = {
        variable: array
        for variable, array in zip(eqn.invars, arrays, strict=True)
        if not isinstance(variable, Literal)
    }
    parts = {"constvars": [], "invars": list(inputs), "outvars": eqn.outvars, "eqns": [eqn]}
    alone = within.replace(**parts, effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*inputs.values())
