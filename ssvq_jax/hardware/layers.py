"""A workload with a format for its weights, as arrays that the cost model computes with.

The format of a weight is the plan's `Storage` (or what the packed file says of it): bits are not
counted a second time. Streams with a number a weight, or a number a sub-vector, lie in the weight
buffer as they are stored and are decoded on the way into the array; tables (codebooks, scales)
come along once. What is entropy-coded is decoded before the buffer.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ssvq_jax.bits import BitsTable
from ssvq_jax.hardware.formats import Format, plan_formats
from ssvq_jax.hardware.workload import Product, Workload
from ssvq_jax.plan import Plan

_COLUMNS = (
    "m",
    "k",
    "n",
    "count",
    "inputs",
    "is_weight",
    "weight_bytes",
    "table_bytes",
    "coded_bytes",
    "coded_numbers",
    "lookups",
    "largest_table_bytes",
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "columns",
        "other_weight_bytes",
        "all_weight_bytes",
        "operations",
        "repeats",
        "pairs",
    ],
    meta_fields=["names", "last"],
)
@dataclasses.dataclass(frozen=True)
class Layers:
    """The products of a workload with the formats of their weights: a pytree of float64 arrays.

    Made by `with_plan` and `with_bits`. Arrays may have leading axes: other formats of one
    workload, as `stack_formats` makes them, over which `jax.vmap` runs.

    Attributes:
        names: of the products.
        columns: by name ``[layers]``: ``m``, ``k``, ``n``, ``count`` and ``inputs`` of `Product`;
            ``is_weight``, 1 if ``[K, N]`` comes from parameters, else 0; for all ``count`` together
            ``weight_bytes`` in the weight buffer, ``table_bytes`` that come along, ``coded_bytes``
            in DRAM instead of ``weight_bytes`` (equal if nothing is entropy-coded),
            ``coded_numbers`` to be entropy-decoded, ``lookups`` to decode every weight once; and
            ``largest_table_bytes``, from which they are looked up.
        other_weight_bytes: parameters that feed no product: biases, norms, positions, and of
            embedding tables the rows that are looked up. How they are decoded is not counted.
        all_weight_bytes: all parameters as they lie in the weight buffer, each once: what must fit
            if they are to stay there.
        operations: arithmetic outside of the products.
        repeats: how many equal layers each stands for ``[layers]``: rounds of a loop, and what
            `merge_equal` puts together.
        pairs: neighbours, as (layer, next layer, how often), ``[pairs, 3]``; products in a row with
            equal rounds are taken for the body of one loop. The first is that of the first layer.
        last: which layer is the network's last; the first is the first.
    """

    names: tuple[str, ...]
    columns: dict[str, Any]
    other_weight_bytes: Any
    all_weight_bytes: Any
    operations: Any
    repeats: Any
    pairs: Any
    last: int


def with_plan(workload: Workload, plan: Plan, table: BitsTable | None = None) -> Layers:
    """Gives weights the formats of a plan.

    Args:
        workload: what the model computes.
        plan: what its weights are stored in.
        table: stored bits, if not the plan's own: ``packed_file.bits()`` for entropy-coded streams,
            ``plan.bits("float16")`` for dense leaves in another dtype.

    Returns:
        The layers.

    Raises:
        ValueError: naming the leaf, if the plan is for another model.

    Example:
        >>> from ssvq_jax import SignSplit, make_plan
        >>> layer = Product("fc", 1, 64, 64, leaves=("kernel",))
        >>> plan = make_plan({"kernel": jax.ShapeDtypeStruct((64, 64), "float32")},
        ...                  [("kernel", SignSplit(codewords=16, dim=8))])
        >>> layers = with_plan(Workload((layer,)), plan)
        >>> layers.columns["weight_bytes"].tolist(), layers.columns["lookups"].tolist()
        ([768.0], [512.0])
    """
    formats = plan_formats(plan, plan.bits() if table is None else table)
    own = {path for path, leaf in formats.items() if leaf.weights}
    if workload.leaves and own - set(workload.leaves):
        raise ValueError(
            f"the plan has the leaf '{min(own - set(workload.leaves))}', which the model has not: "
            "make the plan for this model"
        )
    for path, size in workload.leaves.items():
        if path not in formats:
            raise ValueError(
                f"the plan has no leaf '{path}', which the model has: make the plan for this model"
            )
        if formats[path].weights != size:
            raise ValueError(
                f"leaf '{path}' has {size:,} weights in the model and {formats[path].weights:,} in "
                "the plan: make the plan for this model"
            )
    for product in workload.products:
        for path in product.leaves:
            if path not in formats:
                raise ValueError(
                    f"product '{product.name}' is fed by leaf '{path}', which the plan does not "
                    "have: make the plan for this model"
                )
    return _layers(workload, formats)


def with_bits(workload: Workload, bits: int | float, other_bits: int | float = 32) -> Layers:
    """Gives all weights as many bits each, without scales or tables: the usual baseline.

    Args:
        workload: what the model computes.
        bits: of a weight that feeds a product: 8 for int8, 16 for float16.
        other_bits: of other parameters, which int8 models keep in more.

    Returns:
        The layers.

    Raises:
        ValueError: for bits that are not positive.
    """
    for name, value in (("bits", bits), ("other_bits", other_bits)):
        if not 0 < value <= 64:
            raise ValueError(f"{name}={value}: give more than 0, and at most 64")
    feeding = {path for product in workload.products for path in product.leaves}
    formats = {
        path: Format.plain(size, size * (bits if path in feeding else other_bits) / 8)
        for path, size in workload.leaves.items()
    }
    for product in workload.products:
        for path in set(product.leaves) - set(formats):  # of a list written by hand
            formats[path] = Format.plain(product.weights, product.weights * bits / 8)
    return _layers(workload, formats)


def stack_formats(formats: Sequence[Layers]) -> Layers:
    """Puts formats of one workload on a leading axis, for `jax.vmap` over recipes.

    Args:
        formats: what `with_plan` and `with_bits` made of one workload.

    Returns:
        All of them; their arrays have the axis of the formats first.

    Raises:
        ValueError: if there are none, or they are of different workloads.
    """
    if not formats:
        raise ValueError("no formats to stack: give at least one")
    for other in formats[1:]:
        if not _same_work(formats[0], other):
            raise ValueError("the formats are of different workloads: stack those of one workload")
    return jax.tree.map(lambda *arrays: np.stack(arrays), *formats)


def _same_work(one: Layers, other: Layers) -> bool:
    """Whether two differ in nothing but formats."""
    sizes = ("m", "k", "n", "count", "inputs", "is_weight")
    arrays = [(one.columns[name], other.columns[name]) for name in sizes]
    arrays += [(one.repeats, other.repeats), (one.pairs, other.pairs)]
    same = (one.names, one.last) == (other.names, other.last)
    return same and all(np.array_equal(x, y) for x, y in arrays)


def merge_equal(layers: Layers) -> Layers:
    """Lets one layer stand for all equal ones: sweeps then compute it once. Costs do not change.

    Args:
        layers: of one format, or of several on leading axes.

    Returns:
        The distinct layers, in the order in which they first come.
    """
    rows = np.stack([layers.columns[name] for name in _COLUMNS], axis=-1)  # [..., layers, columns]
    lead = rows.shape[:-2]
    by_layer = np.moveaxis(rows, -2, 0).reshape(len(layers.names), -1)
    _, first, groups = np.unique(by_layer, axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)  # in the order of the network
    groups = np.argsort(np.argsort(first))[groups.reshape(-1)]
    outermost = (0,) * len(lead)  # other formats differ in none of what is counted here
    repeats = np.bincount(groups, layers.repeats[outermost])
    pairs: dict[tuple[int, int], float] = {}
    for now, after, often in layers.pairs[outermost]:
        met = int(groups[int(now)]), int(groups[int(after)])
        pairs[met] = pairs.get(met, 0.0) + often
    joined = np.array([(*met, often) for met, often in pairs.items()], np.float64).reshape(-1, 3)
    return Layers(
        names=tuple(layers.names[i] for i in kept),
        columns={name: layers.columns[name][..., kept] for name in _COLUMNS},
        other_weight_bytes=layers.other_weight_bytes,
        all_weight_bytes=layers.all_weight_bytes,
        operations=layers.operations,
        repeats=np.broadcast_to(repeats, (*lead, *repeats.shape)),
        pairs=np.broadcast_to(joined, (*lead, *joined.shape)),
        last=int(groups[layers.last]),
    )


def _layers(workload: Workload, formats: Mapping[str, Format]) -> Layers:
    if not workload.products:
        raise ValueError("the workload has no product: nothing for an array to do")
    rows = [_row(product, formats) for product in workload.products]
    feeding = {path for product in workload.products for path in product.leaves}
    other = 0.0
    for path, size in workload.leaves.items():
        if path not in feeding:
            share = workload.gathered.get(path, size) / size
            other += share * formats[path].coded_bytes + formats[path].table_bytes
    rounds = [product.rounds for product in workload.products]
    held = sum(x.buffer_bytes + x.table_bytes for x in formats.values())
    return Layers(
        names=tuple(product.name for product in workload.products),
        columns={name: np.array([row[name] for row in rows], np.float64) for name in _COLUMNS},
        other_weight_bytes=np.float64(other),
        all_weight_bytes=np.float64(held),
        operations=np.float64(sum(workload.operations.values())),
        repeats=np.array(rounds, np.float64),
        pairs=np.array(_pairs(rounds), np.float64).reshape(-1, 3),
        last=len(rows) - 1,
    )


def _pairs(rounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Which product follows which, and how often."""
    pairs, begin = [], 0
    for i, often in enumerate(rounds):
        if i + 1 < len(rounds) and rounds[i + 1] == often:
            pairs.append((i, i + 1, often))
            continue
        if often > 1:  # the end of a loop's body, and its beginning
            pairs.append((i, begin, often - 1))
        if i + 1 < len(rounds):
            pairs.append((i, i + 1, 1))
        begin = i + 1
    return pairs


def _row(product: Product, formats: Mapping[str, Format]) -> dict[str, float]:
    row = dict.fromkeys(_COLUMNS, 0.0) | {
        "m": float(product.m),
        "k": float(product.k),
        "n": float(product.n),
        "count": float(product.count),
        "inputs": float(product.inputs),
        "is_weight": float(bool(product.leaves)),
    }
    if not product.leaves:
        return row
    found = [formats[path] for path in product.leaves]
    # A product may take a part of its leaves, a loop's round or a slice, or take them repeatedly.
    share = product.weights / sum(x.weights for x in found)
    row["weight_bytes"] = share * sum(x.buffer_bytes for x in found)
    row["table_bytes"] = share * sum(x.table_bytes for x in found)
    row["coded_bytes"] = share * sum(x.coded_bytes for x in found)
    row["coded_numbers"] = share * sum(x.coded_numbers for x in found)
    row["lookups"] = share * sum(x.lookups for x in found)
    row["largest_table_bytes"] = max(x.largest_table_bytes for x in found)
    return row
