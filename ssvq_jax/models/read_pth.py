"""Tensors of PyTorch's ``.pth`` files, without PyTorch and without running what is in them.

Such a file is a pickle, which may name any function to be called. Here it may name those that put
tensors together, and these are our own stand-ins: anything else is refused.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # of files before PyTorch 1.6, which are several pickles on end
_DTYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}
_INSIDE = ("state_dict", "model_state_dict", "model", "params", "net")  # of training checkpoints


class _Storage(NamedTuple):
    """Numbers in a file, which tensors are views of."""

    dtype: Any
    key: str
    numbers: int


class _View(NamedTuple):
    """A tensor as the pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a ``.pth`` or ``.pt`` file, of PyTorch's present and former format.

    Args:
        path: what ``torch.save`` wrote of a state dict, or of a dictionary that holds one under
            ``state_dict`` or ``model``.

    Returns:
        The tensors by name.

    Raises:
        ValueError: if the file is damaged, holds no state dict, or more than tensors: a whole model
            is code, which is not run.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        content, storages = _read_zip(path) if zipped else _read_legacy(path)
        return {name: _tensor(view, storages) for name, view in _state_dict(content).items()}
    except (OSError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error,
            zlib.error, AttributeError, IndexError, MemoryError, OverflowError, RuntimeError,
            TypeError, ValueError) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a PyTorch state dict ({reason}): save one with "
            "torch.save(model.state_dict(), path), or give a .safetensors file"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Gives the stand-in for a class or function."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        found = _STAND_INS.get((module, name))
        if found is None:
            raise ValueError(f"it holds {module}.{name}, not tensors alone")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        """Gives the storage that an id in the pickle stands for."""
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise ValueError("it shares storages in a way that is not known")
        return _Storage(np.dtype(dtype), str(key), int(count))


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(view: _View, *_: Any) -> _View:
    return view


_STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
}
_Storages = Mapping[str, bytes]


def _read_zip(path: Path) -> tuple[Any, _Storages]:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            order = archive.read(f"{folder}byteorder")
            if order != b"little":
                raise ValueError(f"its bytes are in the order {order!r}, not 'little'")
        content = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        storages = {}
        for info in archive.infolist():
            if info.filename.startswith(f"{folder}data/"):
                if info.compress_type != zipfile.ZIP_STORED:  # as PyTorch writes; no bombs
                    raise ValueError("its storages are compressed")
                storages[info.filename.removeprefix(f"{folder}data/")] = archive.read(info)
    return content, storages


def _read_legacy(path: Path) -> tuple[Any, _Storages]:
    with path.open("rb") as file:
        if _Unpickler(file).load() != _MAGIC:
            raise ValueError("it does not begin as such a file does")
        _Unpickler(file).load()  # the version of the format
        if not _Unpickler(file).load().get("little_endian", True):
            raise ValueError("its bytes are in big-endian order")
        content = _Unpickler(file).load()
        keys = _Unpickler(file).load()
        sizes = {view.storage.key: view.storage for view in _views(content)}
        storages = {}
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            storage = sizes.get(str(key))
            if storage is None or storage.numbers != count:
                raise ValueError(f"its storage {key!r} is of no tensor, or of another size")
            storages[str(key)] = file.read(count * storage.dtype.itemsize)
    return content, storages


def _views(content: Any) -> list[_View]:
    if isinstance(content, _View):
        return [content]
    if isinstance(content, Mapping):
        return [view for value in content.values() for view in _views(value)]
    if isinstance(content, list | tuple):
        return [view for value in content for view in _views(value)]
    return []


def _state_dict(content: Any) -> dict[str, _View]:
    for name in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    found = dict(content) if isinstance(content, Mapping) else {}
    others = [str(name) for name, view in found.items() if not isinstance(view, _View)]
    if others or not found:
        raise ValueError(f"no tensors by name; {others[:3]} are something else" if others else
                         f"it holds a {type(content).__name__}")  # fmt: skip
    return {str(name): view for name, view in found.items()}


def _tensor(view: _View, storages: _Storages) -> np.ndarray:
    storage = view.storage
    flat = np.frombuffer(storages[storage.key], storage.dtype)
    size = math.prod(view.shape)
    if len(flat) != storage.numbers or len(view.shape) != len(view.strides):
        raise ValueError("a storage is cut short")
    last = view.offset + sum(
        (n - 1) * step for n, step in zip(view.shape, view.strides, strict=True)
    )
    inside = min((view.offset, *view.strides, *view.shape)) >= 0 and last < len(flat)
    if size and (not inside or size > len(flat)):
        raise ValueError("a tensor reaches beyond its storage")
    if not size:
        return np.zeros(view.shape, storage.dtype)
    strides = [step * flat.itemsize for step in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides).copy()
