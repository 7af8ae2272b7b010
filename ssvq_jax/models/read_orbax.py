"""Orbax checkpoints as people write them: of variables, of training states, of managers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

_STEP = re.compile(r"(?:.*_)?\d+")  # folders of a checkpoint manager: 100, step_100, 00000100
_COLLECTIONS = ("params", "batch_stats")


def read_orbax(folder: Path) -> Any:
    """Reads parameters and batch statistics, whatever lies beside them.

    Args:
        folder: a checkpoint, the folder of an item in it (``default``), or the folder of a
            checkpoint manager that holds one step.

    Returns:
        The tree; of a training state only ``params`` and ``batch_stats``.

    Raises:
        ValueError: if there is no checkpoint, or several; it says which folders to give.
    """
    import orbax.checkpoint as ocp

    place = _find(folder)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(place.absolute())
        part, variables = _choose(metadata.item_metadata.tree, place)
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # whatever wrote them
        on_device = ocp.ArrayRestoreArgs(sharding=where)
        how = jax.tree.map(
            lambda leaf: on_device if _is_array(leaf) else ocp.RestoreArgs(), variables
        )
        options = ocp.args.PyTreeRestore(
            item=_wrap(variables, part), restore_args=_wrap(how, part), partial_restore=True
        )
        found: Any = checkpointer.restore(place.absolute(), args=options)
    for name in part:
        found = found[name]
    arrays = jax.tree.map(_as_array, variables, found)
    if not jax.tree.leaves(arrays):
        raise ValueError(f"{place} holds no arrays")
    return arrays


def _find(folder: Path) -> Path:
    """The folder that holds one tree of arrays."""
    if _holds_tree(folder):
        return folder
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    items = [path for path in inner if _holds_tree(path)]
    steps = [path for path in inner if _STEP.fullmatch(path.name)]
    if len(items) == 1 or (not items and len(steps) == 1):
        return _find((items or steps)[0])
    if items or steps:
        names = ", ".join(path.name for path in items or steps)
        what = "trees" if items else "checkpoints of the steps"
        raise ValueError(f"it has {what} {names}: give one of these folders")
    raise ValueError("it is no orbax checkpoint, and holds none")


def _holds_tree(folder: Path) -> bool:
    return (folder / "_METADATA").is_file()


def _choose(tree: Any, place: Path) -> tuple[tuple[str, ...], Any]:
    """Finds the part of a checkpoint that has the collections of a model, and these."""
    found = _parts(tree)
    if not isinstance(tree, Mapping):
        return (), tree
    if not found:  # parameters alone, perhaps with the number of the step beside them
        return (), {name: part for name, part in tree.items() if not _is_integer(part)}
    depth = min(map(len, found))
    nearest = [part for part in found if len(part) == depth]
    if len(nearest) > 1:
        names = ", ".join("/".join(part) for part in nearest)
        raise ValueError(
            f"{place} has parameters in several parts, {names}: save the one you mean by itself"
        )
    for name in nearest[0]:
        tree = tree[name]
    return nearest[0], {name: tree[name] for name in _COLLECTIONS if tree.get(name) is not None}


def _parts(tree: Any, where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a tree has parameters, each as the names that lead to it."""
    if not isinstance(tree, Mapping):
        return []
    if "params" in tree:
        return [where]
    return [part for name in tree for part in _parts(tree[name], (*where, name))]


def _wrap(tree: Any, part: tuple[str, ...]) -> Any:
    for name in reversed(part):
        tree = {name: tree}
    return tree


def _is_array(leaf: Any) -> bool:
    from orbax.checkpoint.metadata import ArrayMetadata

    return type(leaf) is ArrayMetadata  # numbers have a type derived from it


def _is_integer(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and leaf.shape == () and jax.numpy.issubdtype(leaf.dtype, int)


def _as_array(metadata: Any, leaf: Any) -> Any:
    """Makes arrays of numbers; leaves texts out."""
    if isinstance(leaf, jax.Array):
        return leaf
    return np.asarray(leaf, metadata.dtype) if hasattr(metadata, "dtype") else None
