"""Data sets and batches: TensorFlow Datasets, image folders, the embedded digits, grain pipelines.

Nothing here imports TensorFlow, and TFDS and grain are imported only where they are used. This
room knows nothing of the others: what it hands on are NumPy arrays.
"""

from ssvq_jax.data.augment import Affine, Augmentation, HorizontalFlip, Shift
from ssvq_jax.data.crop import CenterCrop, Crop, RandomResizedCrop
from ssvq_jax.data.embedded import (
    EMBEDDED_NAME,
    prepare_embedded,
    read_digits,
    split_indices,
)
from ssvq_jax.data.folders import FolderSplit, open_folder
from ssvq_jax.data.image_data import ImageData
from ssvq_jax.data.mixing import CutMix, Mixed, Mixing, Mixup, MixupOrCutMix
from ssvq_jax.data.normalization import MNIST_NORMALIZATION, Normalization
from ssvq_jax.data.pipeline import Batch, EvalBatch, eval_batches, train_batches
from ssvq_jax.data.prefetch import BatchIterator
from ssvq_jax.data.presets import (
    AUGMENTATION_PRESETS,
    CIFAR10_NORMALIZATION,
    IMAGENET_NORMALIZATION,
    NORMALIZATION_PRESETS,
    AugmentationPreset,
    augmentation_preset,
    normalization_preset,
)
from ssvq_jax.data.rand_augment import RandAugment
from ssvq_jax.data.sources import list_splits, load_split
from ssvq_jax.data.splits import ArraySplit, Example, ImageSplit, RecordSplit

__all__ = [
    "AUGMENTATION_PRESETS",
    "CIFAR10_NORMALIZATION",
    "EMBEDDED_NAME",
    "IMAGENET_NORMALIZATION",
    "MNIST_NORMALIZATION",
    "NORMALIZATION_PRESETS",
    "Affine",
    "ArraySplit",
    "Augmentation",
    "AugmentationPreset",
    "Batch",
    "BatchIterator",
    "CenterCrop",
    "Crop",
    "CutMix",
    "EvalBatch",
    "Example",
    "FolderSplit",
    "HorizontalFlip",
    "ImageData",
    "ImageSplit",
    "Mixed",
    "Mixing",
    "Mixup",
    "MixupOrCutMix",
    "Normalization",
    "RandAugment",
    "RandomResizedCrop",
    "RecordSplit",
    "Shift",
    "augmentation_preset",
    "eval_batches",
    "list_splits",
    "load_split",
    "normalization_preset",
    "open_folder",
    "prepare_embedded",
    "read_digits",
    "split_indices",
    "train_batches",
]
