"""JSON files of others: read strictly, whatever is wrong said in one line."""

import json
from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """Reads a text file in UTF-8, with or without a byte-order mark, under any locale.

    Raises:
        ValueError: naming the file, if it cannot be read or is no text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = "it is a folder" if file.is_dir() else error.strerror or str(error)
        raise ValueError(f"{file} cannot be read ({reason})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text in UTF-8 (byte {error.start}): save it in that encoding"
        ) from error


def read_json(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: naming the file, if it cannot be read, is no JSON, gives a key twice, or is
            nested too deeply.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "config.json").write_bytes(b'{"steps": 10}')
        ...     read_json(Path(folder) / "config.json")
        {'steps': 10}
    """
    text = read_text(file)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


def parse_json(text: str) -> Any:
    """Reads JSON; a key that is given twice is an error, where `json.loads` takes the last.

    Raises:
        ValueError: saying what is wrong.

    Example:
        >>> parse_json('{"bits": 4, "bits": 8}')
        Traceback (most recent call last):
        ValueError: the key 'bits' is given twice in one object: delete one of them
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object: delete one of them")
    return found
