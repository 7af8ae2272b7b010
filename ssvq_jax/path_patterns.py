"""Regular expressions over paths, from users and files, matched in bounded time.

Matching is that of the ``regex`` package, which keeps the syntax of ``re`` and takes a time limit:
a pattern like ``((([a-z]+)+)+/?)+!`` would otherwise run for longer than anyone waits.
"""

import functools
import math
import re
from typing import Any

import regex

_MOST_CHARACTERS = 4096  # patterns come from files, too, and compiling takes time
_COUNT = re.compile(r"\{(?:\d*,)?(\d+),?\}")  # {3}, {2,3}, {,3}, {3,}
_MOST_COPIES = 10_000  # regex writes counted repetitions out when it compiles
_SECONDS = 1.0  # for one path; usual patterns take microseconds


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> Any:
    """Compiles a pattern.

    Args:
        pattern: regular expression in the syntax of Python's ``re``.

    Returns:
        The compiled pattern.

    Raises:
        ValueError: naming the pattern, if it is too long or no regular expression.
    """
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(
            f"'{pattern[:40]}...' has {len(pattern)} characters: give at most {_MOST_CHARACTERS}"
        )
    copies = math.prod(int(count) or 1 for count in _COUNT.findall(pattern))
    if copies > _MOST_COPIES:
        raise ValueError(
            f"'{pattern}' repeats up to {copies:,} times: give counts whose product is at most "
            f"{_MOST_COPIES:,}"
        )
    try:
        re.compile(pattern)  # the syntax is Python's; regex takes more
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a whole path.

    Args:
        pattern: regular expression in the syntax of Python's ``re``.
        path: e.g. a leaf path.

    Raises:
        ValueError: naming both, if matching takes longer than a second; or as `compile_pattern`.

    Example:
        >>> matches(r"(.*/)?kernel", "blocks_0/kernel"), matches("kernel", "blocks_0/kernel")
        (True, False)
    """
    try:
        return compile_pattern(pattern).fullmatch(path, timeout=_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"pattern '{pattern}' takes more than {_SECONDS:g} s to match '{path}': write it "
            "without a repetition inside a repetition, such as (a+)+"
        ) from None
