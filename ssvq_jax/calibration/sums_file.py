"""Sums that were read so far, in a file: an interrupt costs what came after the last save."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from ssvq_jax.atomic import replace_file

FORMAT = "ssvq_jax sums of inputs 1"
_ABOUT = "about"  # no leaf is named so: leaves are matrix/PATH and count/PATH


@dataclasses.dataclass(frozen=True)
class SumsSoFar:
    """Where a pass over the data is.

    Attributes:
        matrices: sums of x^T x by leaf path, float32 ``[*stacked, c, c]``.
        counts: numbers of inputs by leaf path, int64 ``[*stacked]``.
        axes: by leaf path, as in `InputMoments`.
        batches: how many were read.
        done: these are all.
        identity: what they were read with; sums of another model are not gone on with.
    """

    matrices: Mapping[str, Any]
    counts: Mapping[str, np.ndarray]
    axes: Mapping[str, tuple[int, ...]]
    batches: int
    done: bool
    identity: str


def save_sums(file: Path, sums: SumsSoFar) -> None:
    """Writes sums to a file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    tensors = {f"matrix/{path}": np.asarray(x) for path, x in sums.matrices.items()}
    tensors |= {f"count/{path}": np.asarray(x, np.int64) for path, x in sums.counts.items()}
    about = {
        "format": FORMAT,
        "axes": {path: list(axes) for path, axes in sums.axes.items()},
        "batches": sums.batches,
        "done": sums.done,
        "identity": sums.identity,
    }
    tensors[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    replace_file(file, lambda new: save_file(tensors, new))


def load_sums(file: Path) -> SumsSoFar:
    """Reads what `save_sums` wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        # The bytes are read, not mapped: a mapped file that is cut off kills the process.
        tensors = load(file.read_bytes())
        about = json.loads(tensors.pop(_ABOUT).tobytes())
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, this version reads {FORMAT!r}")
        axes = {path: tuple(axes) for path, axes in about["axes"].items()}
        return SumsSoFar(
            matrices={path: tensors[f"matrix/{path}"] for path in axes},
            counts={path: tensors[f"count/{path}"] for path in axes},
            axes=axes,
            batches=about["batches"],
            done=about["done"],
            identity=about["identity"],
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} holds no sums of inputs ({error}): delete it, or give another folder"
        ) from error


def check_sums(
    file: Path, sums: SumsSoFar, wanted: Mapping[str, jax.ShapeDtypeStruct], identity: str
) -> None:
    """Raises ValueError, naming the file, if its sums are not those of this run."""
    shapes = {path: np.shape(matrix) for path, matrix in sums.matrices.items()}
    others = sorted(
        path
        for path in shapes.keys() | wanted.keys()
        if path not in shapes or path not in wanted or shapes[path] != wanted[path].shape
    )
    if others:
        raise ValueError(
            f"{file} holds sums of other leaves, or other sizes of them, e.g. '{others[0]}': give "
            "another folder, or the plan and most_bytes that it was begun with"
        )
    if sums.identity != identity:
        raise ValueError(
            f"{file} holds sums that were read with other weights or other data: give another "
            "folder, or those"
        )
