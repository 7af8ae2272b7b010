"""Rules matched to leaves: what one quantizer call covers, a leaf or leaves sharing a codebook."""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ssvq_jax.blocks import BlockLayout
from ssvq_jax.problems import raise_together
from ssvq_jax.quantizers import Calibration, Quantizer, Storage
from ssvq_jax.quantizers.base import Fields, in_range
from ssvq_jax.quantizers.calibration import unseen_slices
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.quantizers.streams import decode_streams
from ssvq_jax.recipe import Recipe, Rule
from ssvq_jax.tree import LeafSpec

_MOST_GAIN = 1024  # weights a stored byte: a small file must not ask for any amount of memory


@dataclasses.dataclass(frozen=True)
class Entry:
    """One compressed leaf.

    Attributes:
        name: key in the collections ``vq`` and ``vq_state``; the leaf path.
        quantizer: the method, as it is called with `spec`.
        leaves: the leaves of the user's tree; here one.
    """

    name: str
    quantizer: Quantizer
    leaves: tuple[LeafSpec, ...]

    @functools.cached_property
    def spec(self) -> LeafSpec:
        """What the quantizer sees."""
        return self.leaves[0]

    @functools.cached_property
    def storage(self) -> Storage:
        """Stored bits by field."""
        return self.quantizer.storage(self.spec)

    def check(self) -> None:
        """Raises ValueError, naming the leaf, if the quantizer cannot take it."""
        self.quantizer.check(self.spec)

    def gather(self, arrays: Mapping[str, Any]) -> Float[Array, "..."]:
        """Takes the entry's weight out of arrays by leaf path, in the shape of `spec`."""
        return jnp.asarray(arrays[self.name])

    def scatter(self, weight: Float[Array, "..."]) -> dict[str, Array]:
        """Inverts `gather`."""
        return {self.name: weight}

    def decode(self, streams: Mapping[str, Any]) -> dict[str, Array]:
        """Decodes what `ssvq_jax.quantizers.streams.pack_fields` gave; leaves by leaf path."""
        return self.scatter(decode_streams(self.quantizer, dict(streams), self.nameless))

    @functools.cached_property
    def nameless(self) -> LeafSpec:
        """What the quantizer sees, without a path: leaves of one shape share compiled code."""
        return dataclasses.replace(self.spec, path="")


@dataclasses.dataclass(frozen=True)
class SharedEntry(Entry):
    """Leaves that share a codebook: to the quantizer, one weight of all their sub-vectors.

    Attributes:
        name: key in the collections: the name of the share.
        quantizer: the method; it cuts the joined sub-vectors ``[n, d]`` along their last axis.
        leaves: the leaves of the user's tree.
        axis: the axis along which the leaves themselves are cut.
    """

    quantizer: CodebookQuantizer
    axis: int

    @functools.cached_property
    def spec(self) -> LeafSpec:
        """The sub-vectors of all leaves, ``[n, d]``."""
        count = sum(layout.count for layout in self._layouts())
        dtype = jnp.result_type(*(leaf.dtype for leaf in self.leaves))
        return LeafSpec(self.name, (count, self.quantizer.dim), dtype)

    def check(self) -> None:
        """Raises ValueError if a leaf cannot be cut, or needs padding."""
        for layout, leaf in zip(self._layouts(), self.leaves, strict=True):
            if layout.padding:
                raise ValueError(
                    f"leaf '{leaf.path}' of shape {leaf.shape} needs padding for "
                    f"dim={layout.dim} and so cannot share the codebook '{self.name}': give it a "
                    "rule of its own"
                )
        super().check()

    def gather(self, arrays: Mapping[str, Any]) -> Float[Array, "n d"]:
        """Joins the sub-vectors of all leaves."""
        parts = zip(self._layouts(), self.leaves, strict=True)
        dtype = self.spec.dtype
        blocks = [lay.split(jnp.asarray(arrays[leaf.path])).astype(dtype) for lay, leaf in parts]
        return jnp.concatenate(blocks)

    def scatter(self, weight: Float[Array, "n d"]) -> dict[str, Array]:
        """Inverts `gather`."""
        layouts = self._layouts()
        cuts = np.cumsum([layout.count for layout in layouts])[:-1].tolist()
        parts = zip(layouts, self.leaves, jnp.split(weight, cuts), strict=True)
        return {leaf.path: in_range(lay.join(part), leaf.dtype) for lay, leaf, part in parts}

    def parts(self, fields: Fields) -> Iterator[tuple[LeafSpec, CodebookQuantizer, Fields]]:
        """Gives every leaf its own part of what `Quantizer.pack` gave for all.

        Args:
            fields: numbers by field: of the codebook, of weights, or of sub-vectors (codes, masks).

        Yields:
            The leaf, the method as it would be for this leaf alone, and its fields.
        """
        pieces = self.pieces()
        for leaf in self.leaves:
            part, layout = pieces[leaf.path]
            own: dict[str, Any] = {}
            for name, field in fields.items():
                if name.startswith("codebook"):
                    own[name] = field
                elif field.shape == self.spec.shape:
                    own[name] = layout.join(field[part])
                else:
                    own[name] = field[part]
            yield leaf, dataclasses.replace(self.quantizer, axis=self.axis), own

    def pieces(self) -> dict[str, tuple[slice, BlockLayout]]:
        """Says by leaf path which sub-vectors are a leaf's, and how it is cut into them."""
        start, found = 0, {}
        for layout, leaf in zip(self._layouts(), self.leaves, strict=True):
            found[leaf.path] = slice(start, start + layout.count), layout
            start += layout.count
        return found

    def _layouts(self) -> list[BlockLayout]:
        quantizer = dataclasses.replace(self.quantizer, axis=self.axis)
        return [quantizer.layout(leaf) for leaf in self.leaves]


