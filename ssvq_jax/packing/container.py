"""safetensors files as bytes at offsets, for reading that nothing in the file can lead astray.

The safetensors library maps a whole file into memory to read it; a
file that another process cuts off meanwhile then kills the reader (SIGBUS). Without the map (its
``backend="pread"``) a slice of bytes took it 150 microseconds, and a model has hundreds. So packed
files are read here piece by piece, and a piece that is missing is an error.
"""

import json
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssvq_jax.packing.errors import PackedFileError
from ssvq_jax.packing.segments import DTYPES, Layout

_MOST_HEADER = 100_000_000  # safetensors' own limit


class Container:
    """An open safetensors file.

    Args:
        path: the file.

    Attributes:
        path: the file.
        metadata: the texts of its header.
        header_bytes: what comes before the tensors.
        file_bytes: size of the file.

    Raises:
        PackedFileError: if it is none, saying why.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise PackedFileError(f"{path} is a folder: give a .safetensors file")
        if path.exists() and not path.is_file():  # to open a pipe is to wait for its writer
            raise PackedFileError(f"{path} is no regular file: give a .safetensors file")
        self._lock = threading.Lock()
        # Without a buffer: what another process cuts off or writes over must not come out of it.
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        try:
            self.file_bytes = os.fstat(self._file.fileno()).st_size
            header = self._header()
        except BaseException:
            self.close()
            raise
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._tensors = header

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def read(self, start: int, size: int, what: str) -> bytes:
        """Reads bytes.

        Args:
            start: first byte, counted from the beginning of the file.
            size: number of bytes.
            what: name for messages.

        Raises:
            PackedFileError: if they are not there.
        """
        try:
            with self._lock:
                self._file.seek(start)
                found = self._file.read(size)
                while len(found) < size and (more := self._file.read(size - len(found))):
                    found += more  # a system gives 2 GiB at once at most
        except (OSError, ValueError) as error:
            raise PackedFileError(f"{self.path}: {what} cannot be read ({error})") from error
        if len(found) < size:
            raise PackedFileError(f"{self.path}: {what} is cut off: the file changed meanwhile")
        return found

    def check(self, layout: Layout) -> dict[str, int]:
        """Compares the tensors with what they have to be.

        Args:
            layout: what the header of the packed model makes of the file.

        Returns:
            First byte of every tensor, counted from the beginning of the file.

        Raises:
            PackedFileError: naming the tensor that differs.
        """
        if set(self._tensors) != set(layout.tensors):
            names = sorted(set(self._tensors) ^ set(layout.tensors))
            raise PackedFileError(f"{self.path}: its plan and its tensors differ in {names[:3]}")
        spans = []
        for name, (dtype, count) in layout.tensors.items():
            found = self._tensors[name]
            size = count * jnp.dtype(dtype).itemsize
            match found:
                case {"dtype": code, "shape": [n], "data_offsets": [int(a), int(b)]} if (
                    code == DTYPES[dtype] and n == count and b - a == size and a >= 0
                ):
                    spans.append((a, b, name))
                case _:
                    raise PackedFileError(
                        f"{self.path}: tensor '{name}' is {str(found)[:100]}, and the plan makes "
                        f"it {DTYPES[dtype]}[{count}]"
                    )
        end = 0
        for a, b, name in sorted(spans):
            if a != end:
                raise PackedFileError(f"{self.path}: tensor '{name}' does not follow the others")
            end = b
        if self.header_bytes + end != self.file_bytes:
            raise PackedFileError(
                f"{self.path}: {self.file_bytes:,} bytes instead of {self.header_bytes + end:,}: "
                "it is cut off, or has something behind it"
            )
        return {name: self.header_bytes + a for a, _, name in spans}

    def _header(self) -> dict[str, Any]:
        what = "the header"
        if self.file_bytes < 8:
            raise PackedFileError(f"{self.path}: {self.file_bytes} bytes are no safetensors file")
        size = int.from_bytes(self.read(0, 8, what), "little")
        self.header_bytes = 8 + size
        if size > min(_MOST_HEADER, self.file_bytes - 8):
            raise PackedFileError(
                f"{self.path}: a header of {size:,} bytes in a file of {self.file_bytes:,}: it is "
                "cut off, or no safetensors file"
            )
        try:
            header = json.loads(self.read(8, size, what).decode())
        except (ValueError, RecursionError) as error:
            raise PackedFileError(f"{self.path}: {what} is damaged ({error})") from None
        texts = header.get("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(texts, dict) or not all(map(is_text, texts.values())):
            raise PackedFileError(f"{self.path}: {what} is not that of a safetensors file")
        return header


def write_container(
    path: Path, tensors: Mapping[str, np.ndarray], texts: Mapping[str, str]
) -> None:
    """Writes a safetensors file; equal contents give equal bytes.

    The library writes the texts of the header in an order of its own each time.

    Args:
        path: the file.
        tensors: arrays by name, of dtypes in `ssvq_jax.packing.segments.DTYPES`.
        texts: of the header.

    Raises:
        OSError: if the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # aligned
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    start = 0
    for name in order:
        end = start + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string without half a surrogate pair, which no bytes stand for."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False
