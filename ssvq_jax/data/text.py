"""Text for language models as a stream of token windows."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from ssvq_jax.data.wikipedia import read_articles
from ssvq_jax.json_files import read_text


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Streams the documents of text files.

    Args:
        files: Wikipedia dumps (``.xml``, ``.bz2``), of which each article is a document, and plain
            text, of which each file is one.

    Yields:
        Documents, in the order of the files; what is blank is left out.

    Raises:
        ValueError: for a file that is missing, holds no text, or cannot be read.
    """
    files = list(files)
    for file in files:
        if not file.is_file():
            raise ValueError(f"no text at {file}: give a text file or a Wikipedia dump (.bz2)")
    for file in files:
        is_dump = file.suffix in (".xml", ".bz2")
        blank = True
        for document in read_articles(file) if is_dump else [_read(file)]:
            if document.strip():
                blank = False
                yield document
        if blank:
            raise ValueError(f"{file} holds no {'articles' if is_dump else 'text'}: give another")


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except ValueError as error:
        raise ValueError(f"{error}, or give a Wikipedia dump (.bz2)") from error


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
