"""Data sets and batches: TensorFlow Datasets sources, the embedded digits, grain pipelines.

Nothing here imports TensorFlow, and TFDS and grain are imported only where they are used. This
room knows nothing of the others: what it hands on are NumPy arrays.
"""

from ssvq_jax.data.augment import Affine, Augmentation, HorizontalFlip, Shift
from ssvq_jax.data.embedded import (
    EMBEDDED_NAME,
    prepare_embedded,
    read_digits,
    split_indices,
)
from ssvq_jax.data.normalization import MNIST_NORMALIZATION, Normalization
from ssvq_jax.data.pipeline import (
    Batch,
    BatchIterator,
    EvalBatch,
    eval_batches,
    train_batches,
)
from ssvq_jax.data.sources import load_split
from ssvq_jax.data.splits import ArraySplit, Example, ImageSplit, RecordSplit

__all__ = [
    "EMBEDDED_NAME",
    "MNIST_NORMALIZATION",
    "Affine",
    "ArraySplit",
    "Augmentation",
    "Batch",
    "BatchIterator",
    "EvalBatch",
    "Example",
    "HorizontalFlip",
    "ImageSplit",
    "Normalization",
    "RecordSplit",
    "Shift",
    "eval_batches",
    "load_split",
    "prepare_embedded",
    "read_digits",
    "split_indices",
    "train_batches",
]
