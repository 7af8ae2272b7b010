"""Tables in documents, between markers, from the files of a run."""

import re
from collections.abc import Sequence
from pathlib import Path

from ssvq_jax.atomic import replace_text


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    line = "|" + "---|" * len(columns)
    return "\n".join([_line(columns), line, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def insert(page: Path, name: str, text: str) -> None:
    """Puts text between the markers ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a page.

    Raises:
        ValueError: if the page has no such markers, or has them more than once.
    """
    pattern = rf"(<!-- {re.escape(name)}: begin -->\n).*?(<!-- {re.escape(name)}: end -->)"
    old = page.read_text(encoding="utf-8")
    new, count = re.subn(
        pattern, lambda found: found[1] + text + "\n" + found[2], old, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} has the markers '{name}' {count} times, not once")
    replace_text(page, new)
