"""Error feedback (GPTQ) under any method that can encode a part of a weight."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ssvq_jax.blocks import BlockLayout
from ssvq_jax.calibration.rows import row_groups, walk
from ssvq_jax.entries import Entry, SharedEntry, check_calibration
from ssvq_jax.plan import Plan
from ssvq_jax.quantizers import Calibration, Encoded, InputMoments, Quantizer
from ssvq_jax.quantizers.base import Fields, check_flag, check_integer
from ssvq_jax.quantizers.calibration import input_rows
from ssvq_jax.tree import LeafSpec, PyTree, Variables, split


@dataclasses.dataclass(frozen=True)
class LeafFeedback:
    """What error feedback did to a leaf.

    Attributes:
        damping: the part of H's mean diagonal that was added to it; more than asked for where H was
            not positive definite; the largest of a stacked leaf's slices.
        before: mean squared error of the layer's outputs, trace(E^T H E), over their mean square,
            trace(W^T H W), of the weights as they were encoded before.
        after: the same of the weights as they are now.
    """

    damping: float
    before: float
    after: float


def feed_back(
    plan: Plan,
    variables: Variables,
    params: PyTree,
    inputs: Mapping[str, InputMoments],
    *,
    damping: float = 0.01,
    block: int = 128,
    largest_first: bool = False,
) -> tuple[dict[str, Any], dict[str, LeafFeedback]]:
    """Encodes weights anew, input row by input row, each with the errors of those before it.

    Codebooks, steps and scales stay as they are; codes, masks, signs and latents are chosen for the
    least error of the layers' outputs: a row's own error, and what later rows can still make good
    of the errors before them. Sub-vectors along an output axis let every row be encoded alone; of
    those along an input axis, d rows are encoded together. Call it outside of ``jax.jit``.

    Args:
        plan: the plan.
        variables: the three collections, from `Plan.init`.
        params: the weights they encode.
        inputs: second moments of the inputs by leaf path; other leaves stay as they are.
        damping: part of H's mean diagonal that is added to it.
        block: rows whose errors reach all later rows as one matrix product; the result does not
            depend on it.
        largest_first: walk in the order of falling input energy (GPTQ's ``act_order``), not in
            that of the rows.

    Returns:
        The collections, and what was done to each leaf, by leaf path.

    Raises:
        ValueError: naming the leaf, if the plan does not compress it, its moments do not fit it or
            are no moments, or its method cannot encode it in parts.

    Source: Frantar et al., "GPTQ", arXiv 2210.17323; van Baalen et al., "GPTVQ", arXiv 2402.15319.

    Example:
        >>> from ssvq_jax import Uniform, make_plan
        >>> params = {"w": jnp.array([[0.4], [0.4], [1.0]])}
        >>> plan = make_plan(params, [("w", Uniform(bits=2))])
        >>> variables = plan.init(jax.random.key(0), params)
        >>> variables["vq"]["w"]["step"] = jnp.ones(1)  # 0.4 is rounded to 0
        >>> moments = InputMoments(jnp.ones((3, 3)) + 0.1 * jnp.eye(3), (0,))  # inputs much alike
        >>> variables, report = feed_back(plan, variables, params, {"w": moments})
        >>> plan.decode(variables)["w"].ravel().tolist(), report["w"].after < report["w"].before
        ([0.0, 1.0, 1.0], True)
    """
    split(variables)  # names a missing collection
    check_integer("block", block, least=1)
    check_flag("largest_first", largest_first)
    if not 0 <= damping <= 1:
        raise ValueError(f"damping={damping!r}: it must lie between 0 and 1")
    unknown = sorted(set(inputs) - plan.compressed)
    if unknown:
        raise ValueError(f"input moments for {unknown}, which this plan does not compress")
    arrays = plan.matching_leaves(params)
    walks = [
        _LeafWalk(entry, leaf, inputs[leaf.path], block, largest_first)
        for entry in plan.entries
        for leaf in entry.leaves
        if leaf.path in inputs
    ]
    learned, fixed = dict(variables["vq"]), dict(variables["vq_state"])
    report = {}
    for each in walks:  # all of them have been checked
        name, leaf = each.entry.name, each.leaf
        weight = jnp.asarray(arrays[leaf.path])
        old = Encoded(learned[name], fixed.get(name, {}))
        new, used = each.encode(weight, old, damping)
        before, after = each.output_errors(weight, old, new)
        report[leaf.path] = LeafFeedback(used, before, after)
        learned[name] = new.learned
        if new.fixed:
            fixed[name] = new.fixed
    # A step that donates what is returned leaves what was given alone.
    return jax.tree.map(jnp.copy, {**variables, "vq": learned, "vq_state": fixed}), report


@dataclasses.dataclass(frozen=True)
class _LeafWalk:
    """One leaf of an entry, with the moments of its inputs."""

    entry: Entry
    leaf: LeafSpec
    inputs: InputMoments
    block: int
    largest_first: bool

    def __post_init__(self) -> None:
        check_calibration(self.leaf, Calibration(inputs=self.inputs))
        row_groups(self.quantizer, self.leaf.slice_spec(), self.inputs.axes)

    @property
    def quantizer(self) -> Quantizer:
        """The method as it would be for this leaf alone."""
        if isinstance(self.entry, SharedEntry):
            return dataclasses.replace(self.entry.quantizer, axis=self.entry.axis)
        return self.entry.quantizer

    def encode(
        self, weight: Float[Array, "..."], old: Encoded, damping: float
    ) -> tuple[Encoded, float]:
        """Encodes the leaf; returns the entry's arrays, and the damping used."""
        spec = dataclasses.replace(self.leaf, path="")  # leaves of one shape share compiled code
        shared = (
            self.entry.pieces()[self.leaf.path] if isinstance(self.entry, SharedEntry) else None
        )
        new, used = _encode(
            self.quantizer, self.entry.quantizer, spec, self.inputs.axes, self.block,
            self.largest_first, None if shared is None else shared[1],
            weight, old.learned, self.inputs.matrix.astype(jnp.float32), jnp.float32(damping),
        )  # fmt: skip
        used = float(jnp.max(used))
        if math.isnan(used):
            raise ValueError(
                f"input moments of leaf '{self.leaf.path}' are not positive semi-definite, however "
                "much is added to their diagonal: give the mean of x^T x over inputs x"
            )
        if shared is None:
            return new, used
        own = {**new.learned, **new.fixed}

        def put(fields: Fields) -> dict[str, Array]:
            return {
                name: field if name == "codebook" else field.at[shared[0]].set(own[name])
                for name, field in fields.items()
            }

        return Encoded(put(old.learned), put(old.fixed)), used

    def output_errors(
        self, weight: Float[Array, "..."], old: Encoded, new: Encoded
    ) -> tuple[float, float]:
        """Mean squared errors of the layer's outputs, over their mean square."""
        weights = [weight]
        for encoded in (old, new):
            decoded = self.entry.quantizer.decode(*encoded, self.entry.spec)
            weights.append(self.entry.scatter(decoded)[self.leaf.path])
        energies = _output_energies(
            self.leaf.stacked, self.inputs.axes, self.inputs.matrix.astype(jnp.float32), *weights
        )
        whole, before, after = (float(x) for x in energies)
        return (before / whole, after / whole) if whole > 0 else (0.0, 0.0)


def _over_slices(function: Callable[[Any], Any], stacked: int, arrays: Any) -> Any:
    """One slice after the other, so that memory does not grow with depth."""
    if not stacked:
        return function(arrays)
    lead = jax.tree.leaves(arrays)[0].shape[:stacked]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[stacked:]), arrays)
    found = lax.map(function, flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


@functools.partial(jax.jit, static_argnums=range(7))
def _encode(
    quantizer: Quantizer,
    method: Quantizer,
    spec: LeafSpec,
    axes: tuple[int, ...],
    block: int,
    largest_first: bool,
    cut: BlockLayout | None,
    weight: Float[Array, "..."],
    learned: Fields,
    moments: Float[Array, "*stacked c c"],
    damping: Float[Array, ""],
) -> tuple[Encoded, Float[Array, "*stacked"]]:
    """Walks over a leaf with ``quantizer``, and encodes what is found with ``method``.

    That is the same one, or, for leaves that share a codebook, the one that takes the sub-vectors
    ``[n, d]`` which ``cut`` gives.
    """
    one = spec.slice_spec()
    groups = row_groups(quantizer, one, axes)

    def encode(each: tuple[Array, Fields, Array]) -> tuple[Encoded, Array]:
        weight, learned, moments = each
        found = walk(
            quantizer, one, groups, weight, learned, moments, damping,
            block=block, largest_first=largest_first,
        )  # fmt: skip
        target, importance = found.target, found.importance
        if cut is not None:
            target = cut.split(target)
            importance = None if importance is None else cut.split(importance)
        known = None if importance is None else Calibration(importance)
        own = dataclasses.replace(one, shape=target.shape)
        return method.slice_requantize(target, learned, own, known), found.damping

    return _over_slices(encode, spec.stacked, (weight, learned, moments))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _output_energies(
    stacked: int,
    axes: tuple[int, ...],
    moments: Float[Array, "*stacked c c"],
    weight: Float[Array, "..."],
    before: Float[Array, "..."],
    after: Float[Array, "..."],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """trace(X^T H X) of the weight and of two errors, summed over slices."""

    def energies(each: tuple[Array, ...]) -> tuple[Array, ...]:
        moments, *weights = each
        whole, before, after = (input_rows(x.astype(jnp.float32), axes) for x in weights)

        def energy(rows: Array) -> Array:
            return jnp.sum(rows * jnp.matmul(moments, rows, precision=lax.Precision.HIGHEST))

        return energy(whole), energy(whole - before), energy(whole - after)

    whole, old, new = _over_slices(energies, stacked, (moments, weight, before, after))
    return jnp.sum(whole), jnp.sum(old), jnp.sum(new)
