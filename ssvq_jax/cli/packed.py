"""Packed files as commands write and open them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.options import INHERITED

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.packing import Codec
    from ssvq_jax.plan import Packed

PACKED = "model.safetensors"  # in the folder of a run

# A file goes to other machines, and its batch statistics are those that it was judged with.
_OF_THE_RUN = frozenset({"data_dir", "batch_norm_batches"})
_SHAPES = frozenset({"image_shape", "outputs", "classes_crc32", "data_fingerprint"})
_LANGUAGE = frozenset({"task", "sizes", "vocabulary_crc32", "float_crc32"})


def write_packed(
    path: Path,
    packed: "Packed",
    model_state: Any,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    codec: "Codec" = "plain",
) -> dict[str, Any]:
    """Writes a packed model that commands can open again.

    Args:
        path: the file.
        packed: the finalized model.
        model_state: the model's other collections.
        config: of the run: tells model and data.
        metrics: quality of this very model.
        codec: see `ssvq_jax.save`.

    Returns:
        The file's size and ratio, for results.
    """
    from ssvq_jax.packing import save

    told = {
        name: value
        for name, value in config.items()
        if name in (INHERITED | _SHAPES | _LANGUAGE) - _OF_THE_RUN and value is not None
    }
    figures = {  # JSON has no NaN
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    save(path, packed, codec=codec, state=model_state or None, model=told, metrics=figures)
    return file_size(path, packed.plan.bits().model.weights)


def file_size(path: Path, weights: int) -> dict[str, Any]:
    """Bytes of a file, and the file ratio: float32 bytes of the model over them."""
    size = path.stat().st_size
    return {"file_bytes": size, "file_ratio": 4 * weights / size}


def packed_config(path: Path | None) -> dict[str, Any] | None:
    """What a packed file says of model and data, if it is one.

    Raises:
        PackedFileError: if it is damaged.
    """
    from ssvq_jax.packing import is_packed, load

    if path is None or not path.is_file() or not is_packed(path):
        return None
    with load(path) as file:
        return dict(file.model)
