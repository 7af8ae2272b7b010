"""Where the bits of a plan go: a row an entry, totals by method, and the two ratios."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import jax.numpy as jnp

from ssvq_jax.entries import Entry
from ssvq_jax.tree import LeafSpec


@dataclasses.dataclass(frozen=True)
class BitsRow:
    """Stored bits of an entry, of a dense leaf, or of several of them.

    Attributes:
        name: leaf path, or the name of a share or total.
        method: name of the method, or ``dense``.
        settings: the method's main settings, readable.
        shape: shape of the leaf; empty for totals.
        weights: number of weights.
        bits: stored bits by field, those that fill last bytes included.
    """

    name: str
    method: str
    settings: str
    shape: tuple[int, ...]
    weights: int
    bits: dict[str, int]

    @property
    def total_bits(self) -> int:
        """Stored bits of all fields."""
        return sum(self.bits.values())

    @property
    def stored_bytes(self) -> int:
        """Stored bytes of all fields."""
        return self.total_bits // 8

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights."""
        return self.total_bits / self.weights if self.weights else 0.0

    @property
    def compression_ratio(self) -> float:
        """Float32 bits over stored bits."""
        return 32 * self.weights / self.total_bits if self.total_bits else 1.0


@dataclasses.dataclass(frozen=True)
class BitsTable:
    """Stored bits of a whole plan.

    Attributes:
        rows: a row an entry, then a row a dense leaf.
    """

    rows: tuple[BitsRow, ...]

    @property
    def methods(self) -> dict[str, BitsRow]:
        """A total a method and settings (``dense`` included), by readable name."""
        groups: dict[str, list[BitsRow]] = {}
        for row in self.rows:
            groups.setdefault(f"{row.method} {row.settings}".strip(), []).append(row)
        return {name: _sum(name, rows) for name, rows in groups.items()}

    @property
    def compressed(self) -> BitsRow:
        """Total over all compressed leaves."""
        return _sum("compressed", [row for row in self.rows if row.method != "dense"])

    @property
    def model(self) -> BitsRow:
        """Total over all leaves; its compression ratio is the file ratio, headers aside."""
        return _sum("model", self.rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all streams, headers aside."""
        return sum(row.stored_bytes for row in self.rows)

    @property
    def file_ratio(self) -> float:
        """Float32 bytes of the whole model over stored bytes, headers aside."""
        return 4 * self.model.weights / self.stored_bytes if self.stored_bytes else 1.0

    @property
    def main(self) -> BitsRow:
        """Total of the method and settings with the most weights: the papers' figure."""
        kinds = [row for row in self.methods.values() if row.name != "dense"]
        return max(kinds, key=lambda row: row.weights, default=self.compressed)

    def __str__(self) -> str:
        """Aligned text."""
        header = ("leaf", "shape", "method", "weights", "bits/weight", "bytes", "ratio")
        lines = [header, *(cells(row) for row in self.rows), ("",) * len(header)]
        lines += [cells(row) for row in (*self.methods.values(), self.compressed, self.model)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = "\n".join(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return f"{text}\n{self.summary()}"

    def summary(self) -> str:
        """The two ratios in a sentence."""
        return (
            f"compressed leaves {self.compressed.compression_ratio:.2f}x, whole model "
            f"{self.file_ratio:.2f}x ({4 * self.model.weights:,} -> "
            f"{self.stored_bytes:,} bytes)"
        )


def bits_table(
    entries: Iterable[Entry],
    leaves: Iterable[LeafSpec],
    compressed: Collection[str],
    dense_dtype: str | None = None,
) -> BitsTable:
    """Counts the bits of a plan's entries and dense leaves, these in their own or another dtype."""
    rows = []
    for entry in entries:
        bits = {stream.field: 8 * stream.bytes for stream in entry.storage.streams}
        weights = sum(leaf.size for leaf in entry.leaves)
        method = entry.quantizer.method
        rows.append(
            BitsRow(entry.name, method, entry.quantizer.settings, entry.spec.shape, weights, bits)
        )
    for leaf in leaves:
        if leaf.path not in compressed:
            dtype = jnp.dtype(dense_dtype or leaf.dtype)
            bits = {dtype.name: 8 * dtype.itemsize * leaf.size}
            rows.append(BitsRow(leaf.path, "dense", "", leaf.shape, leaf.size, bits))
    return BitsTable(tuple(rows))


def cells(row: BitsRow) -> tuple[str, ...]:
    """A row as text: leaf, shape, method, weights, bits per weight, bytes, ratio."""
    return (
        row.name,
        "x".join(str(n) for n in row.shape),
        f"{row.method} {row.settings}".strip(),
        f"{row.weights:,}",
        f"{row.bits_per_weight:.4f}",
        f"{row.stored_bytes:,}",
        f"{row.compression_ratio:.2f}x",
    )


def _sum(name: str, rows: Sequence[BitsRow]) -> BitsRow:
    bits: dict[str, int] = {}
    for row in rows:
        for field, count in row.bits.items():
            bits[field] = bits.get(field, 0) + count
    return BitsRow(name, "", "", (), sum(row.weights for row in rows), bits)
