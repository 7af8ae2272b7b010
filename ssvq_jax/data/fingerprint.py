"""Fingerprints of data sets: whether a run goes on with the files that it began with."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

WHOLE_BYTES = 256 * 2**20
"""Sets of at most so many bytes are read whole."""

_ENDS = 4096  # bytes from the start and the end of each file of a larger set
_MOST_FILES = 100_000  # that are opened, evenly spread; of the others only name and size count


def fingerprint_files(about: Any, files: Sequence[tuple[str, Any]]) -> str:
    """Computes a fingerprint of files: their names, sizes and contents.

    Of sets larger than `WHOLE_BYTES`, it reads 4 KiB from either end of each file, of at most
    100,000 files.

    Args:
        about: What else is part of the set, e.g. names of classes; `repr` decides.
        files: Name in the set, and path, in an order of the set's own.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: A file cannot be read.

    Example:
        >>> fingerprint_files(("cat", "dog"), [])
        '1822ee6f2ea858af'
    """
    sizes = [_size(path) for _, path in files]
    whole = sum(sizes) <= WHOLE_BYTES
    every = max(1, -(-len(files) // _MOST_FILES))
    digest = hashlib.sha256(repr(about).encode())
    for place, ((name, path), size) in enumerate(zip(files, sizes, strict=True)):
        digest.update(f"\n{name}\n{size}\n".encode(errors="surrogateescape"))
        if whole or place % every == 0:
            for part in _parts(path, size, whole=whole):
                digest.update(part)
    return digest.hexdigest()[:16]


def _size(path: Any) -> int:
    """Size of a file, which may be one of etils (``gs://``)."""
    found = path.stat()
    return found.st_size if isinstance(path, Path) else found.length


def _parts(path: Any, size: int, *, whole: bool) -> Iterable[bytes]:
    with path.open("rb") as file:
        if whole or size <= 2 * _ENDS:
            yield file.read()
        else:
            yield file.read(_ENDS)
            file.seek(size - _ENDS)
            yield file.read(_ENDS)
