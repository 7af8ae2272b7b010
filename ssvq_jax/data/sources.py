"""Opening image classification sets: TensorFlow Datasets that are on disk, and image folders.

TFDS sets are read from their `array_record` files; TensorFlow itself is not imported.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssvq_jax.data import embedded
from ssvq_jax.data.fingerprint import fingerprint_files
from ssvq_jax.data.folders import FolderSplit, folder_fingerprint, folder_splits, open_folder
from ssvq_jax.data.splits import PILLOW_MODES, ArraySplit, RecordSplit

CACHE_BYTES = 256 * 2**20
"""Sets of at most so many decoded bytes are kept in memory: decoding PNG or JPEG anew in every
epoch costs more than a small model's training step."""


def load_split(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None, *, channels: int = 3
) -> ArraySplit | RecordSplit | FolderSplit:
    """Opens a split of a set that TensorFlow Datasets has on disk, or of an image folder.

    Args:
        name: TFDS name: `"cifar10"`, `"cifar10:3.0.2"`, `"name/config"`. The embedded
            `"mnist_digits_5k"` is written to disk on first use; any other must be there. A name
            that starts with `.` or `~`, or is an absolute path, is an image folder (see
            `open_folder`): `"./flowers"`.
        split: A split as TFDS spells it: `"train"`, `"train[:10%]"`, `"train+validation"`.
        data_dir: Root of the TFDS directory. Default: `$TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`. Image folders don't depend on it.
        channels: What the files of an image folder are converted to, as for `open_folder`. TFDS
            sets have their own.

    Returns:
        An `ArraySplit` where the decoded images are all of one size and take at most
        `CACHE_BYTES`, else a `RecordSplit` or `FolderSplit`.

    Raises:
        ValueError: The set is not on disk, or not in a format with random access; its features
            are not a uint8 `image` and a class `label`; the split is unknown or empty; a folder
            is not one of images (see `open_folder`).

    Example:
        >>> digits = load_split("mnist_digits_5k", "test")  # doctest: +SKIP
        >>> len(digits), digits.image_shape, digits.num_classes  # doctest: +SKIP
        (1500, (28, 28, 1), 10)
    """
    if _is_folder(name):
        return _in_memory(open_folder(name, split, channels))
    with _prepared(name, data_dir) as root:
        return _in_memory(_load(name, split, root))


def list_splits(name: str, data_dir: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Lists the splits of a set or image folder, without reading images.

    Args:
        name: As for `load_split`.
        data_dir: As for `load_split`.

    Returns:
        Name of each split, and its number of images.

    Raises:
        ValueError: The set is not on disk, or the folder is not one of images.

    Example:
        >>> list_splits("mnist_digits_5k")  # doctest: +SKIP
        {'train': 2500, 'validation': 1000, 'test': 1500}
    """
    if _is_folder(name):
        return folder_splits(name)
    with _prepared(name, data_dir) as root:
        return {key: info.num_examples for key, info in _open(name, root).info.splits.items()}


def fingerprint(name: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Computes a fingerprint of a set or image folder: classes, splits, files, contents.

    Args:
        name: As for `load_split`.
        data_dir: As for `load_split`.

    Returns:
        16 hexadecimal digits; see `ssvq_jax.data.fingerprint.fingerprint_files`.

    Raises:
        ValueError: The set is not on disk, or the folder is not one of images.
    """
    if _is_folder(name):
        return folder_fingerprint(name)
    with _prepared(name, data_dir) as root:
        builder = _open(name, root)
        splits = {
            key: (info.num_examples, info.filepaths) for key, info in builder.info.splits.items()
        }
        about = (builder.info.full_name, {key: count for key, (count, _) in splits.items()})
        files = [(path.name, path) for key in sorted(splits) for path in splits[key][1]]
        return fingerprint_files((*about, _features(name, builder)[1]), files)


@contextlib.contextmanager
def _prepared(name: str, data_dir: str | os.PathLike[str] | None) -> Iterator[str | None]:
    """Prepares the embedded set; inside, damaged files raise an error that says what to do.

    Yields:
        Root of the TFDS directory.
    """
    from google.protobuf.json_format import ParseError

    root = embedded.expand_root(data_dir)
    try:
        if name.split(":")[0] == embedded.EMBEDDED_NAME:
            embedded.prepare_embedded(root)
        yield root
    except (RuntimeError, OSError, ParseError) as error:  # what array_record and TFDS raise
        folder = os.path.join(_places(root)[0], name.split(":")[0])  # noqa: PTH118, may be gs://
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder} cannot be read, or is damaged ({reason}): delete that folder and prepare "
            "the set again (the embedded one is prepared by the next run)"
        ) from error


