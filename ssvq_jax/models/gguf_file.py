"""GGUF files: their metadata and tensors, read with the package `gguf` of llama.cpp."""

from pathlib import Path
from typing import Any

INSTALL = "pip install 'ssvq_jax[language]'"


class GgufFile:
    """A GGUF file that was found to be whole.

    Args:
        path: the file.

    Raises:
        ImportError: without the package `gguf`.
        ValueError: if there is no such file, or it is damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError(f"GGUF files need the package gguf: {INSTALL}") from error

        if not path.is_file():
            raise ValueError(f"no GGUF file {path}")
        self.path = path
        try:
            reader = GGUFReader(path)
            self._metadata = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # what a wrong byte makes the reader stumble over
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{path} is not a GGUF file, or is damaged or cut short ({reason}): get it again"
            ) from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Reads a value of the metadata.

        Args:
            key: its key.
            kind: the type it must have.
            default: what stands for a missing one; None if it must be there.

        Raises:
            ValueError: if it is missing, or of another type.
        """
        value = self._metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} has no metadata '{key}'")
        if not isinstance(value, kind):
            raise ValueError(f"{self.path}: metadata '{key}' is {str(value)[:40]!r}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._metadata
