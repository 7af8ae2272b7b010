"""The float EfficientNet-Lite0 of `efficientnet_lite0`, and the images by which it teaches."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from ssvq_jax import data
from ssvq_jax.cli.weights import initial_weights, open_weights
from ssvq_jax.data.labelled_files import find_images
from ssvq_jax.models import REGISTRY, InputRecipe, load_model
from ssvq_jax.training.step import Batch, Forward, linen_forward
from ssvq_jax.tree import PyTree

MODEL = "efficientnet_lite0"
SAMPLE = "imagenet_sample"
SPLITS = ("train[:60%]", "train[60%:80%]", "train[80%:]")  # to train on, to choose by, to report
POINTWISE = r"(blocks_\d+_\d+/(expand|project)|final)/conv/kernel"
RMS = 0.05  # of every output channel of the pointwise kernels
EVAL_BATCH = 40
INPUTS = REGISTRY[MODEL].inputs or InputRecipe("lite")
NORMALIZATION = data.normalization_preset(INPUTS.normalization, 3)


@dataclasses.dataclass(frozen=True)
class Float:
    """The float network and its images.

    Attributes:
        forward: the network.
        params: its parameters.
        state: its batch statistics.
        size: height and width of its images.
        parts: images to train on, to choose by, and to report.
    """

    forward: Forward
    params: PyTree
    state: PyTree
    size: int
    parts: tuple[data.ImageSplit, ...]

    def train(self, batch_size: int, seed: int) -> data.BatchIterator[data.Batch]:
        """Random crops, mirrored at random: the augmentation "imagenet"."""
        return data.train_batches(
            self.parts[0],
            batch_size,
            seed=seed,
            crop=data.RandomResizedCrop(self.size, interpolation=INPUTS.interpolation),
            augment=data.augmentation_preset("imagenet").augment,
            normalization=NORMALIZATION,
        )

    def images(self, part: int) -> Iterator[Batch]:
        """One pass over a part; a label is the float network's first class."""
        crop = data.CenterCrop(self.size, INPUTS.crop_share, INPUTS.interpolation)
        for batch in data.eval_batches(
            self.parts[part], EVAL_BATCH, crop=crop, normalization=NORMALIZATION
        ):
            logits = self.logits(self.params, self.state, batch["image"])
            yield {**batch, "label": np.argmax(logits, -1).astype(np.int32), "logits": logits}

    @functools.cached_property
    def logits(self) -> Any:
        """The compiled network, in evaluation mode."""
        return jax.jit(lambda params, state, images: self.forward(params, state, images, None)[0])

    def judge(self, params: PyTree, state: PyTree, part: int) -> tuple[float, float, int]:
        """Share of images with the float network's first class, mean KL(float || it), images."""
        found = []
        for batch in self.images(part):
            ours = self.logits(params, state, batch["image"])
            same = jnp.argmax(ours, -1) == batch["label"]
            ours, theirs = (jax.nn.log_softmax(logits) for logits in (ours, batch["logits"]))
            apart = optax.losses.kl_divergence_with_log_targets(ours, theirs)
            real = np.asarray(batch["mask"], bool)
            found.append(np.stack([same, apart], -1)[real])
        agreement, divergence = np.concatenate(found).mean(0, dtype=np.float64).tolist()
        return agreement, divergence, sum(map(len, found))


def even_out(params: PyTree, state: PyTree, epsilon: float) -> tuple[PyTree, PyTree]:
    """Gives the output channels of all pointwise kernels one root mean square.

    Batch norm takes it back, so the network stays the same function. Channels then weigh alike in a
    codebook that they share, and one rate suits all signs.
    """
    new, stats = (
        {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (params, state["batch_stats"])
    )
    for path in [path for path in new if re.fullmatch(POINTWISE, path)]:
        norm = path.removesuffix("conv/kernel") + "bn"
        size = np.sqrt(np.mean(new[path] ** 2, (0, 1, 2))) / RMS
        size = np.where(size > 0, size, np.float32(1))
        before, after = stats[f"{norm}/var"], stats[f"{norm}/var"] / size**2
        root = np.sqrt((after + epsilon) / (before + epsilon))
        new |= {path: new[path] / size, f"{norm}/scale": new[f"{norm}/scale"] * size * root}
        stats |= {f"{norm}/mean": stats[f"{norm}/mean"] / size, f"{norm}/var": after}
    new, stats = (jax.tree.map(jnp.asarray, unflatten_dict(x, sep="/")) for x in (new, stats))
    return new, {**state, "batch_stats": stats}


@functools.cache
def open_float(
    weights: Path | None, folder: Path | None, data_dir: Path | None, size: int, *, quick: bool
) -> Float:
    """Opens the float network and its images."""
    model, shape = load_model(MODEL), (size, size, 3)
    found = initial_weights(model, shape, 0) if quick else open_weights(weights, model, shape)
    epsilon = model.module.config.numerics.epsilon  # type: ignore[attr-defined]
    params, state = even_out(found.params, found.model_state, epsilon)
    if folder is None:
        parts = tuple(data.load_split(SAMPLE, split, data_dir) for split in SPLITS)
    else:
        parts = folder_parts(folder)
    return Float(linen_forward(model.module), params, state, size, parts)


def folder_parts(folder: Path) -> tuple[data.ImageSplit, ...]:
    """Cuts a folder's images at random into parts as large as `SPLITS`, always the same ones."""
    files = np.array(find_images(folder.expanduser()))
    if len(files) < 5:
        raise SystemExit(f"{folder} holds {len(files)} images: give at least 5")
    order = np.random.default_rng(0).permutation(files)
    parts = np.split(order, [len(files) * 3 // 5, len(files) * 4 // 5])
    return tuple(
        data.FolderSplit(
            folder.expanduser(), tuple(part.tolist()), np.zeros(len(part), np.int32), ("image",),
            (None, None, 3),
        )
        for part in parts
    )  # fmt: skip


def make_up_images(folder: Path, count: int = 20) -> Path:
    """Writes images of random patches."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 80)).save(folder / f"{i}.png")
    return folder
