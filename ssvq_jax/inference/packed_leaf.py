"""Weights that stay packed in a parameter tree until they are used."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssvq_jax import tree
from ssvq_jax.entries import Entry, SharedEntry
from ssvq_jax.plan import Packed
from ssvq_jax.quantizers import Quantizer
from ssvq_jax.quantizers.streams import decode_streams, pack_fields, unpack_fields
from ssvq_jax.tree import LeafSpec, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["streams"], meta_fields=["quantizer", "spec"]
)
@dataclasses.dataclass(frozen=True)
class PackedLeaf:
    """A compressed weight in the bits that it is stored in: a node of a parameter tree.

    Its arrays are what a device holds. Leading axes of all of them are stacked weights, so that
    ``jax.lax.scan`` and ``flax.linen.scan`` cut a stack of layers into layers.

    Attributes:
        streams: by field, bytes ``[*stacked, bytes]`` of codes and signs, codebooks
            ``[*stacked, k, d]`` and scales as they are stored.
        quantizer: the method.
        spec: description of one weight, without stacked axes.
    """

    streams: dict[str, Any]  # arrays, or what JAX puts in their places
    quantizer: Quantizer
    spec: LeafSpec

    @property
    def stacked(self) -> tuple[int, ...]:
        """Leading axes: of stacked weights, as they are now."""
        stream = self.quantizer.storage(self.spec).streams[0]
        own = 1 if stream.values is not None else len(stream.shape)
        shape = self.streams[stream.field].shape
        return shape[: len(shape) - own]

    def decode(self) -> Float[Array, "..."]:
        """Decodes to the weight ``[*stacked, *spec.shape]``; jit-able."""
        lead = self.stacked
        shape = (*lead, *self.spec.shape)
        spec = LeafSpec("", shape, self.spec.dtype, stacked=len(lead))
        return decode_streams(self.quantizer, self.streams, spec)


def packed_params(packed: Packed) -> PyTree:
    """Puts the packed weights of a model in the places of the user's parameter tree.

    Args:
        packed: a finalized or loaded model.

    Returns:
        The user's tree: dense leaves as arrays, in the dtypes of the model, and `PackedLeaf` nodes.
        Each leaf that shares a codebook has it.

    Example:
        >>> from ssvq_jax import Uniform, make_plan
        >>> params = {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}
        >>> plan = make_plan(params, [("kernel", Uniform(bits=4)), ("bias", None)])
        >>> held = packed_params(plan.finalize(plan.init(jax.random.key(0), params)))
        >>> {name: stream.nbytes for name, stream in held["kernel"].streams.items()}
        {'levels': 32, 'step': 16}
        >>> decode_params(held)["kernel"].shape
        (8, 8)
    """
    leaves: dict[str, Any] = {}
    for entry in packed.plan.entries:
        leaves |= _leaves(entry, packed.streams[entry.name])
    return tree.fill(packed.dense(), leaves)


def decode_params(params: PyTree) -> PyTree:
    """Decodes every packed leaf of a tree, or of the part of a tree that a layer needs.

    Args:
        params: what `packed_params` gave, or a part of it.

    Returns:
        The tree with arrays in the place of packed leaves.
    """
    return jax.tree.map(
        lambda leaf: leaf.decode() if isinstance(leaf, PackedLeaf) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, PackedLeaf),
    )


def _leaves(entry: Entry, streams: Any) -> dict[str, PackedLeaf]:
    if not isinstance(entry, SharedEntry):
        arrays = {name: jnp.asarray(stream) for name, stream in streams.items()}
        (leaf,) = entry.leaves
        return {leaf.path: PackedLeaf(arrays, entry.quantizer, leaf.slice_spec())}
    leaves = {}
    fields = unpack_fields(entry.quantizer, streams, entry.spec)
    for leaf, quantizer, own in entry.parts(fields):
        arrays = {n: jnp.asarray(x) for n, x in pack_fields(quantizer, own, leaf).items()}
        leaves[leaf.path] = PackedLeaf(arrays, quantizer, leaf.slice_spec())
    return leaves
