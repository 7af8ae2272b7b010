"""Decoding that waits for an activation: else a compiler decodes all weights first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jaxtyping import Array, Bool, Float

from ssvq_jax.inference.packed_leaf import PackedLeaf


def has_number(array: Any) -> bool:
    """Whether a decoding can be made to wait for an array: it is traced, not empty, and no key."""
    if not isinstance(array, Tracer) or array.size == 0:
        return False
    return not jnp.issubdtype(array.dtype, jax.dtypes.extended)  # PRNG keys


def after(leaf: PackedLeaf, activation: Any) -> PackedLeaf:
    """The same bits, which XLA cannot know before the activation."""
    if activation is None:
        return leaf
    corner = _corner(activation)
    zero = _zero(lax.stop_gradient(jnp.real(corner)).astype(jnp.float32))
    streams = {
        name: stream ^ zero.astype(stream.dtype)
        if jnp.issubdtype(stream.dtype, jnp.integer)
        else stream
        for name, stream in leaf.streams.items()
    }
    return dataclasses.replace(leaf, streams=streams)


def _corner(activation: Array) -> Array:
    """The first element."""

    def cut(array: Array) -> Array:
        return lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())

    kind = jax.typeof(activation)
    if AxisType.Explicit not in kind.sharding.mesh.axis_types:
        return cut(activation)
    where = NamedSharding(kind.sharding.mesh, PartitionSpec())  # explicit sharding wants to know
    spread: Any = auto_axes(cut, out_sharding=where)
    return spread(activation)


@jax.custom_batching.custom_vmap
def _zero(number: Float[Array, ""]) -> Bool[Array, ""]:
    """False whatever the number, NaN included: a word with its lowest bit set is not zero."""
    return lax.bitcast_convert_type(number, jnp.uint32) | jnp.uint32(1) == jnp.uint32(0)


@_zero.def_vmap
def _zero_of_first(size: int, batched: list[bool], numbers: Float[Array, " n"]) -> Any:
    # Under vmap any example will do; one zero an example would decode the weights for each.
    return _zero(numbers[0]), False
