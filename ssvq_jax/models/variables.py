"""Variables of a model as leaves by path, and back."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import unflatten_dict


def paths_of(variables: Any) -> dict[str, Any]:
    """Lists the leaves of nested dictionaries under their key paths, joined by slashes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `paths_of`.

    Example:
        >>> nest({"params/head/bias": 1})
        {'params': {'head': {'bias': 1}}}
    """
    return unflatten_dict(leaves, sep="/")