def _is_folder(name: str) -> bool:
    # TFDS names may hold a slash ("name/config"), and may be those of folders here by chance.
    return name.startswith((".", "~")) or Path(name).is_absolute()


def _in_memory(on_disk: RecordSplit | FolderSplit) -> ArraySplit | RecordSplit | FolderSplit:
    """Decodes a split of at most `CACHE_BYTES`."""
    height, width, channels = on_disk.image_shape
    count = len(on_disk)
    if height is None or width is None or count * height * width * channels > CACHE_BYTES:
        return on_disk
    images, labels = on_disk.take(range(count))
    return ArraySplit(images, labels, on_disk.num_classes, on_disk.class_names)


def _load(name: str, split: str, data_dir: str | None) -> RecordSplit:
    """Opens a set that is on disk."""
    import tensorflow_datasets as tfds

    builder = _open(name, data_dir)
    shape, class_names, encoded = _features(name, builder)
    # TFDS decodes with OpenCV or Pillow, whichever is installed, and warns about the latter. JPEG
    # pixels differ between the two; here it is always Pillow.
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    try:
        records = builder.as_data_source(split=split, decoders=decoders)
        len(records)  # raises for an empty slice
    except ValueError as error:
        sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
        raise ValueError(
            f"split {split!r} of {name!r} cannot be read ({str(error).splitlines()[0]}): its "
            f"splits and their sizes are {sizes}; slices are written as in 'train[:10%]' and must "
            "not be empty"
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            f"{name!r} in {builder.data_dir} is stored as {builder.info.file_format}, which has "
            f"no random access: prepare it again with {_build_command(name, 'DIR')}"
        ) from error
    return RecordSplit(records, len(class_names), shape, class_names)


def _open(name: str, data_dir: str | None) -> Any:
    """Opens a prepared set from its files alone, whatever version of it TFDS's code is at.

    Returns:
        A `tfds.core.DatasetBuilder`; Any, because TFDS's decorators hide its methods' signatures.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:  # ValueError: not even a name
        places = _places(data_dir)
        if name == embedded.EMBEDDED_NAME:  # it has a folder, but nothing in it
            raise OSError("the folder holds no data set") from error
        path_like = "/" in name or Path(name).is_dir()
        folder = f"; an image folder is written './{name}'" if path_like else ""
        raise ValueError(
            f"no data set {name!r} in {' or '.join(places)}: give the data_dir that holds it, or "
            f"prepare it with {_build_command(name, places[0])}{folder}. Only "
            f"{embedded.EMBEDDED_NAME!r} comes with the installation"
        ) from error


def _places(data_dir: str | None) -> list[str]:
    """Folders in which TFDS looks for sets."""
    from tensorflow_datasets.core.utils import file_utils

    return [os.fspath(place) for place in file_utils.list_data_dirs(data_dir)]


def _build_command(name: str, data_dir: str) -> str:
    return (
        f"`tfds build {name} --data_dir {data_dir} --file_format array_record` (this command, "
        "unlike reading, needs TensorFlow installed)"
    )


def _features(
    name: str, builder: Any
) -> tuple[tuple[int | None, int | None, int], tuple[str, ...], bool]:
    """Checks that `image` and `label` are what `Example` says.

    Returns:
        Image shape, names of the classes, and whether images are stored as PNG or JPEG.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"{name!r} has the features {sorted(features)}: an image classification set has "
            "'image' and 'label'"
        )
    image, label = features["image"], features["label"]
    if len(image.shape) != 3 or image.np_dtype != np.uint8 or image.shape[-1] not in PILLOW_MODES:
        raise ValueError(
            f"'image' of {name!r} is {image}: only uint8 [h, w, c] with "
            f"{sorted(PILLOW_MODES)} channels can be read"
        )
    if not isinstance(label, tfds.features.ClassLabel) or label.num_classes is None:
        raise ValueError(
            f"'label' of {name!r} is {label}: only a ClassLabel that knows its number of classes "
            "can be read"
        )
    return tuple(image.shape), tuple(label.names), isinstance(image, tfds.features.Image)
