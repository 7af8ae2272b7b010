"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from ssvq_jax.bits import BitsRow, BitsTable, cells


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; columns after the first are aligned to the right.

    Args:
        title: heading.
        columns: column names.
        rows: cells, one a column; an empty row draws a line.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        if row:
            table.add_row(*map(escape, row))  # names may have brackets
        else:
            table.add_section()
    console = Console()
    if not console.is_terminal:  # a pipe or log has no width: do not cut
        wide = Console(width=1000)
        console = Console(width=max(140, Measurement.get(wide, wide.options, table).maximum))
    console.print(table)


def print_bits(title: str, table: BitsTable) -> None:
    """Prints where the bits of a plan go, and both ratios."""
    columns = ("leaf", "shape", "method", "weights", "bits/weight", "bytes", "ratio")
    totals = (*table.methods.values(), table.compressed, table.model)
    rows = [*map(cells, table.rows), (), *map(cells, totals)]
    print_table(title, columns, rows)
    print(table.summary())


def print_inspection(
    found: Mapping[str, Any], table: BitsTable, errors: Mapping[str, float]
) -> None:
    """Prints what a packed file holds.

    Args:
        found: what `ssvq inspect` writes.
        table: the bits of the file.
        errors: relative squared error by row, if there is a reference.
    """
    columns = ["leaf", "shape", "method", "bits by field", "bits/weight", "bytes", "ratio"]
    if errors:
        columns.append("error")
    rows: list[Sequence[str]] = []
    for row, leaf in zip(table.rows, found["leaves"], strict=True):
        rows.append([*_fields(row, leaf["coded"]), _error(errors.get(row.name))][: len(columns)])
    rows.append(())
    for row in (*table.methods.values(), table.compressed, table.model):
        rows.append([*_fields(row, {}), ""][: len(columns)])
    print_table(found["file"], columns, rows)
    for name in ("model", "metrics"):
        if found[name]:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items()))
    size, header, plain = found["file_bytes"], found["header_bytes"], found["plain_bytes"]
    print(
        f"compressed leaves {table.compressed.compression_ratio:.2f}x; whole file "
        f"{found['file_ratio']:.2f}x: {size:,} bytes, of which header {header:,} "
        f"({header / size:.1%})"
        + (f" and the model's state {found['state_bytes']:,}" if found["state_bytes"] else "")
    )
    if plain != table.stored_bytes:
        print(f"entropy coding: {table.stored_bytes:,} bytes instead of {plain:,}")
    print("every byte checked: not damaged")


def _fields(row: BitsRow, coded: Mapping[str, int]) -> list[str]:
    name, shape, method, _, bits, size, ratio = cells(row)
    fields = " ".join(
        f"{field}{'*' if field in coded else ''} {count:,}" for field, count in row.bits.items()
    )
    return [name, shape, method, fields, bits, size, ratio]


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def print_results(results: Mapping[str, Any]) -> None:
    """Prints the comparison of a quickstart's ``results.json``."""
    columns = ("method", "bits/weight", "ratio", "file ratio", "before", "after", "steps", "time")
    base = results["float"]
    rows = [
        (
            "float32",
            "32",
            "1.0x",
            "1.0x",
            "",
            _percent(base["accuracy"], base["standard_error"]),
            str(base["steps"]),
            f"{base['seconds']:.0f} s",
        ),
        (),
    ]
    for name, row in results["methods"].items():
        rows.append(
            (
                name,
                f"{row['bits_per_weight']:.3f}",
                f"{row['compression_ratio']:.1f}x",
                f"{row['file_ratio']:.1f}x",
                _percent(row["accuracy_before"]),
                _percent(row["accuracy_after"], row["standard_error"]),
                str(row["steps"]),
                f"{row['seconds']:.0f} s",
            )
        )
    print_table(f"test accuracy, {base['examples']} examples", columns, rows)


def print_outcome(label: str, results: Mapping[str, Any]) -> None:
    """Prints the quality and size of one run.

    Args:
        label: what the last row is called.
        results: the content of its ``results.json``.
    """
    names = {"float": "float32", "before": "before training", "after": label}
    rows = []
    for key, name in names.items():
        if key in results:
            found = results[key]
            accuracy = _percent(found["accuracy"], found["standard_error"])
            rows.append((name, accuracy, f"{found['loss']:.4f}", f"{found['examples']:,}"))
    print_table("quality", ("model", "accuracy", "loss", "examples"), rows)
    _print_size(results)


def _print_size(results: Mapping[str, Any]) -> None:
    """Prints what a model takes."""
    if "file_bytes" in results:
        size = f"{results['file_bytes']:,} bytes, model {results['file_ratio']:.2f}x smaller"
    else:
        size = f"{results['stored_bytes']:,} bytes and a header"
    if "bits_per_weight" in results:
        size += (
            f"; compressed weights: {results['bits_per_weight']:.3f} bits each, "
            f"{results['compression_ratio']:.2f}x"
        )
    print(size)


def print_language(label: str, results: Mapping[str, Any]) -> None:
    """Prints what a language model made of a text, and its size.

    Args:
        label: what the last row is called.
        results: with ``float`` and ``after``, where they were judged, and the sizes of what is
            compressed.
    """
    rows = []
    for key, name in {"float": "float32", "after": label}.items():
        if key in results:
            found = results[key]
            agreed = results.get("agreement") if key == "after" else None
            rows.append(
                (
                    name,
                    f"{found['perplexity']:.2f}",
                    _percent(found["accuracy"]),
                    "" if agreed is None else _percent(agreed),
                    f"{found['tokens']:,}",
                )
            )
    if rows:
        title = f"{results['windows']} windows of {results['window']} tokens"
        columns = ("model", "perplexity", "next token right", "says what float says", "tokens")
        print_table(title, columns, rows)
    if results.get("note"):
        print(f"the float weights: {results['note']}")
    if "file_bytes" in results:
        _print_size(results)


def _percent(share: float, error: float | None = None) -> str:
    return f"{100 * share:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "") + " %"
