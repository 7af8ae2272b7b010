"""Plans: a recipe bound to a parameter tree, and everything that is done with the pair."""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key

from ssvq_jax import tree
from ssvq_jax.bits import BitsTable, bits_table
from ssvq_jax.entries import (
    Entry,
    bind_rules,
    check_calibration,
    gather_calibration,
    match_rules,
)
from ssvq_jax.problems import raise_together
from ssvq_jax.progress import bar_over
from ssvq_jax.quantizers import Calibration, Quantizer
from ssvq_jax.quantizers.base import in_range
from ssvq_jax.quantizers.streams import pack_fields, unpack_fields
from ssvq_jax.recipe import Recipe, Rule, as_recipe, recipe_from_json, recipe_to_json
from ssvq_jax.tree import LeafSpec, PyTree, Variables

DENSE_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe bound to a tree: which quantizer compresses which leaf. Made by `make_plan`.

    Plans are hashable and hold no arrays, so jitted functions can close over them.

    Attributes:
        recipe: the rules.
        leaves: every leaf of the tree, in its order.
        entries: what is compressed.
    """

    recipe: Recipe
    leaves: tuple[LeafSpec, ...]
    entries: tuple[Entry, ...]

    @functools.cached_property
    def compressed(self) -> frozenset[str]:
        """Paths of the compressed leaves."""
        return frozenset(leaf.path for entry in self.entries for leaf in entry.leaves)

    def init(
        self,
        key: Key[Array, ""],
        params: PyTree,
        calibration: Mapping[str, Calibration] | None = None,
        *,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Encodes the weights.

        Call it outside of ``jax.jit``: leaves of similar size then share compiled code.

        Args:
            key: typed PRNG key; every entry uses its own, derived from its name.
            params: the tree of float arrays the plan was made for.
            calibration: what data say about leaves, by leaf path; optional, leaf by leaf.
            progress: show a progress bar over the entries.

        Returns:
            The collections: ``params`` (the dense leaves; None in the holes), ``vq`` (floats that
            gradients train) and ``vq_state`` (integers and booleans that they do not), the latter
            two by entry name. Every array is a copy: a step may donate it and leaves ``params``
            as they are.

        Raises:
            ValueError: if the tree is not the plan's, a compressed leaf holds NaN or infinity, or a
                calibration does not fit its leaf.
        """
        arrays = self.matching_leaves(params)
        calibration = dict(calibration or {})
        unknown = sorted(set(calibration) - self.compressed)
        if unknown:
            raise ValueError(f"calibration for {unknown}, which this plan does not compress")
        specs = {leaf.path: leaf for leaf in self.leaves}
        for path, found in calibration.items():
            check_calibration(specs[path], found)
        learned, fixed = {}, {}
        raise_together(
            [
                reason
                for entry in self.entries
                for leaf in entry.leaves
                if (reason := _not_finite(leaf.path, arrays[leaf.path]))
            ]
        )
        for entry in bar_over(self.entries, "encoding") if progress else self.entries:
            found = gather_calibration(entry, calibration)
            entry_key = jax.random.fold_in(key, zlib.crc32(entry.name.encode()))
            try:
                encoded = entry.quantizer.init(entry_key, entry.gather(arrays), entry.spec, found)
            except ValueError as error:
                raise ValueError(f"'{entry.name}' cannot be encoded: {error}") from error
            learned[entry.name] = encoded.learned
            if encoded.fixed:
                fixed[entry.name] = encoded.fixed
        dense = jax.tree.map(_copy, tree.punch(params, self.compressed))
        return {"params": dense, "vq": learned, "vq_state": fixed}

    def decode(self, variables: Variables) -> PyTree:
        """Rebuilds the parameter tree; differentiable in ``params`` and ``vq``, jit-able.

        Args:
            variables: the three collections.

        Returns:
            A tree of the user's structure, shapes and dtypes.

        Raises:
            ValueError: if a collection is missing.
        """
        tree.split(variables)  # names a missing collection
        leaves = {}
        for entry in self.entries:
            encoded = variables["vq"][entry.name], variables["vq_state"].get(entry.name, {})
            leaves |= entry.scatter(entry.quantizer.decode(*encoded, entry.spec))
        return tree.fill(variables["params"], leaves)

    def labels(self, learned: Variables) -> dict[str, Any]:
        """Names the optimizer group of every learned array, for ``optax.partition``.

        Args:
            learned: the collections ``params`` and ``vq``.

        Returns:
            The same tree of strings: ``dense``, ``codebook``, ``sign``, ``scale``, ``latent``.
        """
        groups = {entry.name: entry.quantizer.groups for entry in self.entries}
        return {
            "params": jax.tree.map(lambda _: "dense", learned["params"]),
            "vq": {
                name: {field: groups[name][field] for field in fields}
                for name, fields in learned["vq"].items()
            },
        }

    def finalize(self, variables: Variables, *, dense_dtype: str | None = None) -> "Packed":
        """Turns trained variables into exactly what is stored.

        Args:
            variables: the three collections.
            dense_dtype: what dense leaves are stored in: float32, float16 or bfloat16; by default
                in their own dtype.

        Returns:
            The packed model; it decodes to the very weights that training saw last, but for the
            rounding of dense leaves to another dtype.

        Raises:
            ValueError: if a collection is missing, or a dense leaf does not fit the dtype.
        """
        tree.split(variables)
        streams = {}
        for entry in self.entries:
            encoded = variables["vq"][entry.name], variables["vq_state"].get(entry.name, {})
            fields = entry.quantizer.pack(*encoded, entry.spec)
            streams[entry.name] = pack_fields(entry.quantizer, fields, entry.spec)
        store = functools.partial(_store_dense, dtype=dense_dtype)
        params = jax.tree_util.tree_map_with_path(store, variables["params"])
        return Packed(self, params, streams)

    def bits(self, dense_dtype: str | None = None) -> BitsTable:
        """Counts the stored bits of every leaf; needs no weights.

        Args:
            dense_dtype: what dense leaves are stored in; by default in their own dtype.
        """
        return bits_table(self.entries, self.leaves, self.compressed, dense_dtype)

    def __str__(self) -> str:
        """The bits table as text."""
        return str(self.bits())

    def to_json(self) -> dict[str, Any]:
        """Writes the plan as plain data: the recipe and the leaves it is bound to."""
        leaves = [
            {"path": leaf.path, "shape": list(leaf.shape), "dtype": leaf.dtype.name}
            for leaf in self.leaves
        ]
        return {"recipe": recipe_to_json(self.recipe), "leaves": leaves}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Plan":
        """Reads a plan from plain data.

        Raises:
            ValueError: if the data are not a plan.
        """
        if set(data) != {"recipe", "leaves"}:
            raise ValueError(f"not a plan: it needs 'recipe' and 'leaves', not {sorted(data)}")
        try:
            leaves = [(x["path"], tuple(x["shape"]), x["dtype"]) for x in data["leaves"]]
            specs = {path: LeafSpec(path, shape, dtype) for path, shape, dtype in leaves}
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a plan: a leaf needs path, shape and dtype ({error})") from None
        return _bind(recipe_from_json(data["recipe"]), specs)

    def matching_leaves(self, params: PyTree) -> dict[str, Any]:
        """Lists the leaves of the tree the plan was made for, by leaf path.

        Raises:
            ValueError: naming every leaf that differs, if it is another tree.
        """
        arrays = tree.leaves_by_path(params)
        found = tree.leaf_specs(params)
        problems = []
        for leaf in self.leaves:
            if leaf.path not in found:
                problems.append(f"leaf '{leaf.path}' of the plan is not in the tree")
                continue
            spec = dataclasses.replace(found.pop(leaf.path), stacked=leaf.stacked)
            if spec != leaf:
                problems.append(
                    f"leaf '{leaf.path}' is {spec.dtype}{list(spec.shape)}, but the plan was made "
                    f"for {leaf.dtype}{list(leaf.shape)}: make the plan from this tree"
                )
        if found:
            problems.append(f"leaves {sorted(found)} are not in the plan: make it from this tree")
        raise_together(problems)
        return arrays


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "streams"], meta_fields=["plan"]
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A finalized model: what a file holds. Made by `Plan.finalize`.

    Attributes:
        plan: the plan.
        params: dense leaves as host arrays in the dtype they are stored in, None in the holes.
        streams: what is stored of every entry, by entry name and field: bytes of codes and signs,
            codebooks and scales in their stored dtype.
    """

    plan: Plan
    params: PyTree
    streams: Mapping[str, Mapping[str, np.ndarray]]

    def decode(self) -> PyTree:
        """Rebuilds the parameter tree with the user's structure, shapes and dtypes."""
        leaves = {}
        for entry in self.plan.entries:
            leaves |= entry.decode(self.streams[entry.name])
        return tree.fill(self.dense(), leaves)

    def dense(self) -> PyTree:
        """The dense leaves as arrays in the user's dtypes, None in the holes."""
        dtypes = {leaf.path: leaf.dtype for leaf in self.plan.leaves}
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: in_range(_copy(leaf), dtypes[tree.leaf_path(path)]), self.params
        )

    def variables(self) -> dict[str, Any]:
        """The three collections, to go on training: see `Plan.init`."""
        learned, fixed = {}, {}
        for entry in self.plan.entries:
            fields = unpack_fields(entry.quantizer, self.streams[entry.name], entry.spec)
            encoded = entry.quantizer.unpack(fields, entry.spec)
            learned[entry.name] = encoded.learned
            if encoded.fixed:
                fixed[entry.name] = encoded.fixed
        return {"params": self.dense(), "vq": learned, "vq_state": fixed}

    def bits(self) -> BitsTable:
        """Counts the stored bits of every leaf."""
        dense = {leaf.dtype.name for leaf in jax.tree.leaves(self.params)}
        return self.plan.bits(dense.pop() if len(dense) == 1 else None)


