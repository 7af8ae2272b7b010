"""What a method stores, as it lies in memory and in a file: bits side by side, floats as is."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssvq_jax.bitstream import pack_bits, unpack_bits
from ssvq_jax.quantizers.base import Fields, Quantizer, Stream
from ssvq_jax.tree import LeafSpec


def pack_fields(quantizer: Quantizer, fields: Fields, spec: LeafSpec) -> dict[str, np.ndarray]:
    """Puts the fields of `Quantizer.pack` into exactly what is stored of a weight.

    Args:
        quantizer: the method.
        fields: numbers by field.
        spec: description of the leaf.

    Returns:
        Host arrays by field, in the order of `Storage.streams`, with the leaf's stacked axes
        first: bytes ``[*stacked, bytes]`` of unsigned integers and booleans, others as they are.
    """
    lead = spec.shape[: spec.stacked]
    streams = {}
    for stream in quantizer.storage(spec).streams:
        field = np.asarray(fields[stream.field])
        if stream.values is not None:
            field = pack_bits(field.reshape(*lead, stream.slice_count), stream.width)
        streams[stream.field] = field
    return streams


def stream_shape(stream: Stream, spec: LeafSpec) -> tuple[int, ...]:
    """Shape of a stream's array, as `pack_fields` gives it."""
    lead = spec.shape[: spec.stacked]
    return (*lead, stream.slice_bytes) if stream.values is not None else (*lead, *stream.shape)


def unpack_fields(
    quantizer: Quantizer, streams: Mapping[str, Any], spec: LeafSpec
) -> dict[str, Array]:
    """Inverts `pack_fields`; jit-able."""
    lead = spec.shape[: spec.stacked]
    fields = {}
    for stream in quantizer.storage(spec).streams:
        field = jnp.asarray(streams[stream.field])
        if stream.values is not None:
            field = unpack_bits(field, stream.slice_count, stream.width).astype(stream.dtype)
            field = field.reshape(*lead, *stream.shape)
        fields[stream.field] = field
    return fields


@functools.partial(jax.jit, static_argnames=("quantizer", "spec"))
def decode_streams(
    quantizer: Quantizer, streams: Mapping[str, Any], spec: LeafSpec
) -> Float[Array, "..."]:
    """Decodes a weight in one compiled loop over its elements.

    Args:
        quantizer: the method.
        streams: what `pack_fields` gave.
        spec: description of the leaf; leaves of one shape share compiled code if they share the
            path, so give an empty one.

    Returns:
        The weight, of ``spec.shape`` and ``spec.dtype``.
    """
    fields = unpack_fields(quantizer, streams, spec)
    return quantizer.decode(*quantizer.unpack(fields, spec), spec)
