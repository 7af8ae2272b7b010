"""Reads what a model computes from its jaxpr: no layer is described a second time, by hand.

To the traced operations linen, nnx, equinox and plain functions are the same. Along with each value
goes where it comes from: weights are followed through reshapes, casts, slices, sums and control
flow up to the products that they feed.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from ssvq_jax.hardware.checks import check_size
from ssvq_jax.hardware.primitives import (
    ACTIVATION,
    CALLS,
    CONSTANT,
    PRODUCTS,
    Origin,
    Work,
    arithmetic,
    is_known,
    merge,
    product,
)
from ssvq_jax.hardware.workload import Product, Workload
from ssvq_jax.tree import PyTree, leaves_by_path


def read_workload(
    function: Callable[..., Any],
    params: PyTree,
    *args: Any,
    while_rounds: int | None = None,
    unknown_without_products: Collection[str] = (),
    **kwargs: Any,
) -> Workload:
    """Reads what one call of ``function(params, *args, **kwargs)`` computes, from its jaxpr.

    Nothing is computed: shapes are enough, for weights and for inputs. Work is counted as it is
    written, before a compiler merges or drops anything. Counted is what depends on ``args`` and
    ``kwargs``, the activations, and products of parameters among each other; what is made of
    constants alone is done ahead, and so is other arithmetic on parameters alone. Weights that the
    function closes over are constants: products with them have no leaves. Of branches the one with
    most multiplications (then operations) is taken, of branches by platform the default.

    Args:
        function: computes outputs from a tree of parameters and more arguments, as the ``apply`` of
            a linen module does; arguments that are not arrays are passed on as they are.
        params: arrays or ``jax.ShapeDtypeStruct`` in any pytree.
        *args: inputs: arrays, ``jax.ShapeDtypeStruct``, or pytrees with them.
        while_rounds: how often every ``while`` loop runs. Needed if one holds products; without it,
            other work in such a loop is counted once.
        unknown_without_products: names of primitives that are not known here, of which you vouch
            that they hold no matrix product; their work is not counted.
        **kwargs: inputs, as ``args``.

    Returns:
        The workload. A product has the name of the largest leaf that feeds it, or of the place in
        the model, and a number where several have the same. Of a product of two activations, the
        one with more rows is the input ``[M, K]``; a product of two weights has the leaves of both.
        A transposed convolution is the product of its input pixels and whole kernels: nothing is
        multiplied by the zeros between pixels.

    Raises:
        ValueError: if the parameters are not arrays, or none; if no product is found; for a
            primitive that may hold products which cannot be counted, naming all of them; and for a
            ``while`` loop with products, without ``while_rounds``.

    Example:
        >>> params = {"kernel": jax.ShapeDtypeStruct((64, 10), "float32")}
        >>> images = jax.ShapeDtypeStruct((8, 64), "float32")
        >>> workload = read_workload(lambda params, x: jax.nn.relu(x @ params["kernel"]), params,
        ...                          images)
        >>> [(x.name, x.m, x.k, x.n, x.leaves) for x in workload.products]
        [('kernel', 8, 64, 10, ('kernel',))]
        >>> workload.operations
        {'elementwise': 80}
    """
    if while_rounds is not None:
        check_size("read_workload", "while_rounds", while_rounds)
    sizes = _leaf_sizes(params)
    given, tree = jax.tree.flatten((params, args, kwargs))
    arrays = [i for i, leaf in enumerate(given) if _is_array(leaf)]

    def traced(*inputs: Any) -> Any:
        full = list(given)
        for i, leaf in zip(arrays, inputs, strict=True):
            full[i] = leaf
        params, args, kwargs = tree.unflatten(full)
        return function(params, *args, **kwargs)

    jaxpr = jax.make_jaxpr(traced)(*(given[i] for i in arrays)).jaxpr
    weights = [Origin(frozenset([path])) for path in sizes]
    inputs = weights + [ACTIVATION] * (len(arrays) - len(weights))
    reader = _Reader(sizes, while_rounds, frozenset(unknown_without_products))
    work = reader.read(jaxpr, inputs, "")[1]
    if reader.unknown:
        raise ValueError(
            "how many products these primitives hold is not known: "
            f"{', '.join(reader.unknown)}. Use a plain implementation of these layers (without "
            "Pallas, FFI or cuDNN) to read the model; or write them by hand, as Product(...) in "
            "Workload(...); or, if they hold no matrix product, give their names in "
            "unknown_without_products"
        )
    if not work.products:
        raise ValueError(
            "found no matrix product: give the function that computes the model's outputs, and "
            "what it takes after the parameters as further arguments, not closed over"
        )
    return Workload(
        products=tuple(_with_unique_names(work.products)),
        operations={kind: number for kind, number in work.operations.items() if number},
        leaves={path: size for path, size in sizes.items() if size},
        gathered={
            path: min(number, sizes[path])
            for path, number in work.gathered.items()
            if number and path not in work.used
        },
    )


def _leaf_sizes(params: PyTree) -> dict[str, int]:
    leaves = leaves_by_path(params)
    for path, leaf in leaves.items():
        if not _is_array(leaf):
            raise ValueError(
                f"leaf '{path}' is a {type(leaf).__name__}, not an array: give the arrays alone, "
                "e.g. equinox.partition(model, equinox.is_inexact_array)[0]"
            )
    if not leaves:
        raise ValueError("the tree of parameters has no leaf: give the model's parameters first")
    return {path: math.prod(leaf.shape) for path, leaf in leaves.items()}


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def _with_unique_names(products: Iterable[Product]) -> Iterable[Product]:
    taken = set()
    for unnamed in products:
        name, i = unnamed.name, 1
        while name in taken:
            i += 1
            name = f"{unnamed.name} ({i})"
        taken.add(name)
        yield dataclasses.replace(unnamed, name=name)


_Result = tuple[list[Origin], Work]  # origins of results, and the work done for them


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Goes through the equations of a function and of those within it.

    Attributes:
        sizes: number of weights, by leaf path, in the order of the tree.
        while_rounds: rounds of a ``while`` loop.
        ignored: names of primitives that count nothing.
        unknown: primitives that were met and are not known, with the shapes of their operands.
    """

    sizes: dict[str, int]
    while_rounds: int | None
    ignored: frozenset[str]
    unknown: dict[str, None] = dataclasses.field(default_factory=dict)

    def read(self, jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Origin], scope: str) -> _Result:
        """Gives the origins of a jaxpr's results, and its work."""
        jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        origins = dict.fromkeys(jaxpr.constvars, CONSTANT)
        origins |= dict(zip(jaxpr.invars, inputs, strict=True))

        def look_up(atoms: Sequence[Any]) -> list[Origin]:
            return [CONSTANT if isinstance(x, Literal) else origins[x] for x in atoms]

        work = Work()
        for eqn in jaxpr.eqns:
            results, done = self._equation(eqn, look_up(eqn.invars), scope)
            origins.update(zip(eqn.outvars, results, strict=True))
            work.add(done)
        return look_up(jaxpr.outvars), work

    def _equation(self, eqn: JaxprEqn, inputs: list[Origin], scope: str) -> _Result:
        name = eqn.primitive.name
        scope = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
        if name in CALLS:
            return self.read(eqn.params[CALLS[name]], inputs, scope)
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(eqn, inputs, scope)
        if name == "optimization_barrier":
            return inputs, Work()
        origin = merge(inputs)
        work = Work()
        if origin == CONSTANT or name in self.ignored:
            pass
        elif not is_known(eqn):
            operands = ", ".join(str(x.aval) for x in eqn.invars)
            self.unknown[f"{name}({operands})"] = None
        elif name in PRODUCTS:
            sizes, feeding = product(eqn, *inputs)
            leaves = tuple(path for path in self.sizes if path in feeding)
            name = max(leaves, key=self.sizes.__getitem__) if leaves else scope or name
            if 0 not in sizes.values():
                work.products.append(Product(name or "params", leaves=leaves, **sizes))
        elif origin.moving:
            work.operations.update(arithmetic(eqn))
        if origin.moving:
            work.meet(eqn, inputs)
        return [origin] * len(eqn.outvars), work

    def _scan(self, eqn: JaxprEqn, inputs: list[Origin], scope: str) -> _Result:
        params = eqn.params
        begin = params["num_consts"]
        end = begin + params["num_carry"]
        parts = inputs[:begin], inputs[begin:end], inputs[end:]
        carry, slices, work = self._loop(params["jaxpr"], *parts, scope)
        return carry + slices, work.repeated(params["length"])

    def _while(self, eqn: JaxprEqn, inputs: list[Origin], scope: str) -> _Result:
        params = eqn.params
        begin = params["cond_nconsts"]
        end = begin + params["body_nconsts"]
        carry, _, work = self._loop(
            params["body_jaxpr"], inputs[begin:end], inputs[end:], [], scope
        )
        work.add(self.read(params["cond_jaxpr"], [*inputs[:begin], *carry], scope)[1])
        if work.products and self.while_rounds is None:
            names = [x.name for x in work.products]
            raise ValueError(
                f"a while loop holds the products {names}, and how often it runs shows only as it "
                "runs: give while_rounds=..., the number of rounds to count"
            )
        return carry, work.repeated(self.while_rounds or 1)

    def _loop(
        self,
        body: ClosedJaxpr,
        consts: list[Origin],
        carry: list[Origin],
        slices: list[Origin],
        scope: str,
    ) -> tuple[list[Origin], list[Origin], Work]:
        """Gives the origins of a loop's carry and of its other results, and a round's work."""
        while True:
            results, work = self.read(body, [*consts, *carry, *slices], scope)
            after, others = results[: len(carry)], results[len(carry) :]
            after = [merge(pair) for pair in zip(carry, after, strict=True)]
            if after == carry:
                return carry, others, work
            carry = after  # what started as a constant is an activation after a round: once more

    def _cond(self, eqn: JaxprEqn, inputs: list[Origin], scope: str) -> _Result:
        branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
        if platforms:
            branches = branches[platforms.index(None) if None in platforms else 0 :][:1]
        read = [self.read(branch, inputs[1:], scope) for branch in branches]
        results = [
            merge([inputs[0], *origins]) for origins in zip(*(x for x, _ in read), strict=True)
        ]
        return results, max((work for _, work in read), key=lambda work: work.cost)
