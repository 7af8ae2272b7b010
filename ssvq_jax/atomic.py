"""Files that are written whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a whole file, or leaves the old one: no interrupt shows half of it.

    Args:
        file: what to write; what is there is replaced.
        write: writes the temporary file that it is given, which lies beside ``file``.

    Raises:
        OSError: naming the file, if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "results.json", lambda new: new.write_bytes(b"{}"))
        ...     [path.name for path in Path(folder).iterdir()]
        ['results.json']
    """
    # Unique: threads, and processes of one number on several hosts, may write the same file.
    new = file.with_name(f".{uuid.uuid4().hex}.new")
    try:
        new.touch()
        mode = new.stat().st_mode  # libraries that make the file anew may hide it from others
        write(new)
        new.chmod(mode)
        _sync(new)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written ({error.strerror or error})") from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # systems that cannot open folders keep the name anyway
        _sync(file.parent)


def replace_text(file: Path, text: str) -> None:
    """Writes a text file whole, or leaves the old one."""
    replace_file(file, lambda new: new.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
