"""Where in a packed file every field lies: one tensor a kind of field, offsets by the plan.

A header entry a field would cost more than small fields themselves. So all codes lie on end in one
tensor, all signs in another, and where an entry's own begin follows from the plan alone; only
entropy-coded fields, whose size no plan tells, have it in the header.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp

from ssvq_jax.plan import Plan
from ssvq_jax.quantizers import Stream
from ssvq_jax.tree import LeafSpec

# safetensors' names of dtypes.
DTYPES = {
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    # Of a model's state only.
    "bool": "BOOL",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
}
CODED = "entropy_coded"
STATE = "state:"  # before the paths of a model's state; no leaf is called so in a tree of its own


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bytes of one field, of one dense leaf, or of one array of the model's state.

    Attributes:
        owner: name of the entry, path of the dense leaf, or `STATE` and the path of an array.
        stream: the field; None for a dense leaf or array.
        tensor: the file's tensor that holds it.
        dtype: dtype of the tensor.
        start: first byte in the tensor.
        size: number of bytes.
    """

    owner: str
    stream: Stream | None
    tensor: str
    dtype: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """All of a file's content.

    Attributes:
        segments: by owner, in the order of the file.
        tensors: dtype and number of elements by tensor.
    """

    segments: Mapping[str, tuple[Segment, ...]]
    tensors: Mapping[str, tuple[str, int]]


def make_layout(
    plan: Plan,
    stored: Mapping[str, str],
    coded: Mapping[str, Mapping[str, int]],
    state: Iterable[LeafSpec],
) -> Layout:
    """Finds the place of every field.

    Args:
        plan: the plan.
        stored: dtype that each dense leaf is stored in, by leaf path.
        coded: bytes of entropy-coded fields, by entry and field.
        state: arrays of the model's state.

    Returns:
        The layout.

    Raises:
        ValueError: naming a leaf whose dtype the file cannot hold.
    """
    filled: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    segments = {}
    for owner, fields in _fields(plan, stored, coded, state):
        placed = []
        for stream, tensor, dtype, size in fields:
            start = filled.get(tensor, 0)
            filled[tensor], dtypes[tensor] = start + size, dtype
            placed.append(Segment(owner, stream, tensor, dtype, start, size))
        segments[owner] = tuple(placed)
    tensors = {}
    for tensor, size in filled.items():
        tensors[tensor] = dtypes[tensor], size // jnp.dtype(dtypes[tensor]).itemsize
    return Layout(segments, tensors)


_Fields = list[tuple[Stream | None, str, str, int]]  # stream, tensor, dtype, bytes


def _fields(
    plan: Plan,
    stored: Mapping[str, str],
    coded: Mapping[str, Mapping[str, int]],
    state: Iterable[LeafSpec],
) -> Iterator[tuple[str, _Fields]]:
    for entry in plan.entries:
        sizes = coded.get(entry.name, {})
        fields: _Fields = []
        for stream in entry.storage.streams:
            if stream.field in sizes:
                fields.append((stream, CODED, "uint8", sizes[stream.field]))
            elif stream.values is not None:
                fields.append((stream, stream.field, "uint8", stream.bytes))
            else:
                tensor = f"{stream.field}.{stream.dtype}"
                fields.append((stream, tensor, stream.dtype, stream.bytes))
        yield entry.name, fields
    for leaf in plan.leaves:
        if leaf.path not in plan.compressed:
            yield leaf.path, [_whole("dense", leaf, stored[leaf.path])]
    for leaf in state:
        yield STATE + leaf.path, [_whole("state", leaf, leaf.dtype.name)]


def _whole(kind: str, leaf: LeafSpec, dtype: str) -> tuple[None, str, str, int]:
    if dtype not in DTYPES:
        raise ValueError(
            f"{kind} leaf '{leaf.path}' is of dtype {dtype}, which the file cannot hold: use one "
            f"of {sorted(DTYPES)}"
        )
    return None, f"{kind}.{dtype}", dtype, leaf.size * jnp.dtype(dtype).itemsize