def make_plan(params: PyTree, rules: Iterable[Rule | tuple[str, Quantizer | None]]) -> Plan:
    """Binds rules to a parameter tree.

    Args:
        params: a tree of float arrays, or of shapes (``jax.eval_shape``): a dry run.
        rules: `Rule` records or ``(pattern, quantizer)`` pairs; for every leaf the first rule whose
            pattern matches the whole leaf path wins.

    Returns:
        The plan.

    Raises:
        ValueError: if a rule matches no leaf (and is not optional), a leaf has no rule, nothing
            would be compressed though a rule names a quantizer, or a leaf cannot be taken by its
            quantizer. No weight is touched before.

    Example:
        >>> from ssvq_jax import SignSplit
        >>> shapes = {"kernel": jax.ShapeDtypeStruct((64, 64), "float32"),
        ...           "bias": jax.ShapeDtypeStruct((64,), "float32")}
        >>> plan = make_plan(shapes, [("kernel", SignSplit(codewords=16, dim=8)), (".*", None)])
        >>> plan.bits().compressed.bits_per_weight
        1.75390625
    """
    return _bind(as_recipe(rules), tree.leaf_specs(params))


def _bind(recipe: Recipe, specs: Mapping[str, LeafSpec]) -> Plan:
    return Plan(recipe, *bind_rules(match_rules(recipe, specs), specs))


