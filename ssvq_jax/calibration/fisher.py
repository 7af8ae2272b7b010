"""Importance of every element of a weight: by squared gradients, or by squared inputs."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ssvq_jax import tree
from ssvq_jax.plan import Plan
from ssvq_jax.progress import bar_over
from ssvq_jax.quantizers.calibration import Calibration, InputMoments, from_input_rows
from ssvq_jax.tree import LeafSpec, PyTree


def fisher_diagonal(
    loss: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any],
    *,
    at_once: int = 1,
    progress: bool = False,
) -> dict[str, Array]:
    """Calculates the diagonal of the empirical Fisher information of a plan's weights.

    It is the mean over examples of the squared gradient of an example's loss (Kunstner et al.,
    arXiv 1905.12558, equation 3). To second order, an error e of a weight costs about e^2 times it;
    SqueezeLLM (Kim et al., arXiv 2306.07629, section 4.1) weighs its clustering so.

    Args:
        loss: computes a number from the tree of parameters and a batch; it is called with one
            example at a time, as a batch of one.
        params: the tree of float arrays that the plan was made for.
        plan: says which leaves are compressed.
        batches: what ``loss`` takes after the parameters: an array or pytree, or a tuple of several
            arguments; examples run along the first axis of all arrays.
        at_once: examples whose gradients are held in memory together.
        progress: show a progress bar.

    Returns:
        By leaf path, float32 of the leaf's shape: what `Calibration.importance` takes.

    Raises:
        ValueError: if there is no example, a gradient is not finite, or a leaf has none.

    Example:
        >>> import ssvq_jax as ssvq
        >>> params = {"kernel": jnp.ones((2, 1))}
        >>> plan = ssvq.make_plan(params, [(".*", ssvq.Uniform(bits=4))])
        >>> loss = lambda params, x: jnp.sum(x @ params["kernel"])
        >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]])]
        >>> fisher_diagonal(loss, params, plan, batches)["kernel"].tolist()
        [[5.0], [10.0]]
    """
    if at_once < 1:
        raise ValueError(f"at_once={at_once}: give 1 or more examples")
    found = tree.leaves_by_path(params)
    unknown = sorted(plan.compressed - set(found))
    if unknown:
        raise ValueError(f"leaves {unknown} of the plan are not in the tree: make it from this one")
    weights = {path: found[path] for path in sorted(plan.compressed)}
    rest = tree.punch(params, plan.compressed)
    totals = {path: jnp.zeros(np.shape(x), jnp.float32) for path, x in weights.items()}
    examples = 0
    step = jax.jit(functools.partial(_add_squares, loss, at_once), donate_argnums=2)
    for batch in bar_over(batches, "gradients") if progress else batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                f"a batch's arrays have first axes of {sorted(lengths)}: examples run along the "
                "first axis of every one, so give equal ones"
            )
        examples += lengths.pop()[0]
        totals = step(weights, rest, totals, batch)
    if not examples:
        raise ValueError("there is no example to take a gradient of: give at least one")
    for path, total in totals.items():
        if not bool(jnp.all(jnp.isfinite(total))):
            raise ValueError(
                f"gradients of leaf '{path}' are NaN, infinite or too large to be squared: repair "
                "the data or the weights, or scale the loss down"
            )
        if not bool(jnp.any(total > 0)):
            raise ValueError(
                f"leaf '{path}' has no gradient in any of {examples} examples: the loss does not "
                "depend on it, or its gradients are too small to be squared (scale the loss up)"
            )
    return {path: total / np.float32(examples) for path, total in totals.items()}


def _add_squares(
    loss: Callable[..., Any],
    at_once: int,
    weights: Mapping[str, Array],
    rest: PyTree,
    totals: Mapping[str, Array],
    batch: tuple[Any, ...],
) -> dict[str, Array]:
    """Adds the squared gradients of a batch's examples."""

    def squares(example: tuple[Any, ...]) -> dict[str, Array]:
        alone = jax.tree.map(lambda x: x[None], example)
        gradients = jax.grad(lambda weights: loss(tree.fill(rest, weights), *alone))(weights)
        return jax.tree.map(lambda x: jnp.square(x.astype(jnp.float32)), gradients)

    def add(totals: Any, examples: tuple[Any, ...]) -> tuple[Any, None]:
        each = jax.vmap(squares)(examples)
        return jax.tree.map(lambda total, x: total + jnp.sum(x, axis=0), totals, each), None

    number = jax.tree.leaves(batch)[0].shape[0]
    whole = number - number % at_once
    chunks = jax.tree.map(
        lambda x: x[:whole].reshape(whole // at_once, at_once, *x.shape[1:]), batch
    )
    sums, _ = lax.scan(add, dict(totals), chunks)
    if whole < number:
        sums, _ = add(sums, jax.tree.map(lambda x: x[whole:], batch))
    return sums


def importance_of_inputs(moments: InputMoments, spec: LeafSpec) -> Float[Array, "..."]:
    """Calculates what an error of one element alone costs: the mean square of its input.

    Args:
        moments: of the leaf's inputs; the diagonal of H is taken.
        spec: the leaf.

    Returns:
        Importance of every element, float32 of the leaf's shape.

    Raises:
        ValueError: if the moments are not of this leaf.

    Example:
        >>> moments = InputMoments(jnp.array([[4.0, 1.0], [1.0, 9.0]]), (0,))
        >>> importance_of_inputs(moments, LeafSpec("kernel", (2, 3), "float32")).tolist()
        [[4.0, 4.0, 4.0], [9.0, 9.0, 9.0]]
    """
    moments.check(spec)
    shape = spec.slice_spec().shape
    diagonal = jnp.diagonal(moments.matrix, axis1=-2, axis2=-1)
    rows = diagonal.reshape(-1, diagonal.shape[-1])
    width = math.prod(shape) // rows.shape[-1]

    def spread(row: Float[Array, " c"]) -> Float[Array, "..."]:
        return from_input_rows(
            jnp.broadcast_to(row[:, None], (row.size, width)), shape, moments.axes
        )

    return jax.vmap(spread)(rows).reshape(spec.shape)


def input_calibrations(plan: Plan, inputs: Mapping[str, InputMoments]) -> dict[str, Calibration]:
    """Moments, and from them the importance of every element, for `Plan.init`.

    Args:
        plan: the plan.
        inputs: moments by leaf path: ``input_moments(...).inputs``.

    Example:
        >>> from ssvq_jax import Uniform, make_plan
        >>> plan = make_plan({"w": jnp.ones((2, 3))}, [("w", Uniform(bits=4))])
        >>> moments = InputMoments(jnp.diag(jnp.array([4.0, 9.0])), (0,))
        >>> input_calibrations(plan, {"w": moments})["w"].importance.tolist()
        [[4.0, 4.0, 4.0], [9.0, 9.0, 9.0]]
    """
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    importance = {path: importance_of_inputs(x, leaves[path]) for path, x in inputs.items()}
    return calibrations(inputs, importance)


def calibrations(
    inputs: Mapping[str, InputMoments] | None = None,
    importance: Mapping[str, Array] | None = None,
) -> dict[str, Calibration]:
    """Puts together what is known of leaves, for `Plan.init`.

    Args:
        inputs: moments by leaf path: ``input_moments(...).inputs``.
        importance: importance of elements by leaf path, as `fisher_diagonal` gives it.

    Returns:
        Calibrations of all leaves of which something is known.

    Example:
        >>> found = calibrations(importance={"kernel": jnp.ones((2, 2))})
        >>> found["kernel"].inputs is None
        True
    """
    inputs, importance = inputs or {}, importance or {}
    return {
        path: Calibration(importance.get(path), inputs.get(path))
        for path in sorted({*inputs, *importance})
    }
