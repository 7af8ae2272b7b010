"""Batch-norm statistics measured anew for the weights as they are.

Signs and codes that oscillate move a layer's outputs at every update, and running averages mix the
outputs of many updates: they fit no one set of weights. Nagel et al., "Overcoming oscillations in
quantization-aware training", arXiv 2203.11086, estimate the statistics again after training.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ssvq_jax.quantizers.base import check_integer
from ssvq_jax.training.layout import Layout
from ssvq_jax.training.step import Batch, Forward
from ssvq_jax.tree import PyTree, leaf_path, leaves_by_path

_COLLECTION = "batch_stats"


class _Moments(NamedTuple):
    """What the batches so far say, by path of a statistic.

    Attributes:
        examples: how many examples.
        mean: mean of the batches' statistics, weighted by their sizes.
        spread: weighted sum of their squared distances from that mean.
        averaged: whether the model updates the statistic as a running average.
    """

    examples: Float[Array, ""]
    mean: dict[str, Float[Array, "..."]]
    spread: dict[str, Float[Array, "..."]]
    averaged: dict[str, Bool[Array, ""]]


def reestimate_batch_norm(
    forward: Forward,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[Batch],
    count: int,
    key: Key[Array, ""],
    layout: Layout | None = None,
) -> PyTree:
    """Replaces running averages by the statistics of some batches under the given parameters.

    A layer with momentum m updates a statistic s by the batch's own b as s' = m s + (1 - m) b. In
    training mode b does not depend on s, so one call with s = 0 gives (1 - m) b, its derivative
    by s gives m, and b follows for every layer at once, whatever its momentum. A statistic that
    the call leaves as it is (a layer in evaluation mode) keeps its value.

    Means are the mean over the batches. A leaf ``var`` beside a leaf ``mean`` is the mean of the
    batches' variances and the variance of the batches' means (the law of total variance): for the
    first such layer, the exact moments of all examples. Layers above it see inputs that were
    normalised batch by batch, as in training.

    Args:
        forward: the model, called in training mode.
        params: parameters to evaluate with, e.g. of the finalized model.
        model_state: the model's other collections; only ``batch_stats`` is replaced.
        batches: ``{"image": [b, h, w, c]}``, without padded examples; of one size, or the model is
            compiled again.
        count: how many batches to use.
        key: typed PRNG key, for dropout; every batch uses its own.
        layout: the devices, over which batches are cut; None for the default one.

    Returns:
        The model state with new statistics, of the same dtypes; as given if it has none.

    Raises:
        ValueError: if ``count`` is below 1 or there are fewer batches, a batch is padded, or a
            statistic is no running average.
    """
    check_integer("count", count, least=1)
    if not model_state or not jax.tree.leaves(model_state.get(_COLLECTION)):
        return model_state
    if layout is not None:
        params, model_state, key = jax.device_put((params, model_state, key), layout.replicated)
    stats = _floats(model_state[_COLLECTION])
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in stats.items()}
    moments = _Moments(jnp.zeros(()), zeros, zeros, dict.fromkeys(stats, jnp.array(True)))
    used = 0
    for batch in batches:
        if not np.all(batch.get("mask", True)):
            raise ValueError("a batch has padded examples, which would count: give training data")
        batch_key, images = jax.random.fold_in(key, used), batch["image"]
        if layout is not None:
            layout.check_batch(len(images))
            images = jax.device_put(images, layout.batch)
        moments = _observe(forward, moments, params, model_state, images, batch_key)
        used += 1
        if used == count:
            break
    if used < count:
        raise ValueError(f"count={count}, but the data gave {used} batches: lower count")
    strange = sorted(path for path, averaged in moments.averaged.items() if not averaged)
    if strange:
        raise ValueError(
            f"the model does not update {strange} of '{_COLLECTION}' as running averages, "
            "m * old + (1 - m) * new: keep such state in another collection"
        )
    return {**model_state, _COLLECTION: _replace(model_state[_COLLECTION], _total(moments))}


@functools.partial(jax.jit, static_argnums=0)
def _observe(
    forward: Forward,
    moments: _Moments,
    params: PyTree,
    model_state: PyTree,
    images: Array,
    key: Key[Array, ""],
) -> _Moments:
    """Adds a batch (Welford's update)."""
    before = model_state[_COLLECTION]
    old = _floats(before)

    def update(stats: dict[str, Array]) -> dict[str, Array]:
        state = {**model_state, _COLLECTION: _replace(before, stats, keep_dtype=False)}
        return _floats(forward(params, state, images, key)[1][_COLLECTION])

    # Layers in evaluation mode use their statistics: setting those to 0 would spoil the layers
    # above. Without such layers the two forward passes differ in the updates alone, and XLA
    # computes one.
    after = update(old)
    moving = {p: jnp.any((after[p] != s) | ~jnp.isfinite(s)) for p, s in old.items()}
    start = {p: jnp.where(moving[p], 0.0, s) for p, s in old.items()}
    tangent = {p: jnp.broadcast_to(moving[p], s.shape).astype(s.dtype) for p, s in old.items()}
    scaled, momentum = jax.jvp(update, (start,), (tangent,))

    size = images.shape[0]
    examples = moments.examples + size
    mean, spread, averaged = {}, {}, {}
    for path in old:
        m = momentum[path]
        found = jnp.where(moving[path], scaled[path] / jnp.where(m < 1, 1 - m, 1.0), old[path])
        delta = found - moments.mean[path]
        mean[path] = moments.mean[path] + delta * (size / examples)
        spread[path] = moments.spread[path] + size * delta * (found - mean[path])
        valid = jnp.all((m >= 0) & (m < 1))
        averaged[path] = moments.averaged[path] & (valid | ~moving[path])
    return _Moments(examples, mean, spread, averaged)


def _total(moments: _Moments) -> dict[str, Float[Array, "..."]]:
    """Moments of all examples together."""
    total = dict(moments.mean)
    for path in total:
        head, _, name = path.rpartition("/")
        sibling = f"{head}/mean" if head else "mean"
        if name == "var" and sibling in total:
            total[path] = total[path] + moments.spread[sibling] / moments.examples
    return total


def _floats(stats: PyTree) -> dict[str, Float[Array, "..."]]:
    """Float statistics by path, in float32 at least: 16 bits are too few to divide by 1 - m."""
    return {
        path: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
        for path, leaf in leaves_by_path(stats).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _replace(stats: PyTree, new: dict[str, Any], *, keep_dtype: bool = True) -> PyTree:
    def one(key_path: tuple[Any, ...], leaf: Array) -> Array:
        value = new.get(leaf_path(key_path), leaf)
        return value.astype(leaf.dtype) if keep_dtype else value

    return jax.tree_util.tree_map_with_path(one, stats)
