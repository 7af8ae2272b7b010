"""The structure of a parameter tree as JSON, so that a file gives the tree back as it was."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from ssvq_jax.tree import PyTree, leaves_by_path

Structure = dict[str, Any] | str | int | None
NESTED = "nested"  # dictionaries by the parts of the leaf paths

_MOST_DEPTH = 200  # of nested containers in a file


def describe(params: PyTree) -> Structure:
    """Writes the structure of a tree of dictionaries, lists and tuples as plain data.

    Args:
        params: the tree; its leaves are numbered in its order.

    Returns:
        `NESTED` where the leaf paths say it all; else ``{"dict": [[key, structure], ...]}``,
        ``{"list": [...]}``, ``{"tuple": [...]}``, the number of a leaf, None for None, or
        ``{"other": type}`` where the tree has nodes of another kind: it is given back with
        ``like=``.

    Example:
        >>> describe({"layers": {"0": 1.0, "1": 2.0}})
        'nested'
        >>> describe({"layers": {0: 1.0, 1: 2.0}})
        {'dict': [['layers', {'dict': [[0, 0], [1, 1]]}]]}
    """
    treedef = jax.tree.structure(params)
    with contextlib.suppress(ValueError):  # of a leaf whose path lies below another's
        if treedef == jax.tree.structure(_nest(leaves_by_path(params))):
            return NESTED
    try:
        return _describe(jax.tree.unflatten(treedef, list(range(treedef.num_leaves))))
    except _UnknownNodeError as error:
        return {"other": str(error)}


def rebuild(structure: Structure, leaves: Mapping[str, Any]) -> PyTree:
    """Inverts `describe`.

    Args:
        structure: what `describe` gave.
        leaves: the leaves by leaf path, in the tree's order.

    Returns:
        The tree.

    Raises:
        ValueError: if the structure is none, or is not one of so many leaves.

    Example:
        >>> rebuild({"dict": [["kernel", 0]]}, {"kernel": 1.5})
        {'kernel': 1.5}
    """
    paths = {path: path for path in leaves}
    if structure != NESTED:
        tree = _rebuild(structure, list(paths), 0)
    elif any(path.count("/") > _MOST_DEPTH for path in paths):
        raise ValueError(f"the tree is nested deeper than {_MOST_DEPTH}")
    else:
        tree = _nest(paths)
    if leaves_by_path(tree) != paths:
        raise ValueError("the structure of the tree has other leaves than the plan")
    return jax.tree.map(leaves.__getitem__, tree)


def in_structure_of(like: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Puts leaves by leaf path into the structure of another tree.

    Raises:
        ValueError: naming a leaf that only one of the two has.
    """
    paths = leaves_by_path(like)
    different = sorted(set(paths) ^ set(leaves))
    if different:
        path = different[0]
        where = "the file" if path in leaves else "like="
        raise ValueError(f"leaf '{path}' is only in {where}: give like= a tree of this model")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in paths])


def _nest(leaves: Mapping[str, Any]) -> PyTree:
    try:
        nested = unflatten_dict(dict(leaves), sep="/")
    except (TypeError, AttributeError):
        nested = None
    if nested is None or len(leaves_by_path(nested)) != len(leaves):
        raise ValueError("a leaf lies below another leaf")
    return nested


class _UnknownNodeError(Exception):
    """A node of a kind that JSON does not give back."""


def _describe(node: Any) -> Structure:
    kind = type(node)
    if node is None or kind is int:
        return node
    if kind is dict and all(type(key) in (str, int) for key in node):
        return {"dict": [[key, _describe(value)] for key, value in node.items()]}
    if kind in (list, tuple):
        return {kind.__name__: [_describe(value) for value in node]}
    raise _UnknownNodeError(f"{kind.__module__}.{kind.__qualname__}")


def _rebuild(structure: Any, leaves: list[str], depth: int) -> Any:
    if depth > _MOST_DEPTH:
        raise ValueError(f"the tree is nested deeper than {_MOST_DEPTH}")
    if structure is None:
        return None
    if type(structure) is int and 0 <= structure < len(leaves):
        return leaves[structure]
    match structure:
        case {"dict": [*items], **rest} if not rest:
            pairs = [item for item in items if isinstance(item, list) and len(item) == 2]
            keys = [key for key, _ in pairs if type(key) in (str, int)]
            if len(keys) == len(items) == len(set(keys)):
                return {key: _rebuild(sub, leaves, depth + 1) for key, sub in pairs}
        case {"list": [*items], **rest} if not rest:
            return [_rebuild(item, leaves, depth + 1) for item in items]
        case {"tuple": [*items], **rest} if not rest:
            return tuple(_rebuild(item, leaves, depth + 1) for item in items)
    raise ValueError(f"the structure of the tree has a part {str(structure)[:60]}")
