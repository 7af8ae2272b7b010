"""Opening image classification sets that TensorFlow Datasets has on disk.

Sets are read from their `array_record` files; TensorFlow itself is not imported.
"""

import os
from typing import Any

import numpy as np

from ssvq_jax.data import embedded
from ssvq_jax.data.splits import PILLOW_MODES, ArraySplit, RecordSplit

CACHE_BYTES = 256 * 2**20
"""Sets of at most so many decoded bytes are kept in memory: decoding PNG or JPEG anew in every
epoch costs more than a small model's training step."""


def load_split(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> ArraySplit | RecordSplit:
    """Opens a split of an image classification set that TensorFlow Datasets has on disk.

    Args:
        name: TFDS name: `"cifar10"`, `"cifar10:3.0.2"`, `"name/config"`. The embedded
            `"mnist_digits_5k"` is written to disk on first use; any other must be there.
        split: A split as TFDS spells it: `"train"`, `"train[:10%]"`, `"train+validation"`.
        data_dir: Root of the TFDS directory. Default: `$TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`.

    Returns:
        An `ArraySplit` where the decoded images are all of one size and take at most
        `CACHE_BYTES`, else a `RecordSplit`.

    Raises:
        ValueError: The set is not on disk, or not in a format with random access; its features
            are not a uint8 `image` and a class `label`; the split is unknown or empty.

    Example:
        >>> digits = load_split("mnist_digits_5k", "test")  # doctest: +SKIP
        >>> len(digits), digits.image_shape, digits.num_classes  # doctest: +SKIP
        (1500, (28, 28, 1), 10)
    """
    from google.protobuf.json_format import ParseError

    data_dir = embedded.expand_root(data_dir)
    try:
        if name.split(":")[0] == embedded.EMBEDDED_NAME:
            embedded.prepare_embedded(data_dir)
        return _load(name, split, data_dir)
    except (RuntimeError, OSError, ParseError) as error:  # what array_record and TFDS raise
        folder = os.path.join(_places(data_dir)[0], name.split(":")[0])  # noqa: PTH118, may be gs://
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder} cannot be read, or is damaged ({reason}): delete that folder and prepare "
            "the set again (the embedded one is prepared by the next run)"
        ) from error


def _load(name: str, split: str, data_dir: str | None) -> ArraySplit | RecordSplit:
    """Opens a set that is on disk."""
    import tensorflow_datasets as tfds

    builder = _open(name, data_dir)
    shape, num_classes, encoded = _features(name, builder)
    # TFDS decodes with OpenCV or Pillow, whichever is installed, and warns about the latter. JPEG
    # pixels differ between the two; here it is always Pillow.
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    try:
        records = builder.as_data_source(split=split, decoders=decoders)
        count = len(records)
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
    on_disk = RecordSplit(records, num_classes, shape)
    height, width, channels = shape
    if height is None or width is None or count * height * width * channels > CACHE_BYTES:
        return on_disk
    images, labels = on_disk.take(range(count))
    return ArraySplit(images, labels, num_classes)


def _open(name: str, data_dir: str | None) -> Any:
    """Opens a prepared set from its files alone, whatever version of it TFDS's code is at.

    Returns:
        A `tfds.core.DatasetBuilder`; Any, because TFDS's decorators hide its methods' signatures.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        places = _places(data_dir)
        if name == embedded.EMBEDDED_NAME:  # it has a folder, but nothing in it
            raise OSError("the folder holds no data set") from error
        raise ValueError(
            f"no data set {name!r} in {' or '.join(places)}: give the data_dir that holds it, or "
            f"prepare it with {_build_command(name, places[0])}. Only "
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


def _features(name: str, builder: Any) -> tuple[tuple[int | None, int | None, int], int, bool]:
    """Checks that `image` and `label` are what `Example` says.

    Returns:
        Image shape, number of classes, and whether images are stored as PNG or JPEG.
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
    return tuple(image.shape), label.num_classes, isinstance(image, tfds.features.Image)
