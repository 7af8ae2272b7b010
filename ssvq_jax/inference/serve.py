"""Models served from packed weights: each is decoded where the forward pass uses it.

The model is traced with the shapes of its weights, and its operations are then carried out one by
one with packed weights in their places: a weight is decoded when an operation takes it together
with activations; in a scan over layers, that is in the body, for one layer. To the traced
operations linen, nnx, equinox and plain functions are the same, and no model is written anew.

A compiled program does not keep to that order by itself: a decoded weight depends on no activation,
and XLA for CPU decodes all of them first. So each is made to depend on the activation that it
meets, at no cost.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ssvq_jax.inference.deferred import Value, Weight, evaluate, force, is_packed
from ssvq_jax.tree import PyTree


def serve(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of parameters take packed ones, which it decodes one by one as it needs them.

    Call the result under ``jax.jit`` with the packed parameters as an argument: they are then the
    only weights that stay in memory, next to the decoded weights of about one layer. A weight that
    is used in several places is decoded in each, one that is used in a loop in every round.

    Args:
        function: computes outputs from a tree of parameters and more arguments, as the ``apply`` of
            a linen module does; arguments that are not arrays are passed on as they are.

    Returns:
        The function of the same arguments and outputs, for parameters in which leaves are
        `PackedLeaf` nodes: what `packed_params` gave, alone or within a tree of variables.

    Raises:
        ValueError: from the result, if no leaf of the parameters is packed.

    Example:
        >>> import jax.numpy as jnp
        >>> import ssvq_jax as ssvq
        >>> from ssvq_jax.inference import packed_params
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}
        >>> plan = ssvq.make_plan(params, [(".*", ssvq.SignSplit(codewords=2, dim=8))])
        >>> packed = plan.finalize(plan.init(jax.random.key(1), params))
        >>> served = jax.jit(serve(lambda params, x: x @ params["kernel"]))
        >>> served(packed_params(packed), jnp.ones((2, 16))).shape
        (2, 16)
    """

    @functools.wraps(function)
    def served(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        leaves, params_tree = jax.tree.flatten(params, is_leaf=is_packed)
        if not any(map(is_packed, leaves)):
            raise ValueError(
                "no leaf of the parameters is packed: give what packed_params(packed) returned as "
                "the first argument, or call the function itself with decoded parameters"
            )
        others, others_tree = jax.tree.flatten((args, kwargs))
        given = leaves + others
        arrays = [i for i, leaf in enumerate(given) if is_packed(leaf) or _is_array(leaf)]

        def traced(*inputs: Any) -> Any:
            full = list(given)
            for i, leaf in zip(arrays, inputs, strict=True):
                full[i] = leaf
            params = params_tree.unflatten(full[: len(leaves)])
            args, kwargs = others_tree.unflatten(full[len(leaves) :])
            return function(params, *args, **kwargs)

        inputs, shapes = [], []
        for i in arrays:
            late = is_packed(given[i])
            inputs.append(Value(Weight(given[i]) if late else given[i], i >= len(leaves)))
            shapes.append(jax.eval_shape(given[i].decode) if late else given[i])
        jaxpr, outputs = jax.make_jaxpr(traced, return_shape=True)(*shapes)
        # Tracers that the function closes over may be activations, concrete arrays are none.
        consts = [Value(const, isinstance(const, Tracer)) for const in jaxpr.consts]
        results = force(evaluate(jaxpr.jaxpr, consts, inputs))
        return jax.tree.structure(outputs).unflatten(results)

    return served


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
