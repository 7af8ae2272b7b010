"""Evaluation of a traced function whose weights are packed: each is decoded when it is needed.

What is computed from weights alone (a reshape, a cast, a norm) is put off with them until an
operation takes it together with an activation. Control flow is entered, so that a scan's body
decodes its own layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array

from ssvq_jax.inference.ordering import after, has_number
from ssvq_jax.inference.packed_leaf import PackedLeaf


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A packed weight."""

    leaf: PackedLeaf


@dataclasses.dataclass(frozen=True, eq=False)
class _Derived:
    """Result ``index`` of an equation on weights alone, of a jaxpr: put off, as the weights are."""

    eqn: JaxprEqn
    within: Jaxpr
    inputs: "Sequence[Value]"
    index: int


class Value(NamedTuple):
    """What a variable of the traced function stands for.

    Attributes:
        content: an array, or what gives it once it is needed.
        moving: the array is an activation: it depends on more than the parameters.
    """

    content: Any
    moving: bool


def is_packed(leaf: Any) -> bool:
    """Whether a node of a tree is a packed weight."""
    return isinstance(leaf, PackedLeaf)


def _is_late(value: Value) -> bool:
    return isinstance(value.content, Weight | _Derived)


def evaluate(jaxpr: Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr's equations; results of equations on weights alone are put off.

    Args:
        jaxpr: the traced function.
        consts: values of its constants.
        inputs: values of its arguments.

    Returns:
        Values of its results.
    """
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atoms: Sequence[Any]) -> list[Value]:
        return [Value(x.val, False) if isinstance(x, Literal) else values[x] for x in atoms]

    for eqn in jaxpr.eqns:
        results = _evaluate(eqn, jaxpr, read(eqn.invars))
        values.update(zip(eqn.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _run_closed(closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    return evaluate(closed.jaxpr, [Value(const, False) for const in closed.consts], inputs)


def _evaluate(eqn: JaxprEqn, within: Jaxpr, inputs: list[Value]) -> Sequence[Value]:
    moving = any(value.moving for value in inputs)
    if any(map(_is_late, inputs)):
        # Branches by platform are no choice that a model makes: they stay one operation.
        if eqn.primitive.name in _NESTED and not eqn.params.get("branches_platforms"):
            return _NESTED[eqn.primitive.name](eqn, inputs)
        if not eqn.effects and moving:
            return _again(lambda inputs: _apply(eqn, within, force(inputs)), inputs)
        if not eqn.effects:
            results = range(len(eqn.outvars))
            return [Value(_Derived(eqn, within, inputs, i), False) for i in results]
    return [Value(result, moving) for result in _apply(eqn, within, force(inputs))]


def _apply(eqn: JaxprEqn, within: Jaxpr, arrays: Sequence[Any]) -> list[Array]:
    """Computes one equation, as a jaxpr of its own: how to bind a primitive is not JAX's API."""
    if eqn.primitive.name == "pvary" and _varies(arrays[0], eqn.params["axes"]):
        return list(arrays)  # in a shard_map, a weight varies with the activation it waits for
    inputs = {
        variable: array
        for variable, array in zip(eqn.invars, arrays, strict=True)
        if not isinstance(variable, Literal)
    }
    parts = {"constvars": [], "invars": list(inputs), "outvars": eqn.outvars, "eqns": [eqn]}
    alone = within.replace(**parts, effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*inputs.values())


def _varies(array: Any, axes: Sequence[Any]) -> bool:
    """Whether an array is another one on every device along mesh axes."""
    kind = jax.typeof(array)
    varying = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ())
    return set(axes) <= set(varying)


def force(values: Sequence[Value]) -> list[Any]:
    """Computes what was put off among values, after the first activation of them."""
    activations = (value.content for value in values if value.moving)
    first = next(filter(has_number, activations), None)
    done: dict[int, Any] = {}

    def compute(value: Value) -> Any:
        late = value.content
        if not _is_late(value):
            return late
        if id(late) not in done:
            if isinstance(late, Weight):
                done[id(late)] = after(late.leaf, first).decode()
            else:
                inputs = [compute(x) for x in late.inputs]
                done[id(late)] = _apply(late.eqn, late.within, inputs)[late.index]
        return done[id(late)]

    return [compute(value) for value in values]


