"""How the weights of a leaf are stored, as far as hardware is concerned."""

import dataclasses
from collections.abc import Mapping

from ssvq_jax.bits import BitsTable
from ssvq_jax.entries import Entry
from ssvq_jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class Format:
    """How the weights of a leaf are stored.

    Attributes:
        weights: how many there are.
        buffer_bytes: what they take in the weight buffer.
        coded_bytes: what they take in DRAM.
        table_bytes: codebooks and scales that come along.
        coded_numbers: numbers that are entropy-decoded.
        lookups: what a decoder looks up or works off for all of them.
        largest_table_bytes: from which it looks up.
    """

    weights: int
    buffer_bytes: float
    coded_bytes: float
    table_bytes: float = 0.0
    coded_numbers: float = 0.0
    lookups: float = 0.0
    largest_table_bytes: float = 0.0

    @staticmethod
    def plain(weights: int, stored_bytes: float) -> "Format":
        """Numbers that are used as they are stored."""
        return Format(weights, stored_bytes, stored_bytes)


def plan_formats(plan: Plan, table: BitsTable) -> dict[str, Format]:
    """Describes every leaf of a plan.

    Args:
        plan: the plan.
        table: its stored bits, or those of its packed file: streams that take other than their own
            bytes there are entropy-coded.

    Returns:
        Formats by leaf path.

    Raises:
        ValueError: if the table is of another plan.
    """
    stored = {row.name: row.bits for row in table.rows}
    missing = {leaf.path for leaf in plan.leaves if leaf.path not in plan.compressed}
    missing = (missing | {entry.name for entry in plan.entries}) - set(stored)
    if missing:
        raise ValueError(f"the table of bits lacks {sorted(missing)}: it is of another plan")
    formats = {}
    for entry in plan.entries:
        formats |= _entry_formats(entry, stored[entry.name])
    for leaf in plan.leaves:
        if leaf.path not in plan.compressed:
            formats[leaf.path] = Format.plain(leaf.size, sum(stored[leaf.path].values()) / 8)
    return formats


def _entry_formats(entry: Entry, bits: Mapping[str, int]) -> dict[str, Format]:
    """Formats of an entry's leaves; what leaves share is divided by their sizes."""
    streams = entry.storage.streams
    numbers = [stream for stream in streams if stream.values is not None]
    tables = [stream for stream in streams if stream.values is None]
    coded = [stream for stream in numbers if bits[stream.field] != 8 * stream.bytes]
    total = sum(leaf.size for leaf in entry.leaves)
    formats = {}
    for leaf in entry.leaves:
        share = leaf.size / total
        formats[leaf.path] = Format(
            leaf.size,
            buffer_bytes=share * sum(stream.bytes for stream in numbers),
            coded_bytes=share * sum(bits[stream.field] for stream in numbers) / 8,
            table_bytes=share * sum(bits[stream.field] for stream in tables) / 8,
            coded_numbers=share * sum(stream.count for stream in coded),
            lookups=share * sum(stream.count * stream.lookups for stream in numbers),
            largest_table_bytes=float(max((x.slice_bytes for x in tables), default=0)),
        )
    return formats
