"""What a packed file says of itself: version, plan, structure, checksums, model and metrics."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ssvq_jax.entries import bind_rules, match_rules
from ssvq_jax.packing.errors import PackedFileError
from ssvq_jax.packing.segments import DTYPES, STATE
from ssvq_jax.packing.structure import Structure
from ssvq_jax.plan import Plan
from ssvq_jax.recipe import recipe_from_json, recipe_to_json
from ssvq_jax.tree import LeafSpec

VERSION = 1


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


def header_to_text(header: Header) -> str:
    """Writes a header as JSON; a row a leaf: path, shape, rule, dtype, stored dtype, checksum."""
    plan = header.plan
    rules = list(plan.recipe)
    chosen = match_rules(plan.recipe, {leaf.path: leaf for leaf in plan.leaves})
    dtypes = sorted({leaf.dtype.name for leaf in plan.leaves} | set(header.stored.values()))
    rows = []
    for leaf in plan.leaves:
        stored = header.stored.get(leaf.path, leaf.dtype.name)
        row = [leaf.path, list(leaf.shape), rules.index(chosen[leaf.path])]
        row += [dtypes.index(leaf.dtype.name), dtypes.index(stored)]
        rows.append([*row, header.checksums.get(leaf.path, 0)])
    shares = {entry.name for entry in plan.entries} - set(chosen)
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise PackedFileError(f"its header does not hold together: {error}") from error


def _read(data: Mapping[str, Any]) -> Header:
    recipe = recipe_from_json(data["recipe"])
    dtypes = data["dtypes"]
    for dtype in dtypes:
        if dtype not in DTYPES or not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise PackedFileError(f"its header names a dtype {dtype!r}")
    specs, chosen, stored, sums = {}, {}, {}, {}
    for path, shape, rule, dtype, stored_as, checksum in data["leaves"]:
        for number in (*shape, rule, dtype, stored_as, checksum):
            _check_count(f"leaf '{path}'", number)
        if not isinstance(path, str) or path in specs:
            raise PackedFileError(f"its header has leaf {path!r} twice, or no name for it")
        specs[path] = LeafSpec(path, tuple(shape), dtypes[dtype])
        # By number, not by pattern: a file must not be able to make us match for hours.
        chosen[path] = recipe[rule]
        sums[path] = checksum
        if recipe[rule].quantizer is None:
            stored[path] = dtypes[stored_as]
    leaves, entries = bind_rules(chosen, specs)
    plan = Plan(recipe, leaves, entries)
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
        for number in (*shape, checksum):
            _check_count(f"state '{path}'", number)
        if not isinstance(path, str) or dtype not in DTYPES or STATE + path in sums:
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
    if type(number) is not int or number < 0:
        raise PackedFileError(f"its header has {number!r} where {what} needs a count")
