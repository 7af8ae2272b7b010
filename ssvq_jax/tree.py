"""Leaf paths, leaf descriptions, and the split and join of collections.

A plan addresses weights by *leaf path*: the key path of a leaf in its pytree, joined by slashes.
The structure of the user's tree is never rebuilt by hand: compressed leaves are punched out of it
(``None`` stays in their place, which JAX treats as an empty subtree) and filled in again.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssvq_jax.problems import raise_together

PyTree = Any
Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What is known of a weight without its values.

    Attributes:
        path: leaf path, e.g. ``blocks_0/attn/qkv/kernel``.
        shape: shape of the whole leaf, stacked axes included.
        dtype: dtype of the leaf, and of the decoded weight.
        stacked: how many leading axes stack independent weights (layers under ``nn.scan``,
            experts); each slice is quantized on its own.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any  # given as anything jnp.dtype reads, kept as a numpy dtype
    stacked: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if not 0 <= self.stacked <= len(self.shape):
            raise ValueError(
                f"leaf '{self.path}' of shape {self.shape}: stacked={self.stacked} leading axes "
                f"is not between 0 and {len(self.shape)}"
            )

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def slices(self) -> int:
        """Number of independent weights stacked in the leaf."""
        return math.prod(self.shape[: self.stacked])

    def slice_spec(self) -> "LeafSpec":
        """Describes one slice of a stacked leaf (the leaf itself when nothing is stacked)."""
        return dataclasses.replace(self, shape=self.shape[self.stacked :], stacked=0)


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """Joins a JAX key path with slashes.

    Example:
        >>> [leaf_path(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": [1.0, {"b": 2.0}]})]
        ['a/0', 'a/1/b']
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """Lists the leaves of a tree under their paths, in the tree's order.

    Args:
        tree: any pytree.

    Returns:
        A dictionary from leaf path to leaf.

    Raises:
        ValueError: if two leaves share one path.
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = leaf_path(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves have the path '{path}': rename one of the keys "
                "(a key that contains '/' can collide with a nested one)"
            )
        leaves[path] = leaf
    return leaves


def leaf_specs(tree: PyTree) -> dict[str, LeafSpec]:
    """Describes every leaf of a tree of float arrays or of ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: if two leaves share one path, or naming every leaf that is not an array of
            floats in a dtype that JAX computes in.
    """
    leaves = leaves_by_path(tree)
    problems = [f"leaf '{path}' {reason}" for path, x in leaves.items() if (reason := _misfit(x))]
    raise_together(problems)
    return {path: LeafSpec(path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()}


def _misfit(leaf: Any) -> str | None:
    """Why a leaf cannot be taken; None if it can."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return (
            f"is a {type(leaf).__name__}, not an array: give the arrays alone, "
            "e.g. equinox.partition(model, equinox.is_inexact_array)[0]"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return (
            f"has dtype {leaf.dtype}, but only float leaves can be trained or compressed: "
            "keep it outside the tree, e.g. nnx.split(model, nnx.Param, ...)"
        )
    if foreign := foreign_byte_order(leaf):
        return foreign
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return (
            f"has dtype {leaf.dtype}, but JAX computes in 32 bits: convert the "
            "tree with jax.tree.map(jnp.asarray, params), or enable jax_enable_x64"
        )
    return None


def foreign_byte_order(leaf: Any) -> str | None:
    """Says how to convert an array whose bytes are in the order of another processor.

    Files of HDF5, FITS and old TensorFlow give such arrays, which JAX cannot take.

    Returns:
        What is wrong with it, for a message that names it; None if nothing is.

    Example:
        >>> import numpy as np
        >>> foreign_byte_order(np.zeros(2)) is None
        True
    """
    if getattr(leaf.dtype, "isnative", True):
        return None
    return (
        f"has dtype {leaf.dtype.str}, whose byte order is not this machine's: convert it with "
        "x.astype(x.dtype.newbyteorder('='))"
    )


def punch(tree: PyTree, paths: Collection[str]) -> PyTree:
    """Puts ``None`` in the place of the leaves at ``paths``."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: None if leaf_path(key_path) in paths else leaf, tree
    )


def fill(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Puts ``leaves`` back into the holes that `punch` left.

    Example:
        >>> holed = punch({"kernel": 1.0, "bias": 2.0}, {"kernel"})
        >>> holed
        {'bias': 2.0, 'kernel': None}
        >>> fill(holed, {"kernel": 3.0})
        {'bias': 2.0, 'kernel': 3.0}
    """
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: leaves.get(leaf_path(key_path)) if leaf is None else leaf,
        tree,
        is_leaf=lambda node: node is None,
    )


def split(variables: Variables) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts variables into what gradients train and what they do not.

    Args:
        variables: the collections ``params``, ``vq`` and ``vq_state`` of a plan.

    Returns:
        ``learned`` (``params`` and ``vq``) and ``fixed`` (``vq_state``); ``learned | fixed`` joins
        them again.

    Raises:
        ValueError: if a collection is missing.

    Example:
        >>> learned, fixed = split({"params": {}, "vq": {}, "vq_state": {}})
        >>> sorted(learned), sorted(fixed)
        (['params', 'vq'], ['vq_state'])
    """
    missing = {"params", "vq", "vq_state"} - set(variables)
    if missing:
        raise ValueError(
            f"variables lack the collections {sorted(missing)}: give what Plan.init returned"
        )
    return (
        {"params": variables["params"], "vq": variables["vq"]},
        {"vq_state": variables["vq_state"]},
    )