def share_entry(name: str, members: list[tuple[Rule, LeafSpec]]) -> SharedEntry:
    """Binds the leaves of one share.

    Raises:
        ValueError: if their rules differ in the quantizer, or it has no codebook to share.
    """
    kinds = {rule.quantizer for rule, _ in members}
    quantizer = members[0][0].quantizer
    if len(kinds) > 1:
        raise ValueError(f"share='{name}' is used with different quantizers: {kinds}; use one")
    if isinstance(quantizer, CodebookQuantizer) and not quantizer.separable:
        raise ValueError(
            f"share='{name}': {quantizer} codes some channels of each leaf apart, so that leaves "
            "cannot be joined: give every leaf a codebook of its own, or use Vector"
        )
    if not isinstance(quantizer, CodebookQuantizer) or quantizer.channel_scale:
        raise ValueError(
            f"share='{name}': {quantizer} has no codebook to share, or scales every channel: use a "
            "codebook method with channel_scale=False"
        )
    leaves = tuple(spec for _, spec in members)
    joined = dataclasses.replace(quantizer, axis=-1)
    return SharedEntry(name, joined, leaves, quantizer.axis)


def gather_calibration(entry: Entry, calibration: Mapping[str, Calibration]) -> Calibration | None:
    """Takes an entry's calibration out of those by leaf path, in the shape of its spec."""
    own = {leaf.path: calibration[leaf.path] for leaf in entry.leaves if leaf.path in calibration}
    inputs = None if isinstance(entry, SharedEntry) or not own else own[entry.name].inputs
    given = {path: one.importance for path, one in own.items() if one.importance is not None}
    if not given:
        return None if inputs is None else Calibration(inputs=inputs)
    ones = {leaf.path: jnp.ones(leaf.shape) for leaf in entry.leaves}
    return Calibration(entry.gather(ones | given), inputs)


def check_calibration(spec: LeafSpec, calibration: Calibration) -> None:
    """Raises ValueError, naming the leaf, if a calibration does not fit it."""
    if calibration.inputs is not None:
        calibration.inputs.check(spec)
        if not _finite(calibration.inputs.matrix):
            raise ValueError(
                f"calibration of leaf '{spec.path}': the moments of its inputs are not finite"
            )
        _warn_of_unseen(spec, calibration.inputs.matrix, 2)
    importance = calibration.importance
    if importance is None:
        return
    if importance.shape != spec.shape:
        raise ValueError(
            f"calibration of leaf '{spec.path}': the importance has shape {importance.shape}, the "
            f"leaf {spec.shape}: give one number an element"
        )
    if isinstance(importance, Tracer):
        return
    if not (_finite(importance) and bool(jnp.all(importance >= 0) & jnp.any(importance > 0))):
        raise ValueError(
            f"calibration of leaf '{spec.path}': the importance must be finite, nowhere negative "
            "and somewhere positive"
        )
    _warn_of_unseen(spec, importance, len(spec.shape) - spec.stacked)


