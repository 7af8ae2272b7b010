"""Figures of rows as text, and where they go."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssvq_jax.report.pages import insert

Rows = Sequence[Mapping[str, Any]]


def mean_and_deviation(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; of one value, the value. No decimals from a thousand on.

    Example:
        >>> mean_and_deviation([1.0, 3.0]), mean_and_deviation([12345.6])
        ('2.00 ± 1.41', '12,346')
    """
    found = list(values)
    digits = 0 if np.mean(found) >= 1000 else digits
    mean = f"{np.mean(found):,.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {deviation(found):,.{digits}f}"


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; of one value 0."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def select(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def percent(rows: Rows, key: str) -> str:
    """A share's mean ± standard deviation in %; empty where no row has it."""
    values = [100 * row[key] for row in rows if row.get(key) is not None]
    return mean_and_deviation(values) if values else ""


def differences(one: Rows, other: Rows, key: str) -> list[float]:
    """Differences of a share by seed, in points, for the seeds that both have."""
    others = {row["seed"]: row[key] for row in other}
    return [100 * (row[key] - others[row["seed"]]) for row in one if row["seed"] in others]


def signed(values: Sequence[float]) -> str:
    """Mean ± standard deviation of differences; a dash for none."""
    if not values:
        return "-"
    text = mean_and_deviation(values)
    return text if text.startswith("-") else f"+{text}"


def publish(found: Mapping[str, str], page: Path | None) -> None:
    """Prints tables, and puts them into a page if there is one."""
    for name, text in found.items():
        if page is not None:
            insert(page, name, text)
        print(f"{text}\n")
