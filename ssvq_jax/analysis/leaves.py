"""A report on every compressed leaf: bits, error, signs, codes; needs weights, but no data."""

import dataclasses

import numpy as np
from jaxtyping import Array

from ssvq_jax import tree
from ssvq_jax.analysis.statistics import (
    CodeStatistics,
    SignStatistics,
    WeightError,
    code_statistics,
    sign_statistics,
    weight_error,
)
from ssvq_jax.entries import Entry
from ssvq_jax.plan import Plan
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.tree import PyTree, Variables


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """A compressed leaf; ``dataclasses.asdict`` makes it plain data.

    Attributes:
        path: leaf path.
        entry: key in the collections: the leaf path, or the name of the share. Leaves of one share
            have its bits per weight and its code statistics in common.
        method: name of the method.
        settings: the method's main settings, readable.
        weights: number of weights, of all slices.
        bits_per_weight: stored bits of the entry over its weights.
        error: distance of the decoded weight.
        signs: sign statistics.
        codes: code statistics; None for methods without codes.
    """

    path: str
    entry: str
    method: str
    settings: str
    weights: int
    bits_per_weight: float
    error: WeightError
    signs: SignStatistics
    codes: CodeStatistics | None


def leaf_reports(plan: Plan, params: PyTree, variables: Variables) -> list[LeafReport]:
    """Reports on every compressed leaf.

    Args:
        plan: made for ``params``.
        params: the float parameters.
        variables: what `Plan.init` returned for them.

    Returns:
        A report a compressed leaf, in the order of the plan's entries.

    Raises:
        ValueError: if a collection is missing, or the tree is not the plan's.
    """
    bits = {row.name: row.bits_per_weight for row in plan.bits().rows}
    reports = []
    check_tree(plan, params, variables)
    arrays = tree.leaves_by_path(params)
    for entry in plan.entries:
        codes = _codes(entry, variables)
        for path, leaf in decode_entry(entry, variables).items():
            weight, decoded = (np.asarray(x, np.float64) for x in (arrays[path], leaf))
            report = LeafReport(
                path=path,
                entry=entry.name,
                method=entry.quantizer.method,
                settings=entry.quantizer.settings,
                weights=weight.size,
                bits_per_weight=bits[entry.name],
                error=weight_error(weight, decoded),
                signs=sign_statistics(weight, decoded),
                codes=codes,
            )
            reports.append(report)
    return reports


def check_tree(plan: Plan, params: PyTree, variables: Variables) -> None:
    """Raises ValueError if a collection is missing, or the tree is not the plan's."""
    tree.split(variables)  # names a missing collection
    specs = tree.leaf_specs(params)
    for leaf in plan.leaves:
        found = specs.get(leaf.path)
        if found is None or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            is_now = f"{found.dtype}{list(found.shape)}" if found else "missing"
            raise ValueError(
                f"leaf '{leaf.path}' is {leaf.dtype}{list(leaf.shape)} in the plan, but {is_now} "
                "in the parameters: give the float tree that the plan was made for"
            )


def decode_entry(entry: Entry, variables: Variables) -> dict[str, Array]:
    """Decodes the leaves of one entry, by leaf path: so the model is never held twice."""
    encoded = variables["vq"][entry.name], variables["vq_state"].get(entry.name, {})
    return entry.scatter(entry.quantizer.decode(*encoded, entry.spec))


def _codes(entry: Entry, variables: Variables) -> CodeStatistics | None:
    quantizer = entry.quantizer
    if not isinstance(quantizer, CodebookQuantizer):
        return None
    return code_statistics(
        np.asarray(variables["vq_state"][entry.name]["codes"]), quantizer.codewords
    )