def _warn_of_unseen(spec: LeafSpec, values: Array, axes: int) -> None:
    """Warns of slices that no data have reached, e.g. experts that no token was sent to."""
    if isinstance(values, Tracer):
        return
    if slices := unseen_slices(values, axes):
        warnings.warn(
            f"leaf '{spec.path}': no data reached {slices} (encoded without calibration): give "
            "more data, or data of other kinds",
            stacklevel=3,
        )


def _finite(array: Float[Array, "..."]) -> bool:
    return isinstance(array, Tracer) or bool(jnp.all(jnp.isfinite(array)))


def match_rules(recipe: Recipe, specs: Mapping[str, LeafSpec]) -> dict[str, Rule]:
    """Finds the rule of every leaf: the first that matches.

    Returns:
        The rules by leaf path.

    Raises:
        ValueError: for a leaf without a rule, a rule without a leaf, or a recipe that names
            quantizers and would compress nothing.
    """
    chosen: dict[str, Rule] = {}
    uncovered = []
    for path in specs:
        rule = next((rule for rule in recipe if rule.matches(path)), None)
        if rule is None:
            uncovered.append(path)
        else:
            chosen[path] = rule
    if uncovered:
        raise ValueError(
            f"no rule covers {_some(uncovered)}: add a rule for them, or end with ('.*', None) to "
            "keep the rest dense"
        )
    matched = set(chosen.values())
    idle = [rule.pattern for rule in recipe if rule not in matched and not rule.optional]
    wanted = any(rule.quantizer is not None for rule in recipe)
    if idle or (wanted and all(rule.quantizer is None for rule in matched)):
        raise ValueError(
            f"{'rules ' + _some(idle) + ' match' if idle else 'the recipe matches'} no leaf that "
            "an earlier rule has not taken: patterns must match whole leaf paths, which here are "
            f"{_some(list(specs))}"
        )
    return chosen


def bind_rules(
    chosen: Mapping[str, Rule], specs: Mapping[str, LeafSpec]
) -> tuple[tuple[LeafSpec, ...], tuple[Entry, ...]]:
    """Puts leaves and their rules together, and checks that the quantizers can take them.

    Args:
        chosen: the rule of every leaf, by leaf path.
        specs: the leaves by leaf path, in the tree's order.

    Returns:
        The leaves, with the stacked axes that their rules say, and what is compressed.

    Raises:
        ValueError: naming every leaf that its quantizer cannot take.
    """
    leaves: list[LeafSpec] = []
    entries: list[Entry] = []
    shares: dict[str, list[tuple[Rule, LeafSpec]]] = {}
    for path, spec in specs.items():
        rule = chosen[path]
        if rule.quantizer is not None:
            spec = dataclasses.replace(spec, stacked=rule.stacked)
            if rule.share is not None:
                shares.setdefault(rule.share, []).append((rule, spec))
            else:
                entries.append(Entry(path, rule.quantizer, (spec,)))
        leaves.append(spec)
    for name, members in shares.items():
        if name in specs:
            raise ValueError(f"share='{name}' is also the path of a leaf: choose another name")
        entries.append(share_entry(name, members))
    raise_together([reason for entry in entries if (reason := _misfit(entry))])
    return tuple(leaves), tuple(entries)


def _misfit(entry: Entry) -> str | None:
    """Why a quantizer cannot take its leaf; None if it can."""
    try:
        entry.check()
    except ValueError as error:
        return str(error)
    if entry.spec.size > _MOST_GAIN * entry.storage.bits // 8:
        return (
            f"'{entry.name}': {entry.quantizer} stores less than a bit for every "
            f"{_MOST_GAIN // 8} weights: use a smaller dim"
        )
    return None


def _some(names: list[str], most: int = 5) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
