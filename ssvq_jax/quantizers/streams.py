"""What a method stores, as it lies in memory and in a file: bits side by side, floats as is."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt

from ssvq_jax.bitstream import pack_bits, unpack_bits
from ssvq_jax.quantizers.base import Fields, Quantizer, Stream
from ssvq_jax.tree import LeafSpec

_LARGEST = float(np.finfo(np.float32).max) / 2**9  # levels are whole numbers up to 2^8


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


def check_streams(quantizer: Quantizer, streams: Mapping[str, np.ndarray], spec: LeafSpec) -> None:
    """Refuses numbers that do not exist and floats that decode to no number.

    Args:
        quantizer: the method.
        streams: what `pack_fields` gave.
        spec: description of the leaf, without a path.

    Raises:
        ValueError: saying which field holds what.
    """
    largest = 1.0
    for stream in quantizer.storage(spec).streams:
        field = streams[stream.field]
        if stream.values is None:
            with np.errstate(invalid="ignore"):  # of NaNs that signal
                peak = float(np.max(np.abs(field.astype(np.float64))))
            if not math.isfinite(peak):
                raise ValueError(f"its {stream.field} is not finite")
            largest *= max(peak, 1.0)
        elif stream.values < 2**stream.width:  # else all numbers of so many bits exist
            peak = int(_largest(quantizer, streams, spec, stream.field))
            if peak >= stream.values:
                raise ValueError(
                    f"its {stream.field} go up to {peak}, and there are {stream.values}"
                )
    exist = _exist(quantizer, streams, spec)
    if exist is not None and not bool(exist):
        raise ValueError("its numbers stand for nothing together")
    if largest > _LARGEST:
        raise ValueError("its weights are larger than a float32 can be")


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _largest(
    quantizer: Quantizer, streams: Mapping[str, Any], spec: LeafSpec, field: str
) -> UInt[Array, ""]:
    return jnp.max(unpack_fields(quantizer, streams, spec)[field])


@functools.partial(jax.jit, static_argnums=(0, 2))
def _exist(
    quantizer: Quantizer, streams: Mapping[str, Any], spec: LeafSpec
) -> Bool[Array, ""] | None:
    exist = quantizer.exist(unpack_fields(quantizer, streams, spec), spec)
    return None if exist is None else jnp.all(exist)


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
