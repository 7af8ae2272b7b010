"""Checks of what users write: sizes, and keys of files."""

from collections.abc import Collection, Mapping
from typing import Any

from jax.core import Tracer

LARGEST = 2**53  # beyond it float64 skips integers


def check_size(owner: str, name: str, value: Any) -> None:
    """Raises ValueError, naming the value, unless it is a whole number of 1 to 2^53."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= LARGEST:
        raise ValueError(
            f"{owner}: {name}={value!r}: give a whole number of at least 1, and at most 2^53 (up "
            "to there counts are exact)"
        )


def check_keys(
    owner: str, data: Any, *, needs: Collection[str], knows: Collection[str] = ()
) -> None:
    """Raises ValueError, naming the keys, if a mapping lacks or does not know one.

    Args:
        owner: what the data describe.
        data: a mapping, read from a file.
        needs: keys that must be there.
        knows: keys that may be there besides.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{owner}: a {type(data).__name__}; give a mapping with {sorted(needs)}")
    missing = sorted(set(needs) - set(data))
    if missing:
        raise ValueError(f"{owner}: the keys {missing} are missing")
    for key in sorted(set(map(str, data)) - set(needs) - set(knows)):
        with_unit = sorted(name for name in {*needs, *knows} if name.startswith(f"{key}_"))
        hint = f"it needs its unit: {with_unit}" if with_unit else f"known are {sorted(knows)}"
        raise ValueError(f"{owner}: the key '{key}' is unknown; {hint}")


def is_known(value: Any) -> bool:
    """Whether a value is known: not traced."""
    return not isinstance(value, Tracer)
