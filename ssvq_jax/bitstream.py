"""Numbers of a few bits in bytes, and back.

Number i of a stream of width w takes the bits ``i * w`` to ``i * w + w - 1``, counted from the
least significant bit of the first byte; what is left of the last byte is zero. Leading axes are
streams of their own, each begun on a new byte.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt, UInt8

_CHUNK = 1 << 20  # numbers taken apart at once: 32 MiB of bits at most


def bytes_of(count: int, width: int) -> int:
    """Bytes that ``count`` numbers of ``width`` bits take."""
    return -(-count * width // 8)


def pack_bits(numbers: np.ndarray, width: int) -> UInt8[np.ndarray, "*streams bytes"]:
    """Puts unsigned numbers side by side.

    Args:
        numbers: unsigned integers or booleans below 2^width, ``[*streams, count]``.
        width: bits of a number, 1 to 32.

    Returns:
        The bytes, ``[*streams, ceil(count * width / 8)]``.

    Example:
        >>> pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist()
        [33, 3]
    """
    count = numbers.shape[-1]
    if width == 1:
        return np.packbits(numbers.astype(bool), axis=-1, bitorder="little")
    rows = numbers.reshape(-1, count)
    packed = np.empty((len(rows), bytes_of(count, width)), np.uint8)
    chunk = _CHUNK // 8 * 8  # whole bytes, whatever the width
    positions = np.arange(width, dtype=np.uint32)
    for row, out in zip(rows, packed, strict=True):
        for start in range(0, count, chunk):
            part = row[start : start + chunk].astype(np.uint32)
            bits = (part[:, None] >> positions & 1).astype(np.uint8)
            found = np.packbits(bits, bitorder="little")
            out[start * width // 8 :][: len(found)] = found
    return packed.reshape(*numbers.shape[:-1], -1)


def unpack_bits(
    stream: UInt8[Array, "*streams bytes"], count: int, width: int
) -> UInt[Array, "*streams count"]:
    """Inverts `pack_bits`; jit-able, elementwise in the result, so that it fuses with what follows.

    Args:
        stream: bytes.
        count: how many numbers a stream holds.
        width: bits of a number, 1 to 32.

    Returns:
        Numbers in the smallest unsigned type that holds them, ``[*streams, count]``.

    Example:
        >>> unpack_bits(jnp.array([33, 3], jnp.uint8), 3, 4).tolist()
        [1, 2, 3]
    """
    lead = stream.shape[:-1]
    dtype = number_dtype(width)
    if width in (8, 16, 32):
        parts = [
            stream[..., i :: width // 8].astype(dtype) << dtype.type(8 * i)
            for i in range(width // 8)
        ]
        return _join(parts)[..., :count]
    if 8 % width == 0:
        shape = (*stream.shape, 8 // width)
        shifts = lax.broadcasted_iota(jnp.uint8, shape, stream.ndim) * np.uint8(width)
        numbers = stream[..., None] >> shifts & np.uint8(2**width - 1)
        return numbers.reshape(*lead, -1)[..., :count]
    # Eight numbers take `width` bytes, and each lies in a few of these.
    groups = -(-count // 8)
    missing = groups * width - stream.shape[-1]
    padded = jnp.pad(stream, [(0, 0)] * len(lead) + [(0, missing)])
    octets = padded.reshape(*lead, groups, width)
    numbers = jnp.stack([_number(octets, i, width) for i in range(8)], axis=-1)
    return numbers.reshape(*lead, -1)[..., :count]


def number_dtype(width: int) -> np.dtype:
    """The smallest unsigned integer type that holds numbers of ``width`` bits."""
    return np.dtype(np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32)


def _number(octets: UInt8[Array, "*streams w"], index: int, width: int) -> UInt[Array, "*streams"]:
    """Number ``index`` of eight that lie in ``width`` bytes."""
    first, offset = divmod(index * width, 8)
    dtype = number_dtype(width)
    parts = []
    for i in range(-(-(offset + width) // 8)):
        byte = octets[..., first + i].astype(dtype)
        shift = 8 * i - offset
        parts.append(byte << dtype.type(shift) if shift >= 0 else byte >> dtype.type(-shift))
    return _join(parts) & dtype.type(2**width - 1)


def _join(parts: list[UInt[Array, "..."]]) -> UInt[Array, "..."]:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    return joined
