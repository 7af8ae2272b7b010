"""One record that says which images a command or notebook works on, and how they are prepared."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssvq_jax.data import sources
from ssvq_jax.data.crop import CenterCrop, Crop, Interpolation, RandomResizedCrop
from ssvq_jax.data.folders import FolderSplit
from ssvq_jax.data.normalization import Normalization
from ssvq_jax.data.pipeline import Batch, EvalBatch, eval_batches, train_batches
from ssvq_jax.data.prefetch import BatchIterator
from ssvq_jax.data.presets import (
    NORMALIZATION_PRESETS,
    augmentation_preset,
    normalization_preset,
)
from ssvq_jax.data.split_ranges import overlap
from ssvq_jax.data.splits import ArraySplit, ImageSplit, RecordSplit


@dataclasses.dataclass(frozen=True)
class ImageData:
    """An image classification set, and what is done to its images.

    With an `image_size` other than the set's own, images are cut to squares: the middle
    `crop_share` of the short side of photographs, the whole of images that are all squares of one
    size. With `augment="imagenet"` or `"deit"`, training cuts at random instead.

    Attributes:
        name: TFDS name, or an image folder, as for `load_split`.
        data_dir: Root of the TFDS directory; None for TFDS's own.
        image_size: Height and width of the images in batches; None for the set's own.
        augment: Key of `AUGMENTATION_PRESETS`. With `"deit"` or `"cifar-deit"`, training batches
            hold mixed images, and `other_label` and `share`.
        normalization: One of `NORMALIZATION_PRESETS`.
        workers: Processes that prepare batches; the batches are the same for any number. A pass
            over images in memory needs none and has none.
        channels: What the files of an image folder are converted to: 3, 1 or 4.
        crop_share: Part of the short side of photographs that evaluation keeps, in (0, 1].
        interpolation: How images are resized: bicubic or bilinear.

    Raises:
        ValueError: A preset is unknown, or a number is out of range.

    Example:
        >>> cifar = ImageData("cifar10", augment="cifar", normalization="cifar10")
        >>> batches = cifar.train("train", 128, seed=0)  # doctest: +SKIP
        >>> next(batches)["image"].shape  # doctest: +SKIP
        (128, 32, 32, 3)
    """

    name: str
    data_dir: Path | None = None
    image_size: int | None = None
    augment: str = "none"
    normalization: str = "auto"
    workers: int = 0
    channels: int = 3
    crop_share: float = 0.875
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        CenterCrop(1, self.crop_share, self.interpolation)  # raises
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size}: give the side in pixels, 1 or more")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: give 0 or more")
        augmentation_preset(self.augment)
        if self.normalization not in NORMALIZATION_PRESETS:
            normalization_preset(self.normalization, 1)  # raises

    def open(self, split: str) -> ImageSplit:
        """Opens a split, images as they are on disk.

        The latest four are kept open, so that none is decoded twice; later changes on disk are not
        seen.

        Args:
            split: Name of a split, or a part of one, as for `load_split`.

        Returns:
            The split.

        Raises:
            ValueError: The set or split is not on disk, or cannot be read.
        """
        return _open(self.name, split, self.data_dir, self.channels)

    def splits(self) -> dict[str, int]:
        """Returns the name of each split and its number of images.

        Raises:
            ValueError: The set is not on disk, or cannot be read.
        """
        return sources.list_splits(self.name, self.data_dir)

    def fingerprint(self) -> str:
        """Returns a fingerprint of the set: of its classes, splits, files and their contents.

        Raises:
            ValueError: The set is not on disk, or cannot be read.
        """
        return sources.fingerprint(self.name, self.data_dir)

    def class_names(self, split: str) -> tuple[str, ...]:
        """Returns the names of the classes, in the order of the labels; empty if unknown."""
        return _open(self.name, split, self.data_dir, self.channels).class_names

    def overlap(self, first: str, second: str) -> bool:
        """Says whether two splits have images in common.

        Raises:
            ValueError: The set is not on disk, or there is no such split.
        """
        return overlap(first, second, self.splits())

    def train(self, split: str, batch_size: int, *, seed: int) -> BatchIterator[Batch]:
        """Returns an endless iterator of shuffled, augmented batches.

        Args:
            split: As for `open`.
            batch_size: Examples a batch.
            seed: Decides order, crops, augmentation and mixing.

        Returns:
            An iterator of `Batch`, images of `image_shape(split)`.

        Raises:
            ValueError: As for `open` and `train_batches`; or images differ in size, or are to be
                cut at random without being squares, and there is no `image_size`.
        """
        source, crop = self._prepared(split, train=True)
        preset = augmentation_preset(self.augment)
        return train_batches(
            source,
            batch_size,
            seed=seed,
            crop=crop,
            augment=preset.augment,
            mix=preset.mix,
            normalization=self._normalization(source),
            workers=self.workers,
        )

    def evaluate(self, split: str, batch_size: int) -> BatchIterator[EvalBatch]:
        """Returns an iterator that passes over a split once, in order.

        Args:
            split: As for `open`.
            batch_size: Examples a batch.

        Returns:
            An iterator of `EvalBatch`, images of `image_shape(split)`.

        Raises:
            ValueError: As for `open` and `eval_batches`.
        """
        source, crop = self._prepared(split, train=False)
        # Each pass would start its processes anew, for images that need no preparation.
        workers = 0 if isinstance(source, ArraySplit) else self.workers
        return eval_batches(
            source,
            batch_size,
            crop=crop,
            normalization=self._normalization(source),
            workers=workers,
        )

    def image_shape(self, split: str) -> tuple[int, int, int]:
        """Returns the shape of the images in batches, `(h, w, c)`.

        Raises:
            ValueError: Images differ in size and there is no `image_size`.
        """
        height, width, channels = self.open(split).image_shape
        if self.image_size is not None:
            return self.image_size, self.image_size, channels
        if height is None or width is None:
            raise ValueError(f"the images of {self.name!r} differ in size: give an image_size")
        return height, width, channels

    def num_classes(self, split: str) -> int:
        """Returns the number of classes: labels are smaller."""
        return self.open(split).num_classes

    def _normalization(self, source: ImageSplit) -> Normalization:
        return normalization_preset(self.normalization, source.image_shape[-1])

    def _prepared(self, split: str, *, train: bool) -> tuple[ImageSplit, Crop | None]:
        """Returns the split, and the crop that batches still need."""
        source = self.open(split)
        height, width, _ = self.image_shape(split)
        scale = augmentation_preset(self.augment).crop_scale
        if train and scale is not None:
            if height != width:
                raise ValueError(
                    f"augment={self.augment!r} cuts squares, the images of {self.name!r} are "
                    f"{height} by {width}: give an image_size"
                )
            return source, RandomResizedCrop(height, scale, interpolation=self.interpolation)
        own_height, own_width, _ = source.image_shape
        if (height, width) == (own_height, own_width):
            return source, None
        framed = own_height is not None and own_height == own_width
        crop = CenterCrop(height, 1.0 if framed else self.crop_share, self.interpolation)
        return _cut(self.name, split, self.data_dir, self.channels, crop)


@functools.lru_cache(maxsize=4)
def _open(
    name: str, split: str, data_dir: Path | None, channels: int
) -> ArraySplit | RecordSplit | FolderSplit:
    return sources.load_split(name, split, data_dir, channels=channels)


@functools.lru_cache(maxsize=4)
def _cut(
    name: str, split: str, data_dir: Path | None, channels: int, crop: CenterCrop
) -> tuple[ImageSplit, CenterCrop | None]:
    """Crops a split once and for all if the result may be kept in memory."""
    source = _open(name, split, data_dir, channels)
    if len(source) * crop.size**2 * source.image_shape[-1] > sources.CACHE_BYTES:
        return source, crop

    def read(index: int) -> tuple[np.ndarray, int]:
        example = source[index]
        return crop(example["image"]), example["label"]

    with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes outside of Python's lock
        images, labels = zip(*threads.map(read, range(len(source))), strict=True)
    return ArraySplit(
        np.stack(images), np.array(labels, np.int32), source.num_classes, source.class_names
    ), None
