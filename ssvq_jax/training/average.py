"""Moving averages of weights, which often judge better than the last ones.

Averages are float32 where weights have 16 bits: those would not notice a change of one part in ten
thousand. Frozen signs are final: their latents are taken as they are, not averaged.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from ssvq_jax.tree import PyTree, leaf_path

_WARMUP = 10


class Average(NamedTuple):
    """Averages of what is learned and of the model's own collections, of the same structure.

    Attributes:
        params: of what is learned.
        model_state: of the other collections; integers are those of the last step.
    """

    params: PyTree
    model_state: PyTree

    def read(self, like: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Returns both in the dtypes of others."""
        return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), tuple(self), like)


def start_average(params: PyTree, model_state: PyTree) -> Average:
    """Averages over nothing but the given values."""
    return Average(*jax.tree.map(_wide, (params, model_state)))


def update_average(
    average: Average,
    params: PyTree,
    model_state: PyTree,
    frozen: dict[str, Bool[Array, "..."]],
    step: Int[Array, ""],
    decay: float,
) -> Average:
    """Moves the averages: a <- e a + (1 - e) x, with e = min(decay, (1 + step) / (10 + step)).

    Early averages are over fewer steps, so that they forget where the run began (as in
    TensorFlow's ``ExponentialMovingAverage``).

    Args:
        average: before.
        params: what is learned, after the step.
        model_state: the other collections, after the step.
        frozen: masks of frozen signs, by leaf path in ``params``.
        step: steps made.
        decay: e at the end.

    Returns:
        The averages after the step.

    Example:
        >>> average = start_average({"w": jnp.array([1.0])}, {})
        >>> step = jnp.int32(8)  # e = 0.5
        >>> update_average(average, {"w": jnp.array([2.0])}, {}, {}, step, 0.9).params["w"]
        Array([1.5], dtype=float32)
    """
    count = step.astype(jnp.float32)
    part = 1 - jnp.minimum(decay, (1 + count) / (_WARMUP + count))
    new = jax.tree.map(_wide, (params, model_state))
    moved, state = jax.tree.map(
        lambda mean, leaf: optax.incremental_update(leaf, mean, part) if _is_float(leaf) else leaf,
        tuple(average),
        new,
    )

    def keep(key_path: tuple[Any, ...], mean: Array, leaf: Array) -> Array:
        mask = frozen.get(leaf_path(key_path))
        return mean if mask is None else jnp.where(mask, leaf, mean)

    return Average(jax.tree_util.tree_map_with_path(keep, moved, new[0]), state)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _wide(leaf: Array) -> Array:
    narrow = _is_float(leaf) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else jnp.copy(leaf)