def _store_dense(path: Any, leaf: Any, dtype: str | None) -> np.ndarray:
    """A dense leaf on the host, rounded to the dtype it is stored in."""
    leaf = np.asarray(leaf)
    if dtype is None:
        return leaf
    if dtype not in DENSE_DTYPES:
        raise ValueError(f"dense_dtype={dtype!r}: choose one of {DENSE_DTYPES}, or None")
    with np.errstate(over="ignore"):
        stored = leaf.astype(jnp.dtype(dtype))
    lost = int(np.sum(np.isfinite(leaf) & ~np.isfinite(stored)))
    if lost:
        raise ValueError(
            f"dense leaf '{tree.leaf_path(path)}' has {lost} values beyond the range of {dtype}: "
            "use bfloat16, or its own dtype"
        )
    return stored


def _copy(leaf: Any) -> Array:
    """An array with memory of its own: JAX may share that of NumPy arrays."""
    return jnp.array(leaf, copy=True)


def _not_finite(path: str, weight: Any) -> str | None:
    """What is wrong with the values of a weight; None if nothing is."""
    if isinstance(weight, Tracer):
        return None
    bad = int(weight.size - jnp.sum(jnp.isfinite(weight)))
    if not bad:
        return None
    return (
        f"leaf '{path}' holds {bad} NaN or infinite values of {weight.size}: repair the "
        "checkpoint, or keep the leaf dense (quantizer None)"
    )
