"""A training state as leaves by name, the way orbax stores it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssvq_jax.tree import PyTree, leaves_by_path


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by name; orbax cannot store empty ones, and reads a dot in a name as a level."""
    return {
        path.replace("%", "%25").replace(".", "%2E"): leaf
        for path, leaf in leaves_by_path(tree).items()
        if leaf.size
    }


def leaf_name(name: str) -> str:
    """The leaf path that a name stands for."""
    return name.replace("%2E", ".").replace("%25", "%")


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of a leaf."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def fill(template: PyTree, found: Mapping[str, Any]) -> PyTree:
    """Puts what was read in the place of a template's leaves."""
    read = iter(found[name] for name in named_leaves(template))
    return jax.tree.map(
        lambda leaf: next(read) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype), template
    )
