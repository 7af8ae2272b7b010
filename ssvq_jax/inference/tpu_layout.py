"""How a packed weight is laid out for the kernel for TPUs.

A TPU has no cheap way to spread one byte over eight lanes. The bytes are therefore laid out by
their place in a *period*, the fewest sub-vectors whose codes and signs both fill whole bytes (two
sub-vectors of dim 8 with codes of 4 bits: one byte of codes, two of signs): ``[byte of the period,
period, row of W]``. Shifting a plane of bytes then gives, for all periods and for 128 rows in the
lanes, the codes of one sub-vector, or the signs of one column of the period.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped, UInt8

from ssvq_jax.quantizers import SignSplit, Vector

LANES = 128
SUBLANES = 32  # of a tile of bytes; more than the 8 and 16 of 32 and 16 bit numbers


@dataclasses.dataclass(frozen=True)
class Period:
    """The fewest sub-vectors whose codes and signs both fill whole bytes."""

    codes: int
    columns: int
    code_bytes: int
    sign_bytes: int


def period_of(quantizer: SignSplit | Vector) -> Period:
    """The period of a method's codes and signs."""
    width, dim = quantizer.code_width, quantizer.dim
    codes = max(8 // math.gcd(8, width), 8 // math.gcd(8, dim))  # both are powers of two
    return Period(codes, codes * dim, codes * width // 8, codes * dim // 8)


class Cut(NamedTuple):
    """An axis in equal blocks."""

    size: int
    blocks: int

    @property
    def length(self) -> int:
        """The axis with what has to be appended to it."""
        return self.size * self.blocks


def cut(length: int, most: int, unit: int) -> Cut:
    """Cuts into as few blocks of whole units as ``most`` allows, and as short ones."""
    units = max(1, -(-length // unit))
    blocks = -(-units // max(1, most // unit))
    return Cut(-(-units // blocks) * unit, blocks)


def pad(array: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Appends zeros."""
    return jnp.pad(array, [(0, n - m) for m, n in zip(array.shape, shape, strict=True)])


def byte_planes(
    stream: UInt8[Array, " n"], rows: int, bits: int, used: int, periods: Cut, inner: Cut
) -> UInt8[Array, "b t r"]:
    """Sorts a stream by place in the period.

    Args:
        stream: bytes of all rows of W, row after row.
        rows: number of rows.
        bits: of a row.
        used: bytes of a period.
        periods: cut of a row's periods; the last ones hold any bits.
        inner: cut of the rows; those that are appended hold zeros.

    Returns:
        The bytes ``[used, periods.length, inner.length]``.
    """
    by_row = _byte_rows(stream, rows, bits, -(-bits // (8 * used)) * used)
    by_column = pad(by_row.T, (periods.length * used, inner.length))
    return jnp.stack([by_column[i::used] for i in range(used)])


def _byte_rows(
    stream: UInt8[Array, " n"], rows: int, bits: int, size: int
) -> UInt8[Array, "rows size"]:
    """Begins every row of ``bits`` bits on a byte of its own; fills up with any bits."""
    if bits % 8 == 0:
        return pad(stream.reshape(rows, bits // 8), (rows, size))
    # Eight rows are whole bytes, so row i of every eight begins at the same bit.
    eights = -(-rows // 8)
    stream = jnp.pad(stream, (0, eights * bits - stream.shape[0])).reshape(eights, bits)
    stream = jnp.pad(stream, ((0, 0), (0, size + 1)))
    found = []
    for i in range(8):
        first, offset = divmod(i * bits, 8)
        row = stream[:, first : first + size]
        if offset:
            after = stream[:, first + 1 : first + 1 + size]
            row = row >> jnp.uint8(offset) | after << jnp.uint8(8 - offset)
        found.append(row)
    return jnp.stack(found, axis=1).reshape(-1, size)[:rows]


def codebook_tables(
    streams: Mapping[str, Array],
) -> tuple[Int32[Array, "tables 128"], Float32[Array, "1"]]:
    """The codebook in tables of 128 words, and what its entries are to be multiplied with.

    Four int8 entries share a word, so that one gather finds four; of a codebook of floats, every
    entry has a word of its own. With n words a codeword, table ``t * n + i`` has word i of the
    codewords from ``128 * t``.
    """
    codebook = streams["codebook"]
    unit = jnp.ones(1, jnp.float32)
    if codebook.dtype == jnp.int8:
        unit = streams["codebook_scale"].astype(jnp.float32).reshape(1)
        quads = jnp.pad(codebook, ((0, 0), (0, -codebook.shape[1] % 4)))
        words = lax.bitcast_convert_type(quads.reshape(len(codebook), -1, 4), jnp.int32)
    else:
        words = lax.bitcast_convert_type(codebook.astype(jnp.float32), jnp.int32)
    count = -(-len(codebook) // LANES)
    words = pad(words, (count * LANES, words.shape[1]))
    words = words.reshape(count, LANES, -1).transpose(0, 2, 1)
    return words.reshape(-1, LANES), unit