def _inline(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    return _run_closed(eqn.params["jaxpr"], inputs)


def _remat(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    kept = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    return _again(lambda inputs: force(evaluate(eqn.params["jaxpr"], (), inputs)), inputs, **kept)


def _again(
    function: Callable[[list[Value]], list[Array]], inputs: list[Value], **kept: Any
) -> list[Value]:
    """Has a backward pass decode once more: decoded weights are not kept for it."""
    at = [i for i, value in enumerate(inputs) if value.moving]

    def call(*arrays: Array) -> list[Array]:
        full = list(inputs)
        for i, array in zip(at, arrays, strict=True):
            full[i] = Value(array, True)
        return function(full)

    return _moving(jax.checkpoint(call, **kept)(*(inputs[i].content for i in at)))


def _scan(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Stacked weights go in packed, and the body decodes its layer."""
    params = eqn.params
    begin = params["num_consts"] + params["num_carry"]
    consts, carry = inputs[: params["num_consts"]], inputs[params["num_consts"] : begin]
    stacks: list[Any] = [_stack(value) or value for value in inputs[begin:]]
    forced = iter(force([*carry, *(x for x in stacks if not is_packed(x))]))
    start = [next(forced) for _ in carry]
    stacks = [x if is_packed(x) else next(forced) for x in stacks]

    def step(carry: list[Array], slices: list[Any]) -> tuple[list[Array], list[Array]]:
        layer = [
            _layer(value, cut) if is_packed(cut) else Value(cut, True)
            for value, cut in zip(inputs[begin:], slices, strict=True)
        ]
        results = force(_run_closed(params["jaxpr"], [*consts, *_moving(carry), *layer]))
        return results[: len(carry)], results[len(carry) :]

    kept = {name: params[name] for name in ("length", "reverse", "unroll")}
    last, outputs = lax.scan(step, start, stacks, **kept)
    return _moving([*last, *outputs])


def _stack(value: Value) -> PackedLeaf | None:
    """The stacked weight that a value is, if need be converted to another dtype."""
    late = value.content
    while isinstance(late, _Derived) and late.eqn.primitive.name == "convert_element_type":
        late = late.inputs[0].content
    return late.leaf if isinstance(late, Weight) and late.leaf.stacked else None


def _layer(value: Value, cut: PackedLeaf) -> Value:
    """For one layer what the value is for the stack."""
    late = value.content
    if isinstance(late, _Derived):
        return Value(dataclasses.replace(late, inputs=[_layer(late.inputs[0], cut)]), False)
    return Value(Weight(cut), False)


def _while(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    params = eqn.params
    begin = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    for_cond, for_body, carry = inputs[: begin[0]], inputs[begin[0] : begin[1]], inputs[begin[1] :]

    def cond(carry: list[Array]) -> Array:
        return force(_run_closed(params["cond_jaxpr"], [*for_cond, *_moving(carry)]))[0]

    def body(carry: list[Array]) -> list[Array]:
        return force(_run_closed(params["body_jaxpr"], [*for_body, *_moving(carry)]))

    return _moving(lax.while_loop(cond, body, force(carry)))


def _cond(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    def call(branch: ClosedJaxpr) -> list[Array]:
        return force(_run_closed(branch, inputs[1:]))

    branches = [functools.partial(call, branch) for branch in eqn.params["branches"]]
    return _moving(lax.switch(force(inputs[:1])[0], branches))


def _moving(arrays: Sequence[Array]) -> list[Value]:
    return [Value(array, True) for array in arrays]


# Operations that hold others. Any other one, a custom derivative rule say, gets decoded weights.
_NESTED: dict[str, Callable[[JaxprEqn, list[Value]], Sequence[Value]]] = {
    "jit": _inline,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
