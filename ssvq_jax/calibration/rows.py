"""The walk over the input rows of one weight: each is encoded with the error of those before it.

With H = R R^T, R upper triangular, and E = W - W_q, the output error is a sum over input rows i,

    trace(E^T H E) = |R^T E|^2 = sum_i R_ii^2 |E_i + sum_{j<i} (R_ji / R_ii) E_j|^2,

so row i is encoded in place of the target T_i = W_i + sum_{j<i} (R_ji / R_ii) E_j, whose rounding
error alone then counts. This is GPTQ (Frantar et al., arXiv 2210.17323) as LDLQ writes it (Chee et
al., arXiv 2307.13304, theorem 6: both give the same): GPTQ's Cholesky factor of the inverse of H is
the inverse of R, and no inverse is needed. Of d rows that are encoded together, B, the same holds
with blocks in place of numbers (GPTVQ, arXiv 2402.15319),

    T_B = W_B + R_BB^-T sum_{j<B} R_jB^T E_j,    |R_BB^T (T_B - Q_B)|^2,

of which sub-vectors see the diagonal: their elements weigh (R_BB R_BB^T)_ii.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ssvq_jax.quantizers.base import Fields, Quantizer
from ssvq_jax.quantizers.calibration import Calibration, from_input_rows, input_rows
from ssvq_jax.tree import LeafSpec

_FIRST_DAMPING = 1e-6  # after none
_MOST_DAMPING = 1e3
_ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)  # of a pivot, relative to its diagonal element
_EXACT = lax.Precision.HIGHEST  # accelerators round the factors of a product otherwise


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Which input rows are encoded together, and what they look like to the quantizer.

    Attributes:
        axes: the input axes, the one that sub-vectors run along last: their rows are neighbours.
        given: the input axes as the moments have them.
        size: rows encoded together: d, or 1 where sub-vectors run along an output axis.
        block: shape of a group as a part of the weight.
        fields: axis of the learned fields that are cut with it.
    """

    axes: tuple[int, ...]
    given: tuple[int, ...]
    size: int
    block: tuple[int, ...]
    fields: Mapping[str, int]


def row_groups(quantizer: Quantizer, spec: LeafSpec, axes: tuple[int, ...]) -> RowGroups:
    """Plans the walk over one slice.

    Args:
        quantizer: the method.
        spec: description of the slice.
        axes: the axes that inputs run along.

    Raises:
        ValueError: naming the leaf, if the method encodes weights as a whole only, or sub-vectors
            along an input axis need padding.
    """
    parts = quantizer.slice_parts(spec)
    size = parts.dim if parts.axis in axes else 1
    if spec.shape[parts.axis] % size:
        raise ValueError(
            f"leaf '{spec.path}' of shape {spec.shape}: sub-vectors of dim={size} along the input "
            f"axis {parts.axis} need padding, and cannot be fed back: choose a dim that divides "
            "it, or an output axis"
        )
    order = axes
    if size > 1:
        order = (*(axis for axis in axes if axis != parts.axis), parts.axis)
    block = tuple(1 if axis in axes else n for axis, n in enumerate(spec.shape))
    if size > 1:
        block = (*block[: parts.axis], size, *block[parts.axis + 1 :])
    cut = {name: axis % len(spec.shape) for name, axis in parts.channels.items()}
    return RowGroups(order, axes, size, block, {n: a for n, a in cut.items() if a in axes})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """What the walk over one slice found.

    Attributes:
        target: T, of the weight's shape and dtype: what each element was encoded in place of.
        values: W_q, what it was encoded as.
        importance: weight of each element's error within its sub-vector; None where rows are
            encoded alone.
        damping: what was added to the diagonal of H, over its mean.
    """

    target: Float[Array, "..."]
    values: Float[Array, "..."]
    importance: Float[Array, "..."] | None
    damping: Float[Array, ""]


