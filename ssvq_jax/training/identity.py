"""Whether a checkpoint or folder is of the run that is asked for."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssvq_jax.plan import Plan
from ssvq_jax.tree import PyTree

_MOST = 200  # characters of a value in a message


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Says where two nested dictionaries of JSON values differ.

    Example:
        >>> differences({"rates": {"dense": 1, "sign": 2}}, {"rates": {"dense": 3, "sign": 2}})
        ['rates.dense: 1 there, 3 now']
    """
    old, new = _flat(there), _flat(json.loads(json.dumps(here)))
    return [
        f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    """Joins the keys of nested dictionaries by dots."""
    if not isinstance(data, Mapping):
        return {name: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat


def checksum(tree: PyTree) -> str:
    """CRC-32 of all bytes of a tree of arrays, in hexadecimal.

    Example:
        >>> checksum({"bias": jnp.zeros(2)})
        '6522df69'
    """
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return f"{value:08x}"


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(plan.to_json()))


def check_plan(checkpoint: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError, saying what differs, unless two plans, as JSON, are one."""
    if stored == wanted:
        return
    if stored.get("recipe") != wanted["recipe"]:
        what = f"the recipe {stored.get('recipe')}, this run {wanted['recipe']}"
    else:
        there, here = ({leaf["path"]: leaf for leaf in x["leaves"]} for x in (stored, wanted))
        path = next(path for path in [*there, *here] if there.get(path) != here.get(path))
        what = f"for leaf '{path}' {there.get(path)}, this run {here.get(path)}"
    raise ValueError(f"{checkpoint} is of another plan: it has {what}; resume with the same recipe")


def check_leaf(checkpoint: str, name: str, wanted: jax.ShapeDtypeStruct, stored: Any) -> None:
    """Orbax would cast and cut silently."""
    if stored is None:
        raise ValueError(
            f"{checkpoint} lacks the leaf '{name}': it was saved with another model or optimizer"
        )
    if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):  # stored as its words
        wanted = jax.eval_shape(jax.random.key_data, wanted)
    there, here = (f"{jnp.dtype(x.dtype).name}{list(x.shape)}" for x in (stored, wanted))
    if there != here:
        raise ValueError(
            f"{checkpoint}: leaf '{name}' is {there} there and {here} in this run: "
            "resume with the options it was saved with"
        )
