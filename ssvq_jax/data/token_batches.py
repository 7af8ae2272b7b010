"""Batches of token windows, for training language models."""

import dataclasses
import math
import sys
import zlib

import numpy as np
from jaxtyping import Int32, Int64

from ssvq_jax.data.pipeline import EpochOrder
from ssvq_jax.data.prefetch import BatchIterator, PrefetchIterator

# Under the names that training steps know: `image` is what the model is given.
TokenBatch = dict[str, np.ndarray]


def train_token_batches(
    windows: Int32[np.ndarray, "n t"], batch_size: int, *, seed: int
) -> BatchIterator[TokenBatch]:
    """Returns an endless iterator of shuffled windows; each epoch is a new permutation.

    Args:
        windows: of at least 2 tokens.
        batch_size: windows a batch.
        seed: 0 to 2**32 - 1; decides the order.

    Returns:
        An iterator of ``image``, the tokens of each window but the last, and ``label``, those that
        follow each, both int32 ``[b, t - 1]``. Its `get_state()` belongs into the checkpoint.

    Raises:
        ValueError: if there are no windows, or ``batch_size`` is below 1.

    Example:
        >>> batches = train_token_batches(np.arange(6, dtype=np.int32).reshape(2, 3), 2, seed=0)
        >>> batch = next(batches)
        >>> sorted(batch["image"].tolist()), sorted(batch["label"].tolist())
        ([[0, 1], [3, 4]], [[1, 2], [4, 5]])
    """
    import grain

    _check(windows, batch_size)
    load = _TrainLoader(windows, EpochOrder(len(windows), batch_size, seed))
    dataset = grain.MapDataset.range(sys.maxsize).map(load)
    text = zlib.crc32(np.ascontiguousarray(windows).tobytes())
    made_with = {"windows": text, "batch_size": batch_size, "seed": seed}
    return PrefetchIterator(dataset, sys.maxsize, made_with, threads=1, workers=0)


def eval_token_batches(
    windows: Int32[np.ndarray, "n t"], batch_size: int
) -> BatchIterator[TokenBatch]:
    """Returns an iterator that passes over the windows once, in order.

    Args:
        windows: as for `train_token_batches`.
        batch_size: windows a batch; the last one is filled up.

    Returns:
        An iterator of batches as of `train_token_batches`, with ``mask``, bool ``[b]``: False marks
        what fills up.

    Raises:
        ValueError: as for `train_token_batches`.
    """
    import grain

    _check(windows, batch_size)
    dataset = grain.MapDataset.range(sys.maxsize).map(_EvalLoader(windows, batch_size))
    length = math.ceil(len(windows) / batch_size)
    return PrefetchIterator(dataset, length, {"batch_size": batch_size}, threads=1, workers=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainLoader:
    windows: Int32[np.ndarray, "n t"]
    order: EpochOrder

    def __call__(self, number: int) -> TokenBatch:
        return _shifted(self.windows[self.order(number)])


@dataclasses.dataclass(frozen=True, eq=False)
class _EvalLoader:
    windows: Int32[np.ndarray, "n t"]
    batch_size: int

    def __call__(self, number: int) -> TokenBatch:
        numbers: Int64[np.ndarray, " b"] = np.arange(self.batch_size) + number * self.batch_size
        mask = numbers < len(self.windows)
        return {**_shifted(self.windows[np.where(mask, numbers, 0)]), "mask": mask}


def _shifted(windows: Int32[np.ndarray, "b t"]) -> TokenBatch:
    return {"image": windows[:, :-1], "label": windows[:, 1:]}


def _check(windows: Int32[np.ndarray, "n t"], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    if not len(windows) or windows.shape[1] < 2:
        raise ValueError(f"windows of shape {list(windows.shape)}: give some, of 2 tokens or more")