def walk(
    quantizer: Quantizer,
    spec: LeafSpec,
    groups: RowGroups,
    weight: Float[Array, "..."],
    learned: Fields,
    moments: Float[Array, "c c"],
    damping: Float[Array, ""],
    *,
    block: int,
    largest_first: bool,
) -> Walk:
    """Encodes the input rows of one slice, each with the errors of those before it fed back.

    Args:
        quantizer: the method.
        spec: description of the slice.
        groups: from `row_groups`.
        weight: W.
        learned: codebooks, steps and scales.
        moments: H, float32.
        damping: added to the diagonal of H, times its mean.
        block: rows whose errors reach all later rows as one matrix product.
        largest_first: walk in the order of falling input energy, not in that of the rows.
    """
    order = _row_order(groups, spec, moments, largest_first=largest_first)
    rows = input_rows(weight.astype(jnp.float32), groups.axes)
    moments, rows = moments[order[0]][:, order[0]], rows[order[1]]
    factor, used = damped_factor(moments, damping)
    feedback, energy = _feedback(factor, groups.size)
    fields = _group_fields(groups, spec, learned, order[1])

    count, outputs = rows.shape
    most = max(groups.size, min(block, count) // groups.size * groups.size)
    blocks = -(-count // most)
    padding = blocks * most - count
    shape = (blocks, most // groups.size, groups.size)
    energy_rows = jnp.pad(energy, (0, padding), constant_values=1).reshape(shape)
    part = dataclasses.replace(spec, shape=groups.block)

    def encode(target: Array, own: Fields, weights: Array) -> tuple[Array, Array]:
        """A group of rows and what it decodes to; both as the leaf's dtype has them."""
        target = lax.optimization_barrier(_rounded(target, spec.dtype))
        array = from_input_rows(target, part.shape, groups.axes).astype(spec.dtype)
        found = None
        if groups.size > 1:
            spread = jnp.broadcast_to(weights[:, None], target.shape)
            found = Calibration(from_input_rows(spread, part.shape, groups.axes))
        own = {**learned, **own}
        encoded = quantizer.slice_requantize(array, own, part, found)
        values = quantizer.slice_decode(*encoded, part).astype(jnp.float32)
        return target, _rounded(input_rows(values, groups.axes), spec.dtype)

    def visit_block(errors: Array, given: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        start, own_rows, back, weights, own = given
        # Errors of this block and of later ones are still zero.
        base = own_rows + jnp.matmul(back, errors, precision=_EXACT)
        inner = lax.dynamic_slice_in_dim(back, start, most, axis=1)

        def visit(found: Array, group: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
            place, original, base, back, weights, own = group
            target, values = encode(base + jnp.matmul(back, found, precision=_EXACT), own, weights)
            found = lax.dynamic_update_slice_in_dim(found, original - values, place, axis=0)
            return found, (target, values)

        steps = shape[1]
        places = lax.iota(jnp.int32, steps) * groups.size
        by_group = (places, *(x.reshape(steps, groups.size, -1) for x in (own_rows, base, inner)))
        found, out = lax.scan(visit, jnp.zeros_like(base), (*by_group, weights, own))
        return lax.dynamic_update_slice_in_dim(errors, found, start, axis=0), out

    padded = jnp.pad(rows, ((0, padding), (0, 0)))
    feedback = jnp.pad(feedback, ((0, padding), (0, padding)))
    starts = lax.iota(jnp.int32, blocks) * most
    fields = {name: _in_blocks(x, shape) for name, x in fields.items()}
    given = (
        starts, padded.reshape(blocks, most, -1), feedback.reshape(blocks, most, -1),
        energy_rows, fields,
    )  # fmt: skip
    _, found = lax.scan(visit_block, jnp.zeros_like(padded), given)
    back = jnp.argsort(order[1])
    target, values = (
        from_input_rows(x.reshape(-1, outputs)[:count][back], spec.shape, groups.axes)
        for x in found
    )
    importance = None
    if groups.size > 1:
        spread = jnp.broadcast_to(energy[back][:, None], (count, outputs))
        importance = from_input_rows(spread, spec.shape, groups.axes)
    return Walk(target.astype(spec.dtype), values.astype(spec.dtype), importance, used)


def damped_factor(
    moments: Float[Array, "c c"], damping: Float[Array, ""]
) -> tuple[Float[Array, "c c"], Float[Array, ""]]:
    """Factors H / mean(diag H) + damping I = R R^T with R upper triangular.

    An input that was always zero has no part in any error: its diagonal element counts as the mean,
    its row is encoded as it is, whatever the damping.

    Args:
        moments: H, symmetric.
        damping: as wanted; ten times as much is taken, again and again, while the matrix is not
            positive definite to the precision of float32.

    Returns:
        R, and the damping used: NaN if there was none.
    """
    diagonal = jnp.diagonal(moments)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    dead = (diagonal <= 0).astype(jnp.float32)
    energy = diagonal / mean + dead
    scaled = moments / mean + jnp.diag(dead)

    def attempt(damping: Array) -> tuple[Array, Array]:
        matrix = scaled + damping * jnp.eye(scaled.shape[0], dtype=jnp.float32)
        flipped = lax.linalg.cholesky(matrix[::-1, ::-1], symmetrize_input=False)
        return damping, flipped[::-1, ::-1]

    def fails(state: tuple[Array, Array]) -> Array:
        damping, factor = state
        pivots = jnp.square(jnp.diagonal(factor))
        return ~jnp.all(pivots > _ROUNDING * (energy + damping))  # of NaN, too

    def harder(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return attempt(jnp.maximum(10 * state[0], jnp.float32(_FIRST_DAMPING)))

    found = lax.while_loop(
        lambda state: fails(state) & (state[0] < _MOST_DAMPING), harder, attempt(damping)
    )
    return found[1], jnp.where(fails(found), jnp.float32(jnp.nan), found[0])


def _feedback(
    factor: Float[Array, "c c"], size: int
) -> tuple[Float[Array, "c c"], Float[Array, " c"]]:
    """What a row's target takes of the errors before it, and how much its own error weighs.

    Returns:
        R_BB^-T R_jB^T at (B, j), j < B, in groups of ``size`` rows; the diagonal of R_BB R_BB^T.
    """
    count = factor.shape[0]
    lower = factor.T
    row, column = (lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (0, 1))
    before = jnp.where(column // size < row // size, lower, jnp.zeros_like(lower))
    if size == 1:
        pivots = jnp.diagonal(factor)
        return before / pivots[:, None], jnp.square(pivots)
    groups = lower.reshape(count // size, size, count // size, size)
    own = jnp.einsum("gigj->gij", groups)
    stacked = before.reshape(count // size, size, count)
    back = lax.linalg.triangular_solve(own, stacked, left_side=True, lower=True)
    return back.reshape(count, count), jnp.sum(jnp.square(own), axis=1).reshape(count)


def _row_order(
    groups: RowGroups, spec: LeafSpec, moments: Float[Array, "c c"], *, largest_first: bool
) -> tuple[Int[Array, " c"], Int[Array, " c"]]:
    """The order of the walk, as rows of H and as rows of the weight cut along ``groups.axes``."""
    lengths = [spec.shape[axis] for axis in groups.given]
    count = math.prod(lengths)
    natural = lax.iota(jnp.int32, count)
    places = [groups.given.index(axis) for axis in groups.axes]
    given = natural.reshape(lengths).transpose(places).reshape(count)
    if not largest_first:
        return given, natural
    energy = jnp.diagonal(moments)[given].reshape(-1, groups.size).sum(axis=1)
    order = jnp.argsort(-energy, stable=True)
    walked = natural.reshape(-1, groups.size)[order].reshape(count)
    return given[walked], walked


def _group_fields(
    groups: RowGroups, spec: LeafSpec, learned: Fields, order: Int[Array, " c"]
) -> dict[str, Array]:
    """The learned fields that are cut with the input rows, ``[groups, n]`` in walking order."""
    places = jnp.unravel_index(order, [spec.shape[axis] for axis in groups.axes])
    fields = {}
    for name, axis in groups.fields.items():
        own = learned[name][places[groups.axes.index(axis)]].reshape(-1, groups.size)
        fields[name] = own[:, : groups.block[axis]]
    return fields


def _in_blocks(field: Float[Array, "groups n"], shape: tuple[int, ...]) -> Float[Array, "b g n"]:
    padding = shape[0] * shape[1] - field.shape[0]
    return jnp.pad(field, ((0, padding), (0, 0)), mode="edge").reshape(*shape[:2], -1)


def _rounded(values: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Float32 numbers as another dtype has them (XLA may drop a pair of conversions)."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(values, info.nexp, info.nmant)
