"""Orbax checkpoints as people write them: of variables, of training states, of managers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

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
        tree = metadata.item_metadata.tree
        part, variables = _find_variables(tree)
        wanted = _only_arrays(variables)
        if not jax.tree.leaves(wanted):
            raise ValueError(f"{place} holds no arrays")
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # whatever wrote them
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
        template = template if part is None else {part: template}
        how = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=where), template)
        options = ocp.args.PyTreeRestore(item=template, restore_args=how, partial_restore=True)
        found: Any = checkpointer.restore(place.absolute(), args=options)
    return found if part is None else found[part]


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


def _find_variables(tree: Any) -> tuple[str | None, Any]:
    """The collections of a model, and the name of the part of the tree that has them."""
    if not isinstance(tree, Mapping):
        return None, tree
    parts: dict[str | None, Any] = {None: tree, **tree}
    found = {
        name: {key: part[key] for key in _COLLECTIONS if part.get(key) is not None}
        for name, part in parts.items()
        if isinstance(part, Mapping) and "params" in part
    }
    if None in found:
        return None, found[None]
    return next(iter(found.items())) if len(found) == 1 else (None, tree)


def _only_arrays(tree: Any) -> Any:
    """Leaves numbers and texts out."""
    if isinstance(tree, Mapping):
        kept = {name: _only_arrays(part) for name, part in tree.items()}
        return {name: part for name, part in kept.items() if part is not None}
    if isinstance(tree, list | tuple):
        return [part for part in map(_only_arrays, tree) if part is not None]
    from orbax.checkpoint.metadata import ArrayMetadata

    return tree if type(tree) is ArrayMetadata else None  # numbers have a type derived from it
