"""A block of a model as a model of its own: its parameters, its plan, its part of the variables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssvq_jax.entries import SharedEntry
from ssvq_jax.plan import Plan
from ssvq_jax.tree import LeafSpec, PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a model as a model of its own.

    Attributes:
        path: in the parameters.
        index: in the stack, if blocks are stacked.
        plan: with paths as they are inside of the block, so that blocks that are alike have one.
        entries: the whole plan's entries, by the block's names of them.
    """

    path: str
    index: int | None
    plan: Plan
    entries: Mapping[str, str]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.path if self.index is None else f"{self.path}[{self.index}]"

    def params(self, params: PyTree) -> PyTree:
        """Its own of the model's parameters."""
        for key in self.path.split("/"):
            params = params[key]
        return self._slice(params)

    def take(self, variables: Variables) -> dict[str, Any]:
        """Its own of the model's variables."""

        def own(name: str) -> dict[str, Any]:
            found = variables[name]
            return {
                inner: self._slice(found[whole])
                for inner, whole in self.entries.items()
                if whole in found
            }

        params = self.params(variables["params"])
        return {"params": params, "vq": own("vq"), "vq_state": own("vq_state")}

    def put(self, variables: Variables, own: Variables) -> dict[str, Any]:
        """The model's variables with others of this block."""
        changed = {"params": self._put(variables["params"], own["params"], self.path.split("/"))}
        for name in ("vq", "vq_state"):
            whole = {self.entries[inner]: (inner, own[name][inner]) for inner in own[name]}
            changed[name] = {
                entry: self._merge(fields, whole[entry][1]) if entry in whole else fields
                for entry, fields in variables[name].items()
            }
        return changed

    def _slice(self, tree: PyTree) -> PyTree:
        return tree if self.index is None else jax.tree.map(lambda x: x[self.index], tree)

    def _merge(self, whole: PyTree, own: PyTree) -> PyTree:
        if self.index is None:
            return own
        return jax.tree.map(lambda x, y: jnp.asarray(x).at[self.index].set(y), whole, own)

    def _put(self, tree: PyTree, own: PyTree, keys: Sequence[str]) -> PyTree:
        if not keys:
            return self._merge(tree, own)
        return {**tree, keys[0]: self._put(tree[keys[0]], own, keys[1:])}


def blocks_of(plan: Plan, params: PyTree, paths: str | Sequence[str]) -> list[Block]:
    """Lists the blocks of a model.

    Args:
        plan: of the whole model.
        params: its parameters, nested mappings.
        paths: as for `ssvq_jax.training.blockwise.finetune_blocks`.

    Raises:
        ValueError: if a path is no block of the plan or holds nothing that is compressed, or leaves
            of several blocks are encoded together.
    """
    plan.matching_leaves(params)
    if not isinstance(paths, str):
        return [Block(path, None, *_plan_of(plan, path, stacked=False)) for path in paths]
    inner, entries = _plan_of(plan, paths, stacked=True)
    lengths = {leaf.shape[0] for leaf in plan.leaves if leaf.path.startswith(f"{paths}/")}
    if len(lengths) > 1:
        raise ValueError(
            f"leaves in '{paths}' have leading axes of lengths {sorted(lengths)}, so they are not "
            "stacked blocks: give a list of the blocks' paths"
        )
    return [Block(paths, i, inner, entries) for i in range(lengths.pop())]


def _plan_of(plan: Plan, path: str, stacked: bool) -> tuple[Plan, dict[str, str]]:
    """The plan of a block, or of each block of a stack, and the whole plan's entries' names."""

    def inside(leaf: LeafSpec) -> bool:
        return leaf.path.startswith(f"{path}/")

    def own(leaf: LeafSpec) -> LeafSpec:
        shape, deep = leaf.shape[stacked:], max(leaf.stacked - stacked, 0)
        return LeafSpec(leaf.path.removeprefix(f"{path}/"), shape, leaf.dtype, deep)

    entries, names = [], {}
    for entry in plan.entries:
        found = [inside(leaf) for leaf in entry.leaves]
        if not any(found):
            continue
        shared = isinstance(entry, SharedEntry)
        if not all(found) or (stacked and (shared or not entry.spec.stacked)):
            raise ValueError(
                f"'{entry.name}' is encoded for several blocks at once, so no block can be "
                "fine-tuned by itself: give its rule stacked=1, and no codebook that is shared "
                "between blocks"
            )
        leaves = tuple(map(own, entry.leaves))
        name = entry.name if shared else leaves[0].path
        names[name] = entry.name
        entries.append(dataclasses.replace(entry, name=name, leaves=leaves))
    if not entries:
        raise ValueError(
            f"block '{path}' has no leaf that the plan compresses: give the places of blocks in "
            f"the parameters, of which there are {sorted({x.path for x in plan.leaves})[:4]}, ..."
        )
    leaves = tuple(own(leaf) for leaf in plan.leaves if inside(leaf))
    return Plan(plan.recipe, leaves, tuple(entries)), names
