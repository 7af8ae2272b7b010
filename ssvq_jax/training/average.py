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
        return jax.tree.map(
            lambda mean, leaf: mean.astype(leaf.dtype) if _is_float(mean) else mean,
            tuple(self),
            like,
        )


def start_average(params: PyTree, model_state: PyTree) -> Average:
    """Averages over nothing but the given values."""
    return Average(*jax.tree.map(_wide, (params, model_state)))


def update_average(
    average: Average,
    params: PyTree,
    model_state: PyTree,
    frozen: dict[str, Bool[Array, "..."]],
    count: Int[Array, ""],
    moved: Bool[Array, ""],
    decay: int | float,
) -> Average:
    """Moves the averages: a <- e a + (1 - e) x, with e = min(decay, (1 + n) / (10 + n)).

    Early averages are over fewer updates, so that they forget where the run began (as in
    TensorFlow's ``ExponentialMovingAverage``).

    Args:
        average: before.
        params: what is learned, after n updates.
        model_state: the other collections, then.
        frozen: masks of frozen signs, by leaf path in ``params``.
        count: n.
        moved: whether the last step made an update; if it only accumulated a gradient, averages
            stay.
        decay: e at the end.

    Returns:
        The new averages.

    Example:
        >>> average = start_average({"w": jnp.array([1.0])}, {})
        >>> count, moved = jnp.int32(8), jnp.array(True)  # e = 0.5
        >>> update_average(average, {"w": jnp.array([2.0])}, {}, {}, count, moved, 0.9).params["w"]
        Array([1.5], dtype=float32)
    """
    n = count.astype(jnp.float32)
    part = jnp.where(moved, 1 - jnp.minimum(decay, (1 + n) / (_WARMUP + n)), 0.0)
    new = jax.tree.map(_wide, (params, model_state))
    means, state = jax.tree.map(
        lambda mean, leaf: optax.incremental_update(leaf, mean, part) if _is_float(leaf) else leaf,
        tuple(average),
        new,
    )

    def keep(key_path: tuple[Any, ...], mean: Array, leaf: Array) -> Array:
        mask = frozen.get(leaf_path(key_path))
        return mean if mask is None else jnp.where(mask, leaf, mean)

    return Average(jax.tree_util.tree_map_with_path(keep, means, new[0]), state)


def check_decay(decay: int | float) -> None:
    """Raises ValueError for a decay out of range."""
    if not 0 <= decay < 1:
        raise ValueError(f"average_decay={decay}: give at least 0 (no average) and below 1")


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _wide(leaf: Array) -> Array:
    narrow = _is_float(leaf) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else jnp.copy(leaf)
