"""Batches for training and evaluation, on grain.

Order and augmentation are functions of the seed and the batch's number alone, so a run that
resumes from an iterator's state sees what it would have seen without the interruption.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, UInt8

from ssvq_jax.data.augment import Augmentation
from ssvq_jax.data.normalization import MNIST_NORMALIZATION, Normalization
from ssvq_jax.data.splits import ImageSplit

_BUFFERED_BATCHES = 4  # enough to hide the preparation behind a training step


class Batch(TypedDict):
    """`image`, normalised float32 `[b, h, w, c]`, and `label`, int32 `[b]`."""

    image: Float32[np.ndarray, "b h w c"]
    label: Int32[np.ndarray, " b"]


class EvalBatch(Batch):
    """A `Batch` with `mask`, bool `[b]`: False marks the padding at the end of the last batch."""

    mask: Bool[np.ndarray, " b"]


BatchT = TypeVar("BatchT", covariant=True)


@runtime_checkable
class BatchIterator(Iterator[BatchT], Protocol[BatchT]):
    """An iterator of batches whose position can be saved: grain's `DatasetIterator`."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position, as JSON-serialisable values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position of an iterator that was made with the same arguments."""
        ...


def train_batches(
    source: ImageSplit,
    batch_size: int,
    *,
    seed: int,
    augment: Sequence[Augmentation] = (),
    normalization: Normalization = MNIST_NORMALIZATION,
    threads: int = 1,
) -> BatchIterator[Batch]:
    """Returns an endless iterator of shuffled, augmented batches.

    Each epoch is a new permutation of the split, and epochs follow each other without a gap: a
    batch may hold the end of one and the start of the next, so all are full and no example is
    left out.

    Args:
        source: Images and labels, all images of one size.
        batch_size: Examples a batch.
        seed: 0 to 2**32 - 1; decides order and augmentation.
        augment: Augmentations, applied in order to pixels in [0, 1], before normalisation.
        normalization: Mean and standard deviation of the channels.
        threads: Background threads that prepare batches ahead; 0 prepares each in `next`. More
            than one pays only where `source` reads and decodes files. The batches are the same.

    Returns:
        An iterator of `Batch`. Its `get_state()` belongs into the checkpoint.

    Raises:
        ValueError: An argument is out of range, `source` is empty or has images of several sizes,
            or `normalization` is for another number of channels.

    Example:
        >>> from ssvq_jax.data import ArraySplit
        >>> images = np.zeros((5, 28, 28, 1), np.uint8)
        >>> split = ArraySplit(images, np.arange(5, dtype=np.int32), num_classes=10)
        >>> batches = train_batches(split, 4, seed=0)
        >>> next(batches)["image"].shape
        (4, 28, 28, 1)
        >>> state = batches.get_state()
    """
    import grain

    _check(source, batch_size, normalization, threads)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: give 0 to 2**32 - 1")
    augmentations = tuple(augment)
    order = _EpochOrder(len(source), batch_size, seed)

    def load(number: int, generator: np.random.Generator) -> Batch:
        images, labels = source.take(order(number))
        pixels = _to_unit(images)
        for augmentation in augmentations:
            pixels = augmentation(pixels, generator)
        return {"image": normalization(pixels), "label": labels}

    # grain counts the batches and draws each one's generator from (seed, number). Its shuffle
    # and batch stages would handle every index by itself: 1.5 ms for 128 of them, against 0.01.
    return _iterate(grain.MapDataset.range(sys.maxsize).seed(seed).random_map(load), threads)


def eval_batches(
    source: ImageSplit,
    batch_size: int,
    *,
    normalization: Normalization = MNIST_NORMALIZATION,
    threads: int = 1,
) -> BatchIterator[EvalBatch]:
    """Returns an iterator that passes over the split once, in order.

    The last batch is filled up with zeros, so that a jitted step sees one shape. Sums over real
    examples: `jnp.sum(correct, where=batch["mask"])`.

    Args:
        source: Images and labels, all images of one size.
        batch_size: Examples a batch; may exceed the split.
        normalization: Mean and standard deviation of the channels.
        threads: Background threads that prepare batches ahead, as in `train_batches`.

    Returns:
        An iterator of `EvalBatch`.

    Raises:
        ValueError: As for `train_batches`.
    """
    import grain

    _check(source, batch_size, normalization, threads)

    def load(indices: np.ndarray) -> EvalBatch:
        images, labels = source.take(indices)
        mask = np.ones(len(labels), np.bool_)
        missing = batch_size - len(labels)
        return {
            "image": _pad(normalization(_to_unit(images)), missing),
            "label": _pad(labels, missing),
            "mask": _pad(mask, missing),
        }

    return _iterate(grain.MapDataset.range(len(source)).batch(batch_size).map(load), threads)


class _EpochOrder:
    """Which examples the numbered batches of an endless sequence of permutations hold."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        # A batch may need two epochs, or several where it exceeds the split.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> Int64[np.ndarray, " n"]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)

    def __call__(self, number: int) -> Int64[np.ndarray, " b"]:
        positions = np.arange(number * self._batch_size, (number + 1) * self._batch_size)
        epochs, places = np.divmod(positions, self._count)
        parts = [
            self._permutation(epoch)[places[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)


def _iterate(dataset: Any, threads: int) -> Any:
    import grain

    # grain's own defaults, 16 threads and 500 elements, are meant for single examples.
    buffered = max(_BUFFERED_BATCHES, threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)
    return dataset.to_iter_dataset(options).__iter__()


def _to_unit(images: UInt8[np.ndarray, "b h w c"]) -> Float32[np.ndarray, "b h w c"]:
    return images.astype(np.float32) / np.float32(255)


def _pad(values: Shaped[np.ndarray, "n ..."], missing: int) -> Shaped[np.ndarray, "m ..."]:
    return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))


def _check(source: ImageSplit, batch_size: int, normalization: Normalization, threads: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    if threads < 0:
        raise ValueError(f"threads={threads}: give 0 or more")
    if not len(source):
        raise ValueError("the split holds no examples: there is nothing to make batches of")
    if None in source.image_shape:
        raise ValueError(
            f"image_shape={source.image_shape}: images of several sizes cannot be batched; resize "
            "them and give an ArraySplit of the result"
        )
    if len(normalization.mean) != source.image_shape[-1]:
        raise ValueError(
            f"{normalization} has {len(normalization.mean)} channels, the images have "
            f"{source.image_shape[-1]}: give a Normalization with one mean and std for each"
        )
