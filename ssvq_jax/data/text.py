"""Text for language models as a stream of token windows."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32


def token_windows(
    documents: Iterable[Sequence[int]], length: int, *, separator: int | None = None
) -> Iterator[Int32[np.ndarray, " t"]]:
    """Cuts documents, one after another, into windows that do not overlap.

    Args:
        documents: token numbers of each document; read as far as windows are asked for.
        length: tokens of a window; one that the last document does not fill is dropped.
        separator: token after each document; None for none.

    Yields:
        Windows.

    Raises:
        ValueError: if ``length`` is below 1.

    Example:
        >>> [window.tolist() for window in token_windows([[1, 2], [3, 4, 5]], 3, separator=0)]
        [[1, 2, 0], [3, 4, 5]]
    """
    if length < 1:
        raise ValueError(f"windows of length={length}: give at least 1")
    end = [] if separator is None else [separator]
    rest = np.zeros(0, np.int32)
    for document in documents:
        rest = np.concatenate([rest, np.asarray([*document, *end], np.int32)])
        full = len(rest) // length * length
        yield from rest[:full].reshape(-1, length)
        rest = rest[full:]
