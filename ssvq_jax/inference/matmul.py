"""The product of activations with a packed weight that is never rebuilt as a whole."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ssvq_jax.bitstream import unpack_bits
from ssvq_jax.inference.gpu_kernel import gpu_matmul
from ssvq_jax.inference.packed_leaf import PackedLeaf
from ssvq_jax.inference.tpu_kernel import MOST_PERIOD, tpu_matmul
from ssvq_jax.inference.tpu_layout import period_of
from ssvq_jax.quantizers import SignSplit, Uniform, Vector
from ssvq_jax.quantizers.base import Stream
from ssvq_jax.quantizers.codebook import CodebookQuantizer

Implementation = Literal["auto", "xla", "pallas"]

_DTYPES = ("float32", "bfloat16", "float16")
_KERNEL_DTYPES = ("float32", "bfloat16")
_TILE = 1 << 19  # weights that are decoded at once
_ROWS = 256  # of a tile, at least: every tile reads and writes all sums


def matmul(
    x: Float[Array, "*batch in"],
    leaf: PackedLeaf,
    *,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> Float[Array, "*batch out"]:
    """Computes ``x @ leaf.decode().astype(x.dtype)`` without the whole weight in memory.

    Sums are accumulated in float32 and rounded to the dtype of x at the end. This is for inference:
    only ``"xla"`` has gradients, and only for x.

    Args:
        x: float32, bfloat16 or float16, with any leading axes.
        leaf: a packed weight ``[in, out]``.
        implementation: how.

            - ``"xla"`` decodes one tile of rows after the other. It takes all methods, but a weight
              that is not stored row by row (sub-vectors along the first axis, methods of others)
              it decodes as a whole.
            - ``"pallas"`` is a kernel for TPUs (version 4 and later) that decodes on the chip, or
              one for NVIDIA GPUs. They take `SignSplit` and `Vector` with sub-vectors along the
              last axis, not padded, of float32 or bfloat16.
            - ``"auto"`` is the kernel where the program is compiled for a TPU and the kernel takes
              the leaf, and ``"xla"`` everywhere else.
        interpret: with ``"pallas"``, run the kernel for TPUs on any device, slowly, to see what it
            computes.

    Returns:
        The product, in the dtype of x.

    Raises:
        ValueError: naming the leaf, if it is none, stacked or not a matrix, x does not fit it, or
            ``"pallas"`` cannot take it.

    Example:
        >>> from ssvq_jax import LeafSpec, Uniform
        >>> levels = jnp.array([0b00_11_10_11], jnp.uint8)  # less the lowest level, -2
        >>> streams = {"levels": levels, "step": jnp.ones(1, jnp.bfloat16)}
        >>> method = Uniform(bits=2, per_channel=False)
        >>> leaf = PackedLeaf(streams, method, LeafSpec("kernel", (2, 2), "float32"))
        >>> leaf.decode().tolist()
        [[1.0, 0.0], [1.0, -2.0]]
        >>> matmul(jnp.array([[1.0, 10.0]]), leaf).tolist()
        [[11.0, -20.0]]
    """
    _check(x, leaf)
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation={implementation!r}: choose one of {get_args(Implementation)}"
        )
    if interpret and implementation != "pallas":
        raise ValueError(f"interpret=True is for implementation='pallas', not {implementation!r}")
    reason = refusal(x, leaf)
    if reason is not None:
        if implementation == "pallas":
            raise ValueError(
                f"leaf '{leaf.spec.path}' of shape {leaf.spec.shape} is not for "
                f"implementation='pallas': {reason}; use 'xla', or 'auto', which chooses"
            )
        implementation = "xla"
    # Leaves of one shape share compiled code.
    nameless = dataclasses.replace(leaf, spec=dataclasses.replace(leaf.spec, path=""))
    return _matmul(x, nameless, implementation, interpret)


def refusal(x: Float[Array, "*batch in"], leaf: PackedLeaf) -> str | None:
    """Says why the kernels cannot take a leaf ``[in, out]`` or x; None if they can."""
    quantizer, spec = leaf.quantizer, leaf.spec
    if not isinstance(quantizer, SignSplit | Vector):
        return f"its method is '{quantizer.method}', not 'sign_split' or 'vector'"
    layout, width, period = quantizer.layout(spec), quantizer.code_width, period_of(quantizer)
    if layout.axis != 1:
        return f"its sub-vectors run along axis {layout.axis}, not the last one"
    if layout.padding:
        return f"dim={layout.dim} does not divide its {spec.shape[1]} columns"
    if width > 8:
        return f"codewords={quantizer.codewords} are more than 256"
    if period.columns > MOST_PERIOD:
        return (
            f"with dim={layout.dim} and codes of {width} bits, whole bytes begin only every "
            f"{period.columns} columns, more than {MOST_PERIOD}"
        )
    if max(spec.size, layout.count * width) >= 2**31:
        return "it has 2^31 signs or bits of codes, or more"
    if not jax.typeof(x).sharding.mesh.empty:
        return "x is sharded explicitly, or lies within a jax.shard_map"
    for name, dtype in (("it", spec.dtype), ("x", x.dtype)):
        if dtype not in _KERNEL_DTYPES:
            return f"{name} has dtype {dtype}, none of {_KERNEL_DTYPES}"
    return None


def _check(x: Float[Array, "*batch in"], leaf: PackedLeaf) -> None:
    """Raises ValueError, naming the leaf, unless it is a matrix that x can be multiplied with."""
    if not isinstance(leaf, PackedLeaf):
        raise ValueError(
            f"leaf is a {type(leaf).__name__}, not a PackedLeaf of packed_params(...): use x @ w "
            "for arrays; within serve, too, weights are arrays"
        )
    spec = leaf.spec
    if leaf.stacked:
        raise ValueError(
            f"leaf '{spec.path}' still has stacked axes {leaf.stacked}: take one weight at a time, "
            "e.g. with jax.lax.scan or jax.vmap over the leaf"
        )
    if len(spec.shape) != 2:
        raise ValueError(
            f"leaf '{spec.path}' of shape {spec.shape} is no matrix [in, out]: use leaf.decode()"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, but products with leaf '{spec.path}' take {_DTYPES}: convert "
            "it with x.astype"
        )
    if x.ndim == 0 or x.shape[-1] != spec.shape[0]:
        raise ValueError(
            f"x of shape {x.shape} does not fit leaf '{spec.path}' of shape {spec.shape}: the last "
            f"axis of x must have {spec.shape[0]} elements"
        )


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def _matmul(
    x: Float[Array, "*batch in"], leaf: PackedLeaf, implementation: str, interpret: bool
) -> Float[Array, "*batch out"]:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if len(rows) == 0:  # no grid is empty
        product = jnp.zeros((0, leaf.spec.shape[1]), jnp.float32)
    elif interpret:
        product = tpu_matmul(rows, leaf, interpret=True)
    else:
        chosen = {"auto": _auto_matmul, "pallas": _kernel_matmul, "xla": _xla_matmul}
        product = chosen[implementation](rows, leaf)
    return product.astype(x.dtype).reshape(*x.shape[:-1], leaf.spec.shape[1])


# The platform is known when a program is lowered, and may be another than the one it is traced on.
@jax.custom_jvp
def _auto_matmul(x: Float[Array, "m in"], leaf: PackedLeaf) -> Float32[Array, "m out"]:
    return lax.platform_dependent(x, leaf, tpu=tpu_matmul, default=_xla_matmul)


@jax.custom_jvp
def _kernel_matmul(x: Float[Array, "m in"], leaf: PackedLeaf) -> Float32[Array, "m out"]:
    return lax.platform_dependent(x, leaf, cuda=gpu_matmul, default=tpu_matmul)


@_auto_matmul.defjvp
@_kernel_matmul.defjvp
def _no_gradients(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "matmul has gradients with implementation='xla' only, and for x only: train a plan's "
        "variables instead, through Plan.decode"
    )


def _xla_matmul(x: Float[Array, "m in"], leaf: PackedLeaf) -> Float32[Array, "m out"]:
    """Adds up products with tiles of rows of W, one after the other."""
    if not _row_by_row(leaf):
        return _dot(x, leaf.decode())
    rows, columns = leaf.spec.shape
    unit = _aligned_rows(leaf)
    count = -(-rows // max(_ROWS, _TILE // columns))
    size = -(-rows // (count * unit)) * unit
    spec = dataclasses.replace(leaf.spec, shape=(size, columns))
    tile = leaf.quantizer.slice_storage(spec).streams

    # What is appended to W decodes to finite numbers, and to x there are appended zeros.
    shared, cut = {}, {}
    for whole, part in zip(leaf.quantizer.slice_storage(leaf.spec).streams, tile, strict=True):
        array = leaf.streams[part.field]
        if whole.values is None and whole.shape == part.shape:
            shared[part.field] = array
        else:
            cut[part.field] = _parts(array, count, part)
    x_tiles = jnp.pad(x, ((0, 0), (0, count * size - rows)))
    x_tiles = x_tiles.reshape(-1, count, size).swapaxes(0, 1)

    def add(
        total: Float32[Array, "m out"], tiles: tuple[Float[Array, "m r"], dict[str, Array]]
    ) -> tuple[Float32[Array, "m out"], None]:
        x_tile, streams = tiles
        fields = {**shared, **streams}
        for part in tile:
            if part.values is not None:
                field = unpack_bits(fields[part.field], part.slice_count, part.width)
                fields[part.field] = field.astype(part.dtype).reshape(part.shape)
        encoded = leaf.quantizer.unpack(fields, spec)
        return total + _dot(x_tile, leaf.quantizer.decode(*encoded, spec)), None

    # Zeros that lie where the products do, on a mesh and in a shard_map.
    start = _dot(x[:, :0], jnp.zeros((0, columns), jnp.float32))
    return lax.scan(add, start, (x_tiles, cut))[0]


def _row_by_row(leaf: PackedLeaf) -> bool:
    """Whether all that is stored a sub-vector, a weight or a row is in the order of W's rows."""
    if isinstance(leaf.quantizer, CodebookQuantizer):
        return leaf.quantizer.separable and leaf.quantizer.layout(leaf.spec).axis == 1
    return isinstance(leaf.quantizer, Uniform)


def _aligned_rows(leaf: PackedLeaf) -> int:
    """The fewest rows of which all streams have whole bytes: 1, 2, 4 or 8."""
    streams = leaf.quantizer.slice_storage(leaf.spec).streams
    bits = [s.slice_count * s.width // leaf.spec.shape[0] for s in streams if s.values is not None]
    return max(8 // math.gcd(8, n) for n in bits)


def _parts(array: Array, count: int, part: Stream) -> Array:
    """Cuts the stream of a weight into those of its tiles, the last one filled up with zeros."""
    length = part.slice_bytes if part.values is not None else part.shape[0]
    return jnp.pad(array, (0, count * length - array.shape[0])).reshape(count, length)


def _dot(x: Float[Array, "m in"], weight: Float[Array, "in out"]) -> Float32[Array, "m out"]:
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
