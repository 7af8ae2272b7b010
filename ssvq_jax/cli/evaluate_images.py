"""Judging a model by a folder of images that is no data set: of published classes, say."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.weights import Weights
    from ssvq_jax.models import LoadedModel

_BATCH = 32
_TOP = 5


def judge_images(
    model: "LoadedModel",
    weights: "Weights",
    folder: Path,
    labels: Path | None,
    image_shape: tuple[int, int, int],
    normalization: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Classifies the images of a folder.

    Images are prepared as the model's input recipe says, or else as photographs for ImageNet.

    Args:
        model: the model.
        weights: its weights, packed or not.
        folder: the images, in sub-folders of classes or not.
        labels: a table of class indices, or None.
        image_shape: ``(h, w, c)`` of what the model takes.
        normalization: name of the normalization; ``auto`` for the recipe's.

    Returns:
        Shares of images whose class is the first, and among the first five, with their number; and
        for every image its file, label (None without labels) and first five classes.

    Raises:
        ValueError: for images or labels that cannot be read, or do not fit.
    """
    import jax
    import jax.numpy as jnp
    from rich.console import Console
    from rich.progress import track

    from ssvq_jax.data.labelled_files import find_images, folder_labels, read_labels
    from ssvq_jax.models import InputRecipe
    from ssvq_jax.training.step import linen_forward

    size, width, channels = image_shape
    if size != width:
        raise ValueError(f"the model takes images of {size} x {width}: only squares are cut here")
    files = find_images(folder)
    classes = model.outputs(image_shape)
    found = folder_labels(files, classes) if labels is None else read_labels(labels, files, classes)
    params = weights.params
    if weights.plan is not None and weights.variables is not None:
        params = weights.plan.finalize(weights.variables).decode()
    forward = linen_forward(model.module)
    top = min(_TOP, classes)

    @jax.jit
    def first(params: Any, state: Any, images: Any) -> Any:
        return jax.lax.top_k(forward(params, state, images, None)[0], top)[1]

    recipe = model.inputs or InputRecipe()
    name = recipe.normalization if normalization == "auto" and model.inputs else normalization
    batches = _batches(folder, files, size, channels, recipe, name)
    rows: list[dict[str, Any]] = []
    total = -(-len(files) // _BATCH)
    bar = track(batches, "classifying", total=total, console=Console(stderr=True))
    for names, images in bar:
        predicted = np.asarray(first(params, weights.model_state, jnp.asarray(images)))
        for file, indices in zip(names, predicted, strict=False):  # the last batch is filled up
            label = None if found is None else found[file]
            rows.append({"file": file, "label": label, "classes": indices.tolist()})
    result: dict[str, Any] = {"images": len(rows)}
    if found is not None:
        result["top1"] = float(np.mean([row["label"] == row["classes"][0] for row in rows]))
        result["top5"] = float(np.mean([row["label"] in row["classes"] for row in rows]))
    return result, rows


def _batches(
    folder: Path, files: list[str], size: int, channels: int, recipe: Any, normalization: str
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Batches of one size, normalised."""
    from ssvq_jax.data import CenterCrop, normalization_preset
    from ssvq_jax.data.folders import read_image

    crop = CenterCrop(size, recipe.crop_share, recipe.interpolation)
    normalize = normalization_preset(normalization, channels)

    def read(file: str) -> np.ndarray:
        return crop(read_image(folder / file, channels))

    with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes outside of Python's lock
        for begin in range(0, len(files), _BATCH):
            names = files[begin : begin + _BATCH]
            pixels = np.zeros((_BATCH, size, size, channels), np.float32)
            pixels[: len(names)] = np.stack(list(threads.map(read, names)))
            yield names, normalize(pixels / np.float32(255))
