"""The compressed matrix product as a Pallas kernel for NVIDIA GPUs, by way of Triton.

GPUs load from any address, so every program finds the bytes and codewords of a tile of W itself
and multiplies it with a block of x. Streams are read as they are stored.

The tests interpret and lower the kernel; it has not run on a GPU so far.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Float32, Int32

from ssvq_jax.inference.packed_leaf import PackedLeaf
from ssvq_jax.quantizers import SignSplit, Vector

_BATCH, _COLUMNS, _ROWS = 64, 64, 32  # of a block: powers of two, 16 at least


def gpu_matmul(
    x: Float[Array, "m in"], leaf: PackedLeaf, *, interpret: bool = False
) -> Float32[Array, "m out"]:
    """Multiplies by a packed weight, with the arguments and the result of `tpu_matmul`."""
    quantizer = leaf.quantizer
    assert isinstance(quantizer, SignSplit | Vector)
    rows, columns = leaf.spec.shape
    streams = {name: s for name, s in leaf.streams.items() if name != "codebook_scale"}
    streams["codebook"] = quantizer.codebook_unpack(leaf.streams)["codebook"]
    streams["codes"] = jnp.pad(streams["codes"], (0, 1))  # of the last code, two bytes are read
    return pl.pallas_call(
        _Kernel(quantizer, (x.shape[0], rows, columns), leaf.spec.dtype),
        grid=(-(-x.shape[0] // _BATCH), -(-columns // _COLUMNS)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="ssvq_matmul",
    )(x, streams)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One block of the result."""

    quantizer: SignSplit | Vector
    shape: tuple[int, int, int]  # rows of x, rows and columns of W
    dtype: Any

    def __call__(self, x: Any, streams: Mapping[str, Any], products: Any) -> None:
        batch, rows, columns = self.shape
        i = (pl.program_id(0) * _BATCH + jnp.arange(_BATCH))[:, None]
        j = (pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS))[None, :]

        def add(step: Int32[Array, ""], total: Float32[Array, "m n"]) -> Float32[Array, "m n"]:
            k = step * _ROWS + jnp.arange(_ROWS)
            across, down = k[None, :], k[:, None]
            part = triton.load(x.at[i, across], mask=(i < batch) & (across < rows), other=0.0)
            weights = self._weights(streams, down, j, (down < rows) & (j < columns))
            weights = weights.astype(part.dtype)
            return total + jnp.matmul(part, weights, preferred_element_type=jnp.float32)

        start = jnp.zeros((_BATCH, _COLUMNS), jnp.float32)
        total = lax.fori_loop(0, -(-rows // _ROWS), add, start)
        triton.store(products.at[i, j], total, mask=(i < batch) & (j < columns))

    def _weights(
        self,
        streams: Mapping[str, Any],
        k: Int32[Array, "r 1"],
        j: Int32[Array, "1 n"],
        real: Bool[Array, "r n"],
    ) -> Float[Array, "r n"]:
        """Decodes rows k and columns j of W."""
        width, dim = self.quantizer.code_width, self.quantizer.dim
        columns = self.shape[2]

        def byte(name: str, at: Int32[Array, "r n"]) -> Int32[Array, "r n"]:
            return triton.load(streams[name].at[at], mask=real, other=0).astype(jnp.int32)

        bit = (k * (columns // dim) + j // dim) * width
        code = byte("codes", bit // 8) | byte("codes", bit // 8 + 1) << 8
        code = code >> bit % 8 & (2**width - 1)
        place = streams["codebook"].at[code, jnp.broadcast_to(j % dim, code.shape)]
        weights = triton.load(place, mask=real, other=0.0)
        if "signs" in streams:
            at = k * columns + j
            weights = jnp.where(byte("signs", at // 8) >> at % 8 & 1 == 1, -weights, weights)
        if "scale" in streams:
            channel = jnp.broadcast_to(j if self.quantizer.channel_axis % 2 else k, real.shape)
            scale = triton.load(streams["scale"].at[channel], mask=real, other=0.0)
            weights = weights * scale.astype(jnp.float32)
        return weights.astype(self.dtype)
