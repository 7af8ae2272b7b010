"""Random access to labelled images: decoded arrays in memory, or records on disk."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels to the mode in which Pillow decodes such an image."""


class Example(TypedDict):
    """One example: `image`, uint8 `[h, w, c]`, and `label`, its class."""

    image: UInt8[np.ndarray, "h w c"]
    label: int


@runtime_checkable
class ImageSplit(Protocol):
    """Random access to labelled uint8 images.

    Attributes:
        num_classes: Labels are 0 to `num_classes - 1`.
        image_shape: `(h, w, c)`; h and w are None where images differ in size.
    """

    @property
    def num_classes(self) -> int: ...  # noqa: D102

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def take(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """Returns the images and labels at `indices`, stacked."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split held in memory as decoded arrays.

    Attributes:
        images: uint8 `[n, h, w, c]`.
        labels: int32 `[n]`, 0 to `num_classes - 1`.
        num_classes: Number of classes.
        class_names: Their names, where known.

    Raises:
        ValueError: Shapes, dtypes or label values are not as above.

    Example:
        >>> images = np.zeros((4, 28, 28, 1), np.uint8)
        >>> split = ArraySplit(images, np.array([3, 1, 4, 1], np.int32), num_classes=10)
        >>> len(split), split.image_shape, split[2]["label"]
        (4, (28, 28, 1), 4)
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}: give uint8 [n, h, w, c]"
            )
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)}: give int32 [{len(images)}], one "
                "for each image"
            )
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(
                f"labels run from {labels.min()} to {labels.max()}: num_classes="
                f"{self.num_classes} allows 0 to {self.num_classes - 1}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, `(h, w, c)`."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def take(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """Returns the images and labels at `indices`, copied."""
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSplit:
    """A split on disk; an example is read and decoded each time it is asked for.

    Attributes:
        records: TFDS data source whose items are `{"image": encoded bytes or uint8 [h, w, c],
            "label": int}`.
        num_classes: Number of classes.
        image_shape: `(h, w, c)`; h and w are None where images differ in size.
        class_names: Names of the classes, where known.
    """

    records: Sequence[Any]
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        image = _decode(record["image"], self.image_shape[-1])
        return {"image": image, "label": int(record["label"])}

    def take(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """Returns the images and labels at `indices`, stacked.

        Raises:
            ValueError: The images differ in size.
        """
        examples = [self[int(index)] for index in indices]
        images = np.stack([example["image"] for example in examples])
        return images, np.array([example["label"] for example in examples], np.int32)


def _decode(
    image: bytes | UInt8[np.ndarray, "h w c"], channels: int
) -> UInt8[np.ndarray, "h w {channels}"]:
    """Decodes PNG or JPEG bytes; passes arrays, which `features.Tensor` gives, through."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return image
    with Image.open(io.BytesIO(image)) as picture:
        pixels = np.array(picture.convert(PILLOW_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)
