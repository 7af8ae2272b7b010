"""The compressed matrix product as a Pallas kernel for TPUs, version 4 and later.

Bytes come in the order of `ssvq_jax.inference.tpu_layout`, with rows of W along the lanes.
Codewords are found with the gather along lanes (``jnp.take_along_axis``) that TPUs have for tables
of 128 numbers. Each column of a period goes to its places in a tile of W^T, which is multiplied
with x. The weights are those of `PackedLeaf.decode`, bit by bit, and never leave the chip's vector
memory.

The tests interpret and lower the kernel; it has not run on a TPU so far.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from ssvq_jax.inference.packed_leaf import PackedLeaf
from ssvq_jax.inference.tpu_layout import (
    LANES,
    SUBLANES,
    Period,
    byte_planes,
    codebook_tables,
    cut,
    pad,
    period_of,
)
from ssvq_jax.quantizers import SignSplit, Vector

_BATCH_UNIT = 16
_MOST_BATCH = 512  # rows of x in a block: every block of x decodes W again
_MOST_COLUMNS = 1024  # columns of W in a block, where its periods are short enough
_MOST_PRODUCTS = 1 << 19  # in a block of the result: 2 MiB
MOST_PERIOD = 256  # columns; a tile of W takes 4 MiB with that


def tpu_matmul(
    x: Float[Array, "m in"], leaf: PackedLeaf, *, interpret: bool = False
) -> Float32[Array, "m out"]:
    """Multiplies by a packed weight ``[in, out]`` of `SignSplit` or `Vector`.

    Args:
        x: float32 or bfloat16. Products of float32 factors are as precise as
            ``jax_default_matmul_precision`` says, as everywhere in JAX.
        leaf: the weight, float32 or bfloat16: sub-vectors along the last axis and not padded, codes
            of 8 bits at most, a period of at most `MOST_PERIOD` columns.
        interpret: run the kernel step by step on any device, slowly.

    Returns:
        The sums, as they were accumulated.
    """
    quantizer, (rows, columns) = leaf.quantizer, leaf.spec.shape
    assert isinstance(quantizer, SignSplit | Vector)
    period = period_of(quantizer)
    periods = cut(-(-columns // period.columns), max(1, _MOST_COLUMNS // period.columns), SUBLANES)
    block = periods.size * period.columns
    batch = cut(x.shape[0], min(_MOST_BATCH, _MOST_PRODUCTS // block), _BATCH_UNIT)
    inner = cut(rows, LANES, LANES)

    def planes(name: str, bits: int, used: int) -> tuple[UInt8[Array, "b t r"], pl.BlockSpec]:
        array = byte_planes(leaf.streams[name], rows, bits, used, periods, inner)
        shape = (used, periods.size, inner.size)
        return array, pl.BlockSpec(shape, lambda i, j, k: (0, j, k))

    # On every step of the grid: rows i of x, columns j of W, rows k of W.
    tables, unit = codebook_tables(leaf.streams)
    code_bits = columns // quantizer.dim * quantizer.code_width
    operands = _Operands(
        (tables, pl.BlockSpec(tables.shape, lambda i, j, k: (0, 0))),
        (unit, pl.BlockSpec(memory_space=pltpu.SMEM)),
        (
            pad(x, (batch.length, inner.length)),
            pl.BlockSpec((batch.size, inner.size), lambda i, j, k: (i, k)),
        ),
        planes("codes", code_bits, period.code_bytes),
        (None, None),
        (None, None),
    )
    if "signs" in leaf.streams:
        operands = operands._replace(signs=planes("signs", columns, period.sign_bytes))
    if "scale" in leaf.streams:
        scale = leaf.streams["scale"].astype(jnp.float32)
        if quantizer.channel_axis % 2:
            scale = pad(scale, (periods.blocks * block,))[:, None]
            spec = pl.BlockSpec((block, 1), lambda i, j, k: (j, 0))
        else:
            scale = pad(scale, (inner.length,))[None]
            spec = pl.BlockSpec((1, inner.size), lambda i, j, k: (0, k))
        operands = operands._replace(scale=(scale, spec))
    arrays, specs = zip(*operands, strict=True)
    exact = leaf.spec.dtype == x.dtype == jnp.float32
    products = pl.pallas_call(
        _Kernel(period, quantizer, leaf.streams["codebook"].dtype == jnp.int8, not exact),
        grid=(batch.blocks, periods.blocks, inner.blocks),
        in_specs=[_Operands(*specs)],
        out_specs=pl.BlockSpec((batch.size, block), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((batch.length, periods.blocks * block), jnp.float32),
        scratch_shapes=[pltpu.VMEM((block, inner.size), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="ssvq_matmul",
    )(_Operands(*arrays))
    return products[: x.shape[0], :columns]


class _Operands(NamedTuple):
    """What the kernel reads: references; outside, arrays with their block specs."""

    codebook: Any  # see codebook_tables
    unit: Any
    x: Any
    codes: Any
    signs: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One block of x times one tile of W, added to one block of the result."""

    period: Period
    quantizer: SignSplit | Vector
    quads: bool  # four entries of the codebook share a word
    rounded: bool  # decoded weights are bfloat16

    def __call__(self, operands: _Operands, products: Any, weights: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            products[...] = jnp.zeros_like(products)

        width, dim = self.quantizer.code_width, self.quantizer.dim
        codes = functools.cache(lambda byte: operands.codes[byte].astype(jnp.int32))
        signs = functools.cache(lambda byte: operands.signs[byte].astype(jnp.int32))
        for number in range(self.period.codes):
            code = _bits(codes, number * width, width)
            words = self._look_up(operands.codebook, code)
            for coordinate in range(dim):
                value = self._entry(words, coordinate) * operands.unit[0]
                column = number * dim + coordinate
                if operands.signs is not None:
                    value = jnp.where(_bits(signs, column, 1) == 1, -value, value)
                # Mosaic stores with a stride where the lanes are exactly 128.
                place = pl.ds(column, code.shape[0], stride=self.period.columns)
                weights[place, :] = value
        tile = weights[...]
        if operands.scale is not None:
            tile = tile * jnp.broadcast_to(operands.scale[...], tile.shape)
        if self.rounded:
            tile = tile.astype(jnp.bfloat16)
        products[...] += lax.dot_general(
            operands.x[...],
            tile.astype(operands.x.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def _look_up(self, tables: Any, code: Int32[Array, "t r"]) -> list[Int32[Array, "t r"]]:
        """The codewords' words."""
        count = -(-self.quantizer.dim // 4) if self.quads else self.quantizer.dim
        words = []
        for word in range(count):
            found = jnp.zeros_like(code)
            for first in range(0, self.quantizer.codewords, LANES):
                table = tables[pl.ds(first // LANES * count + word, 1), :]
                there = jnp.take_along_axis(
                    jnp.broadcast_to(table, code.shape),
                    code & (LANES - 1),
                    axis=1,
                    mode="promise_in_bounds",
                )
                found = jnp.where(code >= first, there, found)
            words.append(found)
        return words

    def _entry(self, words: list[Int32[Array, "t r"]], coordinate: int) -> Float32[Array, "t r"]:
        """One coordinate of the codewords."""
        if not self.quads:
            return lax.bitcast_convert_type(words[coordinate], jnp.float32)
        word, byte = words[coordinate // 4], coordinate % 4
        level = lax.shift_right_arithmetic(word << (24 - 8 * byte), jnp.full_like(word, 24))
        return level.astype(jnp.float32)


def _bits(
    plane: Callable[[int], Int32[Array, "t r"]], start: int, width: int
) -> Int32[Array, "t r"]:
    """Up to eight bits of every period and row, from one or two planes of bytes."""
    first, offset = divmod(start, 8)
    value = plane(first) >> offset
    if offset + width > 8:
        value = value | plane(first + 1) << (8 - offset)
    return value & (2**width - 1)
