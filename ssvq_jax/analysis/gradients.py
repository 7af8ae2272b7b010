"""Gradients of decoded weights: their mean over data, and what each adds to its codeword."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ssvq_jax import tree
from ssvq_jax.entries import Entry
from ssvq_jax.quantizers.base import Fields
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.tree import LeafSpec, PyTree, Variables


def dense_gradients(
    loss: Callable[[PyTree, Any], Float[Array, ""]], params: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Calculates the mean gradient of a loss over batches.

    Args:
        loss: of parameters and a batch; compiled once for each function.
        params: tree of float arrays, e.g. ``plan.decode(variables)``.
        batches: every one counts alike, so they should be of one size.

    Returns:
        A tree like ``params``, in float32.

    Raises:
        ValueError: if there is no batch.

    Example:
        >>> gradients = dense_gradients(lambda w, x: w @ x, jnp.zeros(2), jnp.eye(2))
        >>> gradients.tolist()
        [0.5, 0.5]
    """
    total, count = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params), 0
    for batch in batches:
        total = _add(loss, total, params, batch)
        count += 1
    if not count:
        raise ValueError("there are no batches to take gradients of: give at least one")
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(
    loss: Callable[[PyTree, Any], Float[Array, ""]], total: PyTree, params: PyTree, batch: Any
) -> PyTree:
    gradients = jax.grad(loss)(params, batch)
    return jax.tree.map(lambda x, g: x + g.astype(jnp.float32), total, gradients)


def member_gradients(
    entry: Entry, variables: Variables, gradients: PyTree
) -> Float[Array, "*slices n d"]:
    """Calculates what every sub-vector adds to the gradient of its codeword.

    It is the gradient of a codebook in which every sub-vector has a row of its own: a sub-vector of
    dLoss/dW_q, with the signs of `SignSplit` and the channel scales, if any, multiplied in, and
    zero where the leaf is padded. Summed by code it is the gradient of the codebook.

    Args:
        entry: of a plan, with a codebook method.
        variables: the three collections.
        gradients: dLoss/dW_q, a tree like the decoded parameters.

    Returns:
        A row a code, in the order of the codes, float32.

    Raises:
        ValueError: if a gradient of the entry is missing, of another shape than its leaf, or not
            finite.
    """
    arrays = tree.leaves_by_path(gradients)
    for leaf in entry.leaves:
        if leaf.path not in arrays:
            raise ValueError(
                f"gradients of leaf '{leaf.path}' are missing: give a tree like the decoded "
                "parameters, the gradient of the loss with respect to them"
            )
        found = arrays[leaf.path]
        if found.shape != leaf.shape:
            raise ValueError(
                f"gradients of leaf '{leaf.path}' have shape {found.shape}, the leaf {leaf.shape}: "
                "differentiate with respect to plan.decode(variables)"
            )
        bad = found.size - np.count_nonzero(np.isfinite(np.asarray(found)))
        if bad:
            raise ValueError(
                f"gradients of leaf '{leaf.path}' hold {bad} NaN or infinite values of "
                f"{found.size}: lower the loss scale, or look for the batch that causes them"
            )
    # Gradients of 16-bit leaves are often sums in float32: do not round them.
    wide = tuple(dataclasses.replace(leaf, dtype="float32") for leaf in entry.leaves)
    entry = dataclasses.replace(entry, leaves=wide)
    gradient = entry.gather(arrays).astype(jnp.float32)
    encoded = variables["vq"][entry.name], variables["vq_state"][entry.name]
    return _pull_back(*encoded, gradient, quantizer=entry.quantizer, spec=entry.nameless)


@functools.partial(jax.jit, static_argnames=("quantizer", "spec"))
def _pull_back(
    learned: Fields,
    fixed: Fields,
    gradient: Float[Array, "..."],
    *,
    quantizer: CodebookQuantizer,
    spec: LeafSpec,
) -> Float[Array, "*slices n d"]:
    """The vector-Jacobian product of decoding with respect to the rows looked up."""
    codes = fixed["codes"]

    def look_up(codebook: Float[Array, "k d"], codes: Integer[Array, " n"]) -> Array:
        return quantizer.stored_codebook(codebook)[codes]

    for _ in range(spec.stacked):
        look_up = jax.vmap(look_up)
    count = codes.shape[-1]
    single = dataclasses.replace(quantizer, codewords=count, codebook_dtype="float32")
    own = jnp.broadcast_to(jnp.arange(count, dtype=jnp.uint32), codes.shape)

    def decode(rows: Float[Array, "*slices n d"]) -> Array:
        return single.decode({**learned, "codebook": rows}, {**fixed, "codes": own}, spec)

    _, pull = jax.vjp(decode, look_up(learned["codebook"], codes))
    return pull(gradient)[0]
