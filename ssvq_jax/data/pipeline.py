"""Batches for training and evaluation, on grain.

Order and augmentation are functions of the seed and the batch's number alone, so a run that
resumes from an iterator's state sees what it would have seen without the interruption.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, UInt8

from ssvq_jax.data.augment import Augmentation
from ssvq_jax.data.crop import Crop
from ssvq_jax.data.mixing import Mixing
from ssvq_jax.data.normalization import MNIST_NORMALIZATION, Normalization
from ssvq_jax.data.prefetch import BatchIterator, PrefetchIterator
from ssvq_jax.data.splits import ImageSplit


class Batch(TypedDict):
    """`image`, normalised float32 `[b, h, w, c]`, and `label`, int32 `[b]`.

    Of mixed images, also the partner's label, `other_label`, int32 `[b]`, and the weight `share` of
    the image's own, float32 `[b]`.
    """

    image: Float32[np.ndarray, "b h w c"]
    label: Int32[np.ndarray, " b"]
    other_label: NotRequired[Int32[np.ndarray, " b"]]
    share: NotRequired[Float32[np.ndarray, " b"]]


class EvalBatch(Batch):
    """A `Batch` with `mask`, bool `[b]`: False marks the padding at the end of the last batch."""

    mask: Bool[np.ndarray, " b"]


def train_batches(
    source: ImageSplit,
    batch_size: int,
    *,
    seed: int,
    crop: Crop | None = None,
    augment: Sequence[Augmentation] = (),
    mix: Mixing | None = None,
    normalization: Normalization = MNIST_NORMALIZATION,
    threads: int = 1,
    workers: int = 0,
) -> BatchIterator[Batch]:
    """Returns an endless iterator of shuffled, augmented batches.

    Each epoch is a new permutation of the split, and epochs follow each other without a gap: a
    batch may hold the end of one and the start of the next, so all are full and no example is
    left out.

    Args:
        source: Images and labels; without a `crop`, all images of one size.
        batch_size: Examples a batch.
        seed: 0 to 2**32 - 1; decides order, crops, augmentation and mixing.
        crop: Cuts each image to one size.
        augment: Augmentations, applied in order to pixels in [0, 1], before normalisation.
        mix: Mixes images and labels within the batch, after augmentation and before normalisation.
        normalization: Mean and standard deviation of the channels.
        threads: Background threads that prepare batches ahead, in each process; 0 prepares each
            in `next`. More than one pays only where `source` reads and decodes files.
        workers: Processes that prepare batches ahead; 0 does it in this one. They start in the
            first `next`, within seconds, each with a copy of `source`, and pay where decoding,
            crops and augmentation take longer than a training step. The batches are the same on
            any number of threads and workers.

    Returns:
        An iterator of `Batch`. Its `get_state()` belongs into the checkpoint.

    Raises:
        ValueError: An argument is out of range, `source` is empty, or has images of several sizes
            and there is no `crop`, or `normalization` is for another number of channels.

    Example:
        >>> from ssvq_jax.data import ArraySplit
        >>> images = np.zeros((5, 28, 28, 1), np.uint8)
        >>> split = ArraySplit(images, np.arange(5, dtype=np.int32), num_classes=10)
        >>> batches = train_batches(split, 4, seed=0)
        >>> next(batches)["image"].shape
        (4, 28, 28, 1)
        >>> batches.get_state()
        {'batches': 1, 'examples': 5, 'batch_size': 4, 'seed': 0}
    """
    import grain

    _check(source, batch_size, crop, normalization, threads, workers)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: give 0 to 2**32 - 1")
    order = EpochOrder(len(source), batch_size, seed)
    load = _TrainLoader(source, order, crop, tuple(augment), mix, normalization)
    # grain counts the batches and draws each one's generator from (seed, number). Its shuffle
    # and batch stages would handle every index by itself: 1.5 ms for 128 of them, against 0.01.
    dataset = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(load)
    made_with = {"examples": len(source), "batch_size": batch_size, "seed": seed}
    return PrefetchIterator(dataset, sys.maxsize, made_with, threads=threads, workers=workers)


def eval_batches(
    source: ImageSplit,
    batch_size: int,
    *,
    crop: Crop | None = None,
    normalization: Normalization = MNIST_NORMALIZATION,
    threads: int = 1,
    workers: int = 0,
) -> BatchIterator[EvalBatch]:
    """Returns an iterator that passes over the split once, in order.

    The last batch is filled up with zeros, so that a jitted step sees one shape. Sums over real
    examples: `jnp.sum(correct, where=batch["mask"])`.

    Args:
        source: Images and labels; without a `crop`, all images of one size.
        batch_size: Examples a batch; may exceed the split.
        crop: Cuts each image to one size; it is given no generator.
        normalization: Mean and standard deviation of the channels.
        threads: Background threads that prepare batches ahead, as in `train_batches`.
        workers: Processes that prepare batches ahead, as in `train_batches`.

    Returns:
        An iterator of `EvalBatch`.

    Raises:
        ValueError: As for `train_batches`.
    """
    import grain

    _check(source, batch_size, crop, normalization, threads, workers)
    load = _EvalLoader(source, batch_size, crop, normalization)
    dataset = grain.MapDataset.range(sys.maxsize).map(load)
    length = math.ceil(len(source) / batch_size)
    made_with = {"examples": len(source), "batch_size": batch_size}
    return PrefetchIterator(dataset, length, made_with, threads=threads, workers=workers)


# Loaders are records and not closures because worker processes are sent them.


@dataclasses.dataclass(frozen=True)
class _TrainLoader:
    """Makes the training batch of a number."""

    source: ImageSplit
    order: "EpochOrder"
    crop: Crop | None
    augment: tuple[Augmentation, ...]
    mix: Mixing | None
    normalization: Normalization

    def __call__(self, number: int, generator: np.random.Generator) -> Batch:
        images, labels = _read(self.source, self.order(number), self.crop, generator)
        pixels = _to_unit(images)
        for augmentation in self.augment:
            pixels = augmentation(pixels, generator)
        if self.mix is None:
            return {"image": self.normalization(pixels), "label": labels}
        mixed = self.mix(pixels, labels, generator)
        return {
            "image": self.normalization(mixed.images),
            "label": labels,
            "other_label": mixed.other_labels,
            "share": mixed.shares,
        }


@dataclasses.dataclass(frozen=True)
class _EvalLoader:
    """Makes the evaluation batch of a number; an empty one past the end of the split."""

    source: ImageSplit
    batch_size: int
    crop: Crop | None
    normalization: Normalization

    def __call__(self, number: int) -> EvalBatch | dict[str, Any]:
        start = number * self.batch_size
        indices = np.arange(start, min(start + self.batch_size, len(self.source)))
        if not len(indices):
            return {}
        images, labels = _read(self.source, indices, self.crop, None)
        mask = np.ones(len(labels), np.bool_)
        missing = self.batch_size - len(labels)
        return {
            "image": _pad(self.normalization(_to_unit(images)), missing),
            "label": _pad(labels, missing),
            "mask": _pad(mask, missing),
        }


class EpochOrder:
    """Which examples the numbered batches of an endless sequence of permutations hold."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        # A batch may need two epochs, or several where it exceeds the split.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def __reduce__(self) -> tuple[Any, ...]:
        return EpochOrder, (self._count, self._batch_size, self._seed)  # without the cache

    def _permute(self, epoch: int) -> Int64[np.ndarray, " n"]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)

    def __call__(self, number: int) -> Int64[np.ndarray, " b"]:
        """Numbers of the examples in the batch of a number."""
        positions = np.arange(number * self._batch_size, (number + 1) * self._batch_size)
        epochs, places = np.divmod(positions, self._count)
        parts = [
            self._permutation(epoch)[places[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)


def _read(
    source: ImageSplit,
    indices: Int64[np.ndarray, " b"],
    crop: Crop | None,
    generator: np.random.Generator | None,
) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
    if crop is None:
        return source.take(indices)
    images, labels = [], []
    for index in indices:  # one image after the other: it may be a large photograph
        example = source[int(index)]
        images.append(crop(example["image"], generator))
        labels.append(example["label"])
    return np.stack(images), np.array(labels, np.int32)


def _to_unit(images: UInt8[np.ndarray, "b h w c"]) -> Float32[np.ndarray, "b h w c"]:
    return images.astype(np.float32) / np.float32(255)


def _pad(values: Shaped[np.ndarray, "n ..."], missing: int) -> Shaped[np.ndarray, "m ..."]:
    return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))


def _check(
    source: ImageSplit,
    batch_size: int,
    crop: Crop | None,
    normalization: Normalization,
    threads: int,
    workers: int,
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    if threads < 0:
        raise ValueError(f"threads={threads}: give 0 or more")
    if workers < 0:
        raise ValueError(f"workers={workers}: give 0 or more")
    if not len(source):
        raise ValueError("the split holds no examples: there is nothing to make batches of")
    if crop is None and None in source.image_shape:
        raise ValueError(
            f"image_shape={source.image_shape}: images of several sizes cannot be batched; give an "
            "image size, or a crop such as CenterCrop(224)"
        )
    if len(normalization.mean) != source.image_shape[-1]:
        raise ValueError(
            f"{normalization} has {len(normalization.mean)} channels, the images have "
            f"{source.image_shape[-1]}: give a Normalization with one mean and std for each"
        )
