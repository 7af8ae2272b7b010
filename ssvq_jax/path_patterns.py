"""Regular expressions over paths, from users and files, matched in bounded time.

The ``regex`` package matches, since it takes a time limit: with ``re``, a pattern like ``(a|aa)+b``
can run for longer than anyone waits. Patterns have the syntax and the meaning that they have in
``re``; where ``regex`` reads more into one, it is written out before.
"""

import functools
import re
from typing import Any

import regex

_MOST_CHARACTERS = 4096  # patterns come from files, too, and compiling takes time
_MOST_COPIES = 10_000  # regex writes counted repetitions out when it compiles
_SECONDS = 1.0  # for one path; usual patterns take microseconds
_COUNT = re.compile(r"\{(?:(\d+)|(\d*),(\d*))\}")
_TOKEN = re.compile(r"\\.|\(\?#[^)]*\)|.", re.DOTALL)
_IN_A_SET = re.compile(r"\\.|.", re.DOTALL)


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
    try:
        re.compile(pattern)
        text, size = _translate(pattern)
        if size > _MOST_COPIES:
            raise ValueError(
                f"'{pattern}' has {size:,} parts once its counts are written out: give at most "
                f"{_MOST_COPIES:,}"
            )
        return regex.compile(text)
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


def _translate(pattern: str) -> tuple[str, int]:
    """Writes a valid pattern of ``re`` for ``regex``, and counts the parts that it compiles.

    In ``regex``, braces that are no count mean an approximate match, and brackets in a set can name
    a class of characters; in ``re`` both stand for themselves.
    """
    text: list[str] = []
    groups, last = [0], 0  # parts of each open group, and of what a count would repeat
    place = 0
    while place < len(pattern):
        count = _COUNT.match(pattern, place)
        if count:
            exact, least, most = count.groups()
            times = int(exact or most or least or 1)
            groups[-1] += last * (max(times, 1) - 1)
            last *= max(times, 1)
            text.append(count[0] if count[0] != "{,}" else "{0,}")
            place = count.end()
        elif pattern[place] == "[":
            end = _end_of_set(pattern, place)
            inner = _IN_A_SET.findall(pattern[place + 1 : end])
            text.append("[" + "".join("\\[" if x == "[" else x for x in inner))
            groups[-1] += 1
            last, place = 1, end
        else:
            token = _TOKEN.match(pattern, place)
            assert token is not None  # any character is one
            part = token[0]
            place = token.end()
            text.append("\\" + part if part in "{}" else part)
            if part == "(":
                groups.append(0)
            elif part == ")":
                last = groups.pop() + 1
                groups[-1] += last
            elif part not in ("*", "+", "?", "|"):
                groups[-1] += 1
                last = 1
    return "".join(text), sum(groups)


def _end_of_set(pattern: str, start: int) -> int:
    """The place after a set that begins here; a bracket right after its begin is part of it."""
    place = start + 1
    place += pattern.startswith("^", place)
    place += pattern.startswith("]", place)
    while pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1
