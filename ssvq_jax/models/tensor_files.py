"""Files of tensors by name, of whatever framework."""

from pathlib import Path
from typing import Any

from ssvq_jax.models.read_pth import read_pth

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".bin")


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads the arrays of a ``.safetensors`` file, or of a PyTorch state dict, under their names.

    Raises:
        ValueError: if it cannot be read.
    """
    if path.suffix in PICKLED:
        return read_pth(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the last two of dtypes
        raise ValueError(f"{path} cannot be read as a safetensors file ({error})") from error


def is_foreign(path: Path) -> bool:
    """Whether a file has the names of another framework; only names are read."""
    from safetensors import SafetensorError, safe_open

    if path.suffix in PICKLED:
        return True
    if path.suffix != SAFETENSORS or not path.is_file():
        return False
    try:
        with safe_open(path, "numpy") as file:
            return any(name.endswith((".weight", ".running_mean")) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # who reads the tensors says what is wrong
