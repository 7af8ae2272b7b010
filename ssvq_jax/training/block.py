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
        """The model's variables with what this block learned; of a stack, all blocks, stacked."""
        learned = {self.entries[inner]: fields for inner, fields in own["vq"].items()}
        params = _replaced(variables["params"], own["params"], self.path.split("/"))
        return {**variables, "params": params, "vq": {**variables["vq"], **learned}}

    def _slice(self, tree: PyTree) -> PyTree:
        return tree if self.index is None else jax.tree.map(lambda x: x[self.index], tree)


def _replaced(tree: PyTree, part: PyTree, keys: Sequence[str]) -> PyTree:
    if not keys:
        return part
    return {**tree, keys[0]: _replaced(tree[keys[0]], part, keys[1:])}


def join(
    blocks: Sequence[Block], variables: Variables, learned: Sequence[Variables]
) -> dict[str, Any]:
    """The model's variables with what each of its blocks learned."""
    found = {name: variables[name] for name in ("params", "vq", "vq_state")}
    if blocks[0].index is not None:
        return blocks[0].put(found, jax.tree.map(lambda *each: jnp.stack(each), *learned))
    for block, own in zip(blocks, learned, strict=True):
        found = block.put(found, own)
    return found


def blocks_of(plan: Plan, params: PyTree, paths: str | Sequence[str]) -> list[Block]:
    """Lists the blocks of a model.

    Args:
        plan: of the whole model.
        params: its parameters, nested mappings.
        paths: as for `ssvq_jax.training.blockwise.finetune_blocks`.

    Raises:
        ValueError: if there is no path, or one has no leaves; or if leaves of several blocks are
            encoded together.
    """
    plan.matching_leaves(params)
    if not paths:
        raise ValueError("there is no block: give the blocks' places in the parameters")
    if not isinstance(paths, str):
        return [Block(path, None, *_plan_of(plan, path, stacked=False)) for path in paths]
    inner, entries = _plan_of(plan, paths, stacked=True)
    leaves = [leaf for leaf in plan.leaves if leaf.path.startswith(f"{paths}/")]
    if any(leaf.shape[:1] != leaves[0].shape[:1] or not leaf.shape for leaf in leaves):
        lengths = {leaf.path: leaf.shape[:1] for leaf in leaves}
        raise ValueError(
            f"leaves in '{paths}' have other leading axes, {lengths}, so they are not stacked "
            "blocks: give a list of the blocks' paths"
        )
    return [Block(paths, i, inner, entries) for i in range(leaves[0].shape[0])]


def _plan_of(plan: Plan, path: str, stacked: bool) -> tuple[Plan, dict[str, str]]:
    """The plan of a block, or of each block of a stack, and the whole plan's entries' names."""

    def inside(leaf: LeafSpec) -> bool:
        return leaf.path.startswith(f"{path}/")

    def own(leaf: LeafSpec) -> LeafSpec:
        shape, deep = leaf.shape[stacked:], max(leaf.stacked - stacked, 0)
        return LeafSpec(leaf.path.removeprefix(f"{path}/"), shape, leaf.dtype, deep)

    if not any(map(inside, plan.leaves)):
        places = sorted({leaf.path.rpartition("/")[0] for leaf in plan.leaves} - {""})
        raise ValueError(
            f"there is no leaf in '{path}': give the places of blocks in the parameters, of which "
            f"there are e.g. {places[:4]}"
        )
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
        # Blocks that are alike call their shares alike; no leaf has such a path.
        name = f"//{len(names)}" if shared else leaves[0].path
        names[name] = entry.name
        entries.append(dataclasses.replace(entry, name=name, leaves=leaves))
    leaves = tuple(own(leaf) for leaf in plan.leaves if inside(leaf))
    return Plan(plan.recipe, leaves, tuple(entries)), names
