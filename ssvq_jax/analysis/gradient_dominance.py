"""Gradient dominance: how far a codeword follows a few of its members alone."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Integer

from ssvq_jax import tree
from ssvq_jax.analysis.gradients import member_gradients
from ssvq_jax.plan import Plan
from ssvq_jax.quantizers.base import check_integer
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.tree import PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Dominance:
    """Whom the codewords of a codebook follow; ``dataclasses.asdict`` makes it plain data.

    The four figures are means over the counted codewords, each weighted by its number of members;
    None if no codeword was counted.

    Attributes:
        path: leaf path, or the name of the share. The codebooks of a stacked leaf's slices are
            taken together.
        method: name of the method.
        codewords: how many were counted.
        members: how many members these have.
        left_out: how many were not, for too few members or a gradient of zero.
        top: cosine of a codeword's gradient with the sum over its members of largest gradient.
        bottom: cosine with the sum over its members of smallest gradient; 0 where that sum is zero.
        top_norm_share: share that the top members hold of the sum of all members' norms.
        agreement: norm of the codeword's gradient over the sum of its members' norms: 1 if all
            pull one way, about 1 / sqrt(members) if each pulls its own.
    """

    path: str
    method: str
    codewords: int
    members: int
    left_out: int
    top: float | None
    bottom: float | None
    top_norm_share: float | None
    agreement: float | None


def gradient_dominance(
    plan: Plan,
    variables: Variables,
    gradients: PyTree,
    *,
    top: float = 0.05,
    bottom: float = 0.6,
    least_members: int = 20,
) -> list[Dominance]:
    """Measures how far the gradient of a codeword is that of its few largest members.

    A codeword's gradient s is the sum of what its members add, g_i from `member_gradients`. With t
    and b the sums over the members of largest and of smallest ||g_i||, the figures are cos(s, t)
    and cos(s, b). Where the first is far above the second, most weights go where a few want to.
    Neither is 0 by chance: of members that pull independently, each is about the root of the share
    that its members hold of the sum of ||g_i||^2.

    Source: what is compared is of arXiv 2503.08668, which reports 0.66 for the top 5 % and 0.26 for
    the bottom 60 % (MobileNet-V2). Its exact definition is not known to us; this one is ours.

    Args:
        plan: the plan.
        variables: the three collections, at the start or in the middle of fine-tuning.
        gradients: dLoss/dW_q, a tree like ``plan.decode(variables)`` and taken there, e.g. by
            `dense_gradients`. Only leaves compressed by a codebook method are read.
        top: share of a codeword's members that are the top, rounded up to whole ones.
        bottom: share that are the bottom, rounded down to whole ones, at least one.
        least_members: codewords of fewer members are left out.

    Returns:
        A row a codebook method's entry, in the order of the plan's entries.

    Raises:
        ValueError: if the plan has no codebook, a collection is missing, an option is out of its
            range, or a gradient is missing, of another shape than its leaf, or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, ssvq_jax as ssvq
        >>> params = {"w": jnp.repeat(jnp.array([[1.0, 1.0], [-1.0, -1.0]]), 5, axis=0)}
        >>> plan = ssvq.make_plan(params, [("w", ssvq.Vector(codewords=2, dim=2))])
        >>> variables = plan.init(jax.random.key(0), params)
        >>> members = jnp.array([[0.0, 8.0], [3.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> gradients = {"w": jnp.tile(members, (2, 1))}  # a codeword's sum is (6, 8)
        >>> (row,) = gradient_dominance(plan, variables, gradients, top=0.2, least_members=5)
        >>> row.codewords, row.top, row.bottom
        (2, 0.8, 0.6)
    """
    for name, share in (("top", top), ("bottom", bottom)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}={share}: a share of the members is above 0 and at most 1")
    check_integer("least_members", least_members, least=1)
    tree.split(variables)  # names a missing collection
    rows = []
    for entry in plan.entries:
        quantizer = entry.quantizer
        if not isinstance(quantizer, CodebookQuantizer):
            continue
        members = np.asarray(member_gradients(entry, variables, gradients), np.float64)
        codes = np.asarray(variables["vq_state"][entry.name]["codes"], np.int64)
        # Row c of one slice's codebook is not row c of the next one's.
        lead, codewords = codes.shape[:-1], quantizer.codewords
        slices = math.prod(lead)
        owners = codes + codewords * np.arange(slices).reshape(*lead, 1)
        figures, members_of = _figures(
            members.reshape(-1, members.shape[-1]), owners.ravel(), (top, bottom), least_members
        )
        counted = len(members_of)
        means = [float(np.average(x, weights=members_of)) if counted else None for x in figures]
        left_out = slices * codewords - counted
        total = int(members_of.sum())
        rows.append(Dominance(entry.name, quantizer.method, counted, total, left_out, *means))
    if not rows:
        raise ValueError(
            "the plan compresses no leaf by a codebook, so there are no members to compare: use a "
            "recipe with a codebook method, e.g. Vector or SignSplit"
        )
    return rows


def _figures(
    members: Float[np.ndarray, "n d"],
    owners: Integer[np.ndarray, " n"],
    shares: tuple[float, float],
    least_members: int,
) -> tuple[list[Float[np.ndarray, " counted"]], Integer[np.ndarray, " counted"]]:
    """The four figures of every codeword that is counted, in `Dominance`'s order; its members."""
    enough = np.bincount(owners)[owners] >= least_members
    members, owners = members[enough], owners[enough]
    norms = np.linalg.norm(members, axis=1)
    order = np.lexsort((norms, owners))  # by codeword, the smallest gradient first
    members, norms = members[order], norms[order]
    _, starts, counts = np.unique(owners[order], return_index=True, return_counts=True)

    # Rounded first: in floats 0.07 * 100 is above 7.
    top, bottom = (np.round(share * counts, 9) for share in shares)
    rank = np.arange(len(norms)) - np.repeat(starts, counts)
    in_top = rank >= np.repeat(counts - np.ceil(top), counts)
    in_bottom = rank < np.repeat(np.maximum(np.floor(bottom), 1), counts)
    s, t, b = (
        np.add.reduceat(values, starts)
        for values in (members, members * in_top[:, None], members * in_bottom[:, None])
    )
    all_norms, top_norms = (np.add.reduceat(x, starts) for x in (norms, norms * in_top))
    length = np.linalg.norm(s, axis=1)
    counted = length > 0
    scale = np.where(counted, all_norms, 1)
    figures = [_cosines(s, t), _cosines(s, b), top_norms / scale, length / scale]
    return [figure[counted] for figure in figures], counts[counted]


def _cosines(a: Float[np.ndarray, "k d"], b: Float[np.ndarray, "k d"]) -> Float[np.ndarray, " k"]:
    """Cosines row by row; 0 where a row is zero."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.where(norms > 0, norms, 1)
