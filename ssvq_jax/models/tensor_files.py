"""Files of tensors by name, of whatever framework: safetensors, alone or in shards, and PyTorch."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssvq_jax.json_files import read_json
from ssvq_jax.models.read_pth import read_pth

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".bin")
_INDEX = ".safetensors.index.json"
_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    # The safetensors library has no NumPy type for these.
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def is_tensors(path: Path) -> bool:
    """Whether a path is what `load_tensors` reads: a file of tensors, shards or their index."""
    if path.is_dir():
        return any(path.glob(f"*{SAFETENSORS}"))
    return path.suffix in (SAFETENSORS, *PICKLED) or path.name.endswith(_INDEX)


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads arrays under their names.

    Args:
        path: a ``.safetensors`` file, a PyTorch state dict, the index of shards
            (``model.safetensors.index.json``), or a folder with shards.

    Returns:
        Arrays by name.

    Raises:
        ValueError: if it cannot be read, holds no tensors, or lacks some of its index.
    """
    if path.is_dir():
        return _load_folder(path)
    if path.name.endswith(_INDEX):
        return _load_shards(path)
    if path.suffix in PICKLED:
        return read_pth(path)
    tensors = _load_safetensors(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors: give a file with weights")
    return tensors


def is_foreign(path: Path) -> bool:
    """Whether tensors have the names of another framework; only names are read."""
    from safetensors import SafetensorError, safe_open

    if path.suffix in PICKLED:
        return True
    if path.is_dir() or path.name.endswith(_INDEX):
        folder = path if path.is_dir() else path.parent
        return any(map(is_foreign, folder.glob(f"*{SAFETENSORS}")))
    if path.suffix != SAFETENSORS or not path.is_file():
        return False
    try:
        with safe_open(path, "numpy") as file:
            return any(name.endswith((".weight", ".running_mean")) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # who reads the tensors says what is wrong


def _load_folder(folder: Path) -> dict[str, Any]:
    """Reads what the index of a folder lists, else its only file of tensors."""
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    if len(indexes) == 1:
        return _load_shards(indexes[0])
    files = sorted(folder.glob(f"*{SAFETENSORS}"))
    if len(files) == 1:
        return load_tensors(files[0])
    if not files:
        raise ValueError(f"{folder} holds no {SAFETENSORS} file: give a folder with weights")
    found = ", ".join(file.name for file in indexes or files)
    what = "indexes of shards" if indexes else f"{SAFETENSORS} files without an index"
    raise ValueError(f"{folder} has {what} ({found}): give one of its files")


def _load_shards(index: Path) -> dict[str, Any]:
    data = read_json(index)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
        raise ValueError(f"{index} is no index of shards: it needs a 'weight_map' of file names")
    tensors: dict[str, Any] = {}
    for name in sorted(set(listed.values())):
        if Path(name).name != name or not name.endswith(SAFETENSORS):
            raise ValueError(
                f"{index} names the shard '{name}': shards are {SAFETENSORS} files in the same "
                "folder"
            )
        tensors |= _load_safetensors(index.parent / name)
    if missing := sorted(set(listed) - set(tensors)):
        raise ValueError(f"{index} lists {len(missing)} missing tensors, e.g. '{missing[0]}'")
    return tensors


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, deserialize
    from safetensors.numpy import load_file

    try:
        try:
            return load_file(path)
        except (AttributeError, TypeError):  # float8
            parts = deserialize(path.read_bytes())
            return {name: _array(path, name, part) for name, part in parts}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error})") from error


def _array(path: Path, name: str, part: dict[str, Any]) -> np.ndarray:
    """A tensor of any dtype that safetensors and JAX have in common."""
    dtype = _DTYPES.get(part["dtype"])
    if dtype is None:
        raise ValueError(
            f"{path}: tensor '{name}' is of type {part['dtype']}, which cannot be read: convert it "
            "to float32"
        )
    return np.frombuffer(part["data"], jnp.dtype(dtype)).reshape(part["shape"])
