"""Entropy coding of codes, signs and levels: asymmetric numeral systems with a stored table.

A coded field is its frequency table (one little-endian 16-bit number for every value, the largest
65535, at least 1 where the value occurs), then the 32-bit words of `constriction`'s ``AnsCoder``
for the model ``Categorical(table / sum, perfect=False)``, and zero words where there would be more
than `MOST_NUMBERS` numbers a byte: a certain value takes next to no bits, and a small file must not
ask for any amount of memory.
"""

from typing import Any

import constriction
import numpy as np
from jaxtyping import UInt16

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] (native)

MOST_NUMBERS = 64  # in a coded byte
_TOP = 65535  # highest frequency in a table
_MOST_VALUES = 1 << 16  # a longer table costs more than it gains


def code(numbers: np.ndarray, values: int, raw_bytes: int) -> bytes | None:
    """Codes numbers, if that makes them smaller.

    Args:
        numbers: unsigned integers or booleans below ``values``.
        values: how many different numbers there are.
        raw_bytes: what they take without coding.

    Returns:
        The coded field, or None where it would not be smaller.

    Example:
        >>> rare = np.arange(8000) % 100 == 0
        >>> len(code(rare, 2, 1000)) < 130
        True
        >>> code(np.arange(8000) % 2 == 0, 2, 1000) is None
        True
    """
    if values > _MOST_VALUES:
        return None
    numbers = numbers.reshape(-1).astype(np.int32)
    counts = np.bincount(numbers, minlength=values)
    if 2 * values + entropy_bits(counts) / 8 >= raw_bytes:
        return None
    table = np.maximum(np.round(counts * (_TOP / counts.max())), counts > 0).astype("<u2")
    coder = _stream.stack.AnsCoder()
    coder.encode_reverse(numbers, _model(table))
    coded = table.tobytes() + coder.get_compressed().astype("<u4").tobytes()
    missing = max(-(-len(numbers) // MOST_NUMBERS) - len(coded), 0)
    coded += bytes(-(-missing // 4) * 4)
    return coded if len(coded) < raw_bytes else None


def decode(coded: bytes, values: int, count: int) -> np.ndarray:
    """Inverts `code`.

    Args:
        coded: what `code` gave.
        values: how many different numbers there are.
        count: how many numbers were coded.

    Returns:
        The numbers, int32 ``[count]``.

    Raises:
        ValueError: if the bytes are no coded field of so many numbers.
    """
    size = len(coded) - 2 * values
    if values > _MOST_VALUES or size < 0 or size % 4:
        raise ValueError(f"{len(coded)} bytes hold no table of {values} values and coded words")
    table = np.frombuffer(coded, "<u2", values)
    if table.max() != _TOP:
        raise ValueError("the frequency table has no value of the highest frequency")
    if count > MOST_NUMBERS * len(coded):
        raise ValueError(f"{len(coded)} bytes are too few for {count} numbers")
    words = np.trim_zeros(np.frombuffer(coded, "<u4", offset=2 * values), "b")
    try:
        coder = _stream.stack.AnsCoder(words.astype(np.uint32))
    except ValueError as error:
        raise ValueError(f"the coded words are damaged ({error})") from None
    numbers = coder.decode(_model(table), count)
    if not coder.is_empty():
        raise ValueError(f"the coded words hold more than {count} numbers")
    return numbers


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of as many numbers under their own frequencies: what no code for them can go below.

    Example:
        >>> entropy_bits(np.array([4, 4]))
        8.0
    """
    present = counts[counts > 0].astype(np.float64)
    return float(present @ np.log2(present.sum() / present))


def _model(table: UInt16[np.ndarray, " values"]) -> Any:
    frequencies = table.astype(np.float64)
    return _stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)
