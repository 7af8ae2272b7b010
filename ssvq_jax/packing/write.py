"""Writing a packed model to a file."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from ssvq_jax import tree
from ssvq_jax.atomic import replace_file
from ssvq_jax.entries import Entry
from ssvq_jax.packing import entropy
from ssvq_jax.packing.container import write_container
from ssvq_jax.packing.header import (
    CHECKSUM,
    HEADER,
    Header,
    header_to_text,
    start_checksum,
)
from ssvq_jax.packing.segments import STATE, make_layout
from ssvq_jax.packing.structure import describe
from ssvq_jax.plan import Packed
from ssvq_jax.problems import raise_together
from ssvq_jax.quantizers.streams import check_streams, unpack_fields
from ssvq_jax.tree import LeafSpec, PyTree, foreign_byte_order

Codec = Literal["plain", "entropy"]


def save(
    path: str | Path,
    packed: Packed,
    *,
    codec: Codec = "plain",
    state: PyTree = None,
    model: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a packed model to one ``.safetensors`` file, whole or not at all.

    The format is described in ``docs/format.md``.

    Args:
        path: the file; what is there is replaced once the new file is complete.
        packed: what `Plan.finalize` gave.
        codec: ``plain``, or ``entropy`` to code codes, signs and levels by their frequencies, leaf
            by leaf, where that is smaller.
        state: arrays that belong to the model and are no parameters, e.g. batch statistics: any
            tree; kept as they are.
        model: what the model is, as JSON values, for whoever loads it.
        metrics: figures that were measured with it, as JSON values.

    Raises:
        ValueError: for an unknown codec, a dtype that the file cannot hold, or a model or metrics
            that JSON cannot hold.
        OSError: if the file cannot be written.

    Example:
        >>> import jax, tempfile
        >>> from ssvq_jax import SignSplit, load, make_plan
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> plan = make_plan(params, [("kernel", SignSplit(codewords=4, dim=8))])
        >>> packed = plan.finalize(plan.init(jax.random.key(1), params))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/model.safetensors", packed)
        ...     load(folder + "/model.safetensors").decode()["kernel"].shape
        (64, 64)
    """
    if codec not in get_args(Codec):
        raise ValueError(f"codec={codec!r}: choose one of {get_args(Codec)}")
    told = {name: _as_json(name, given) for name, given in (("model", model), ("metrics", metrics))}
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file in it, e.g. {path}/model.safetensors")
    plan = packed.plan
    dense = tree.leaves_by_path(packed.params)
    contents: dict[str, dict[str, np.ndarray]] = {}
    coded: dict[str, dict[str, int]] = {}
    for entry in plan.entries:
        contents[entry.name] = dict(packed.streams[entry.name])
        try:
            check_streams(entry.quantizer, contents[entry.name], entry.nameless)
        except ValueError as error:
            raise ValueError(f"'{entry.name}' cannot be saved: {error}") from None
        if codec == "entropy":
            found = _coded(entry, contents[entry.name])
            contents[entry.name] |= found
            if found:
                coded[entry.name] = {field: part.size for field, part in found.items()}
    stored = {name: leaf.dtype.name for name, leaf in dense.items()}
    others = {STATE + name: np.asarray(x) for name, x in tree.leaves_by_path(state).items()}
    raise_together(
        [f"{name} {reason}" for name, x in others.items() if (reason := foreign_byte_order(x))]
    )
    taken = others.keys() & ({leaf.path for leaf in plan.leaves} | set(contents))
    if taken:
        raise ValueError(f"names that begin with '{STATE}' are the state's: rename {taken}")
    specs = [LeafSpec(name.removeprefix(STATE), x.shape, x.dtype) for name, x in others.items()]
    layout = make_layout(plan, stored, coded, specs)
    whole = dense | others
    parts: dict[str, list[np.ndarray]] = {name: [] for name in layout.tensors}
    checksums = {}
    for owner, segments in layout.segments.items():
        sums = start_checksum(owner)
        for segment in segments:
            stream = segment.stream
            part = whole[owner] if stream is None else contents[owner][stream.field]
            part = np.ascontiguousarray(part).reshape(-1)
            parts[segment.tensor].append(part)
            sums = zlib.crc32(part.view(np.uint8).data, sums)
        checksums[owner] = sums
    state_structure = describe(state)
    if isinstance(state_structure, dict) and "other" in state_structure:
        raise ValueError(
            f"the state has nodes of type {state_structure['other']}: give dictionaries, lists and "
            "tuples of arrays"
        )
    structure = describe(tree.fill(packed.params, dict.fromkeys(plan.compressed, 0)))
    header = Header(
        plan=plan,
        structure=structure,
        stored=stored,
        checksums=checksums,
        coded=coded,
        state=tuple(specs),
        state_structure=state_structure,
        model=told["model"],
        metrics=told["metrics"],
    )
    text = header_to_text(header)
    tensors = {name: np.concatenate(found) for name, found in parts.items()}
    texts = {HEADER: text, CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}
    replace_file(path, lambda new: write_container(new, tensors, texts))


def _as_json(name: str, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """Model or metrics as JSON gives them back."""
    if not isinstance(told, Mapping | None):
        raise ValueError(f"{name} must be a mapping to JSON values, not {told!r}")
    found = {}
    for key, value in (told or {}).items():
        value = value.item() if isinstance(value, np.generic) else value
        try:
            if not isinstance(key, str):
                raise TypeError("its name is no string")
            found[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}: {key!r} is no JSON value ({error})") from None
    return found


def _coded(entry: Entry, streams: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields that coding makes smaller."""
    numbers = _unpack(entry.quantizer, streams, entry.nameless)
    found = {}
    for stream in entry.storage.streams:
        if stream.values is not None:
            field = np.asarray(numbers[stream.field])
            told = len(entry.name) + len(stream.field) + 32  # in the header
            part = entropy.code(field, stream.values, stream.bytes - told)
            if part is not None:
                found[stream.field] = np.frombuffer(part, np.uint8)
    return found


_unpack = jax.jit(unpack_fields, static_argnums=(0, 2))
