"""What a packed file says of itself: version, plan, structure, checksums, model and metrics."""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssvq_jax.entries import SharedEntry, bind_rules
from ssvq_jax.packing.container import is_text
from ssvq_jax.packing.errors import PackedFileError
from ssvq_jax.packing.segments import DTYPES, STATE
from ssvq_jax.packing.structure import Structure
from ssvq_jax.plan import Plan
from ssvq_jax.quantizers.base import MOST_AXES
from ssvq_jax.recipe import recipe_from_json, recipe_to_json
from ssvq_jax.tree import LeafSpec

VERSION = 1
HEADER, CHECKSUM = "ssvq_jax", "ssvq_jax_crc32"  # texts of the safetensors header


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a packed file.

    Attributes:
        plan: what is compressed how.
        structure: of the parameter tree.
        stored: dtype that each dense leaf is stored in, by leaf path.
        checksums: CRC-32 of the bytes of entries, dense leaves and state, by owner.
        coded: bytes of entropy-coded fields, by entry and field.
        state: arrays of the model's other collections.
        state_structure: the structure of their tree.
        model: what the model is, as JSON values; empty if nobody said.
        metrics: figures that were measured with it, as JSON values.
    """

    plan: Plan
    structure: Structure
    stored: Mapping[str, str]
    checksums: Mapping[str, int]
    coded: Mapping[str, Mapping[str, int]]
    state: tuple[LeafSpec, ...]
    state_structure: Structure
    model: Mapping[str, Any]
    metrics: Mapping[str, Any]


def start_checksum(owner: str) -> int:
    """What a checksum begins with: contents under another name are no longer right."""
    return zlib.crc32(owner.encode())


def header_to_text(header: Header) -> str:
    """Writes a header as JSON; a row a leaf: path, shape, rule, dtype, stored dtype, checksum."""
    plan = header.plan
    rules = _rules(plan)
    dtypes = sorted({leaf.dtype.name for leaf in plan.leaves} | set(header.stored.values()))
    rows = []
    for leaf in plan.leaves:
        stored = header.stored.get(leaf.path, leaf.dtype.name)
        row = [leaf.path, list(leaf.shape), rules[leaf.path]]
        row += [dtypes.index(leaf.dtype.name), dtypes.index(stored)]
        rows.append([*row, header.checksums.get(leaf.path, 0)])
    shares = {entry.name for entry in plan.entries} - set(rules)
    state = [
        [leaf.path, list(leaf.shape), leaf.dtype.name, header.checksums[STATE + leaf.path]]
        for leaf in header.state
    ]
    data = {
        "version": VERSION,
        "recipe": recipe_to_json(plan.recipe),
        "dtypes": dtypes,
        "leaves": rows,
        "shares": {name: header.checksums[name] for name in sorted(shares)},
        "structure": header.structure,
        "coded": header.coded,
        "state": state,
        "state_structure": header.state_structure,
        "model": header.model,
        "metrics": header.metrics,
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def header_from_text(text: str) -> Header:
    """Inverts `header_to_text`, and trusts nothing in it.

    Raises:
        PackedFileError: saying what is wrong.
    """
    try:
        data = json.loads(text)
        version = data["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackedFileError(f"its header is no JSON of a packed model ({error!r})") from None
    if version != VERSION:
        raise PackedFileError(
            f"it is of format version {version!r}, and this release reads version {VERSION}: "
            "install the release that wrote it, or a newer one"
        )
    try:
        return _read(data)
    except PackedFileError:
        raise
    except (
        *(ValueError, LookupError, TypeError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        raise PackedFileError(f"its header does not hold together: {error}") from error


def _rules(plan: Plan) -> dict[str, int]:
    """Number of a rule that makes of every leaf what the plan does, by leaf path.

    By what it says, not by its pattern: the plan may be from a file of others.
    """
    numbers: dict[tuple[Any, int, str | None], int] = {}
    for number, rule in enumerate(plan.recipe):
        numbers.setdefault((rule.quantizer, rule.stacked, rule.share), number)
    rules = {leaf.path: numbers.get((None, 0, None), -1) for leaf in plan.leaves}
    for entry in plan.entries:
        for leaf in entry.leaves:
            if isinstance(entry, SharedEntry):
                quantizer = dataclasses.replace(entry.quantizer, axis=entry.axis)
                rules[leaf.path] = numbers[quantizer, 0, entry.name]
            else:
                rules[leaf.path] = numbers[entry.quantizer, leaf.stacked, None]
    return rules


def _read(data: Mapping[str, Any]) -> Header:
    recipe = recipe_from_json(data["recipe"])
    dtypes = data["dtypes"]
    for dtype in dtypes:
        if dtype not in DTYPES or not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise PackedFileError(f"its header names a dtype {dtype!r}")
        if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
            raise PackedFileError(f"it holds {dtype} leaves: enable jax_enable_x64 to read them")
    specs, chosen, stored, sums = {}, {}, {}, {}
    for path, shape, rule, dtype, stored_as, checksum in data["leaves"]:
        for number in (rule, dtype, stored_as, checksum):
            _check_count(f"leaf '{path}'", number)
        _check_shape(f"leaf '{path}'", shape)
        if not is_text(path) or path in specs:
            raise PackedFileError(f"its header has leaf {path!r} twice, or no name for it")
        specs[path] = LeafSpec(path, tuple(shape), dtypes[dtype])
        # By number, not by pattern: a file must not be able to make us match for hours.
        chosen[path] = recipe[rule]
        sums[path] = checksum
        if recipe[rule].quantizer is None:
            stored[path] = dtypes[stored_as]
    leaves, entries = bind_rules(chosen, specs)
    plan = Plan(recipe, leaves, entries)
    hash(plan)  # as compiled code needs it
    for share, checksum in data["shares"].items():
        _check_count(f"share '{share}'", checksum)
        sums[share] = checksum
    coded = {name: dict(fields) for name, fields in data["coded"].items()}
    for entry in entries:
        if entry.name not in sums:
            raise PackedFileError(f"its header has no checksum of '{entry.name}'")
        fields = {s.field for s in entry.storage.streams if s.values is not None}
        for field, size in coded.get(entry.name, {}).items():
            _check_count(f"'{entry.name}'", size)
            if field not in fields:
                raise PackedFileError(f"'{entry.name}' has no field {field!r} to be coded")
    if not isinstance(data["model"], dict) or not isinstance(data["metrics"], dict):
        raise PackedFileError("its header names model or metrics that are no mappings")
    state = []
    for path, shape, dtype, checksum in data["state"]:
        _check_count(f"state '{path}'", checksum)
        _check_shape(f"state '{path}'", shape)
        if not is_text(path) or dtype not in DTYPES or STATE + path in sums:
            raise PackedFileError(f"its header has state {path!r} twice, or of dtype {dtype!r}")
        state.append(LeafSpec(path, tuple(shape), dtype))
        sums[STATE + path] = checksum
    return Header(
        plan=plan,
        structure=data["structure"],
        stored=stored,
        checksums=sums,
        coded=coded,
        state=tuple(state),
        state_structure=data["state_structure"],
        model=data["model"],
        metrics=data["metrics"],
    )


def _check_count(what: str, number: Any) -> None:
    if type(number) is not int or not 0 <= number < 2**63:
        raise PackedFileError(f"its header has {str(number)[:60]} where {what} needs a count")


def _check_shape(what: str, shape: Any) -> None:
    if not isinstance(shape, list) or len(shape) > MOST_AXES:
        raise PackedFileError(f"its header has no shape of at most {MOST_AXES} axes for {what}")
    for number in shape:
        _check_count(what, number)
    if math.prod(max(number, 1) for number in shape) >= 2**60:  # of empty leaves, too
        raise PackedFileError(f"its header makes {what} larger than any memory")
