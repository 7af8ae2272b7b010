"""Tests of the record that commands use: what it prepares from which arguments."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from ssvq_jax import data
from ssvq_jax.data import sources

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tfds"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the prepared data sets in ../shared/data/tfds"
)


def write_images(folder: pathlib.Path, sizes: list[tuple[int, int]]) -> data.ImageData:
    """A folder of training images of the given heights and widths."""
    generator = np.random.default_rng(0)
    for number, size in enumerate(sizes):
        file = folder / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return data.ImageData(str(folder), normalization="unit")


@pytest.fixture
def squares(tmp_path: pathlib.Path) -> data.ImageData:
    return write_images(tmp_path / "squares", [(12, 12)] * 4)


@pytest.fixture
def photographs(tmp_path: pathlib.Path) -> data.ImageData:
    return write_images(tmp_path / "photographs", [(20, 30), (30, 20), (25, 25)])


def pixels(batch: data.Batch) -> np.ndarray:
    return np.round(batch["image"] * 255).astype(np.uint8)


def test_embedded_digits(data_dir: pathlib.Path):
    digits = data.ImageData("mnist_digits_5k", data_dir, augment="digits")
    assert digits.image_shape("train") == (28, 28, 1)
    assert digits.num_classes("test") == 10
    assert digits.open("train") is digits.open("train")
    train = digits.open("train")
    augment = (data.Affine(degrees=12.0, scale=0.12), data.Shift(2))
    expected = next(data.train_batches(train, 64, seed=3, augment=augment))
    actual = next(digits.train("train", 64, seed=3))
    np.testing.assert_array_equal(actual["image"], expected["image"])
    expected = next(data.eval_batches(digits.open("test"), 500))
    actual = next(digits.evaluate("test", 500))
    np.testing.assert_array_equal(actual["image"], expected["image"])


def test_a_pass_over_images_in_memory_starts_no_processes(
    squares: data.ImageData, monkeypatch: pytest.MonkeyPatch
):
    many = dataclasses.replace(squares, workers=2)
    assert many.evaluate("train", 4).workers == 0
    assert many.train("train", 4, seed=0).workers == 2


def test_own_size_is_not_cropped(squares: data.ImageData):
    images, _ = squares.open("train").take(range(4))
    for size in (None, 12):
        (batch,) = dataclasses.replace(squares, image_size=size).evaluate("train", 4)
        np.testing.assert_array_equal(pixels(batch), images)


def test_squares_of_one_size_are_resized_whole(squares: data.ImageData):
    images, _ = squares.open("train").take(range(4))
    larger = dataclasses.replace(squares, image_size=24)
    assert larger.image_shape("train") == (24, 24, 3)
    (batch,) = larger.evaluate("train", 4)
    expected = np.stack([data.CenterCrop(24, share=1.0)(image) for image in images])
    np.testing.assert_array_equal(pixels(batch), expected)


@pytest.mark.parametrize("cache", [0, 2**20])
def test_photographs_are_cut_in_the_middle(
    photographs: data.ImageData, cache: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "CACHE_BYTES", cache)  # cropped each time, or once and for all
    cut = dataclasses.replace(photographs, image_size=14)
    source = cut.open("train")
    expected = np.stack([data.CenterCrop(14)(source[i]["image"]) for i in range(3)])
    (batch,) = cut.evaluate("train", 3)
    np.testing.assert_array_equal(pixels(batch), expected)
    np.testing.assert_array_equal(batch["label"], [source[i]["label"] for i in range(3)])
    trained = pixels(next(cut.train("train", 3, seed=0)))
    assert {image.tobytes() for image in trained} == {image.tobytes() for image in expected}


def test_imagenet_preset_cuts_at_random_in_training_only(squares: data.ImageData):
    random = dataclasses.replace(squares, augment="imagenet")
    images, _ = squares.open("train").take(range(4))
    (batch,) = random.evaluate("train", 4)
    np.testing.assert_array_equal(pixels(batch), images)
    batches = random.train("train", 4, seed=0)
    seen = {image.tobytes() for _ in range(3) for image in next(batches)["image"]}
    assert len(seen) == 12


@pytest.mark.parametrize(
    ("augment", "scale"), [("imagenet", (0.25, 1.0)), ("deit", (0.08, 1.0)), ("cifar-deit", None)]
)
def test_presets_are_what_train_batches_is_given(
    squares: data.ImageData, augment: str, scale: tuple[float, float] | None
):
    preset = data.augmentation_preset(augment)
    expected = data.train_batches(
        squares.open("train"),
        4,
        seed=5,
        crop=None if scale is None else data.RandomResizedCrop(12, scale),
        augment=preset.augment,
        mix=preset.mix,
        normalization=data.normalization_preset("unit", 3),
    )
    actual = dataclasses.replace(squares, augment=augment).train("train", 4, seed=5)
    for _ in range(3):
        one, other = next(actual), next(expected)
        assert set(one) == set(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_mixed_batches(squares: data.ImageData):
    for augment in ("deit", "cifar-deit"):
        mixed = dataclasses.replace(squares, augment=augment)
        batch = next(mixed.train("train", 4, seed=0))
        assert set(batch) == {"image", "label", "other_label", "share"}
        assert batch["image"].min() >= 0
        assert batch["image"].max() <= 1
        (evaluated,) = mixed.evaluate("train", 4)
        assert set(evaluated) == {"image", "label", "mask"}


def test_four_channels_are_not_for_deit(squares: data.ImageData):
    four = dataclasses.replace(squares, augment="cifar-deit", channels=4)
    with pytest.raises(ValueError, match="have 4 channels: RandAugment is for 3"):
        next(four.train("train", 4, seed=0))


@pytest.mark.parametrize("augment", ["none", "imagenet", "deit"])
def test_several_sizes_need_an_image_size(photographs: data.ImageData, augment: str):
    with pytest.raises(ValueError, match="differ in size: give an image_size"):
        dataclasses.replace(photographs, augment=augment).train("train", 2, seed=0)


def test_random_squares_need_an_image_size(tmp_path: pathlib.Path):
    wide = write_images(tmp_path, [(8, 12)] * 2)
    assert next(wide.train("train", 2, seed=0))["image"].shape == (2, 8, 12, 3)
    with pytest.raises(ValueError, match="are 8 by 12: give an image_size"):
        dataclasses.replace(wide, augment="imagenet").train("train", 2, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "flip"}, "augment='flip': choose one of none, digits"),
        ({"normalization": "imgnet"}, "normalization='imgnet': choose one of auto"),
        ({"image_size": 0}, "image_size=0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_errors_come_at_once(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        data.ImageData("cifar10", **changes)


def test_normalization_of_other_images(squares: data.ImageData):
    with pytest.raises(ValueError, match="'mnist' is not for images of 3 channels"):
        dataclasses.replace(squares, normalization="mnist").evaluate("train", 2)


@needs_shared
def test_cifar10():
    cifar = data.ImageData("cifar10", SHARED, augment="cifar", normalization="cifar10")
    assert cifar.image_shape("test") == (32, 32, 3)
    assert cifar.num_classes("test") == 10
    images = np.concatenate([batch["image"] for batch in cifar.evaluate("test[:1000]", 250)])
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=0.1)


@needs_shared
def test_imagenet_on_workers():
    photographs = data.ImageData(
        "imagenet_sample", SHARED, image_size=64, augment="imagenet", workers=2
    )
    assert photographs.num_classes("train[:40]") == 1000
    on_workers = photographs.train("train[:40]", 16, seed=0)
    here = dataclasses.replace(photographs, workers=0).train("train[:40]", 16, seed=0)
    for _ in range(4):
        one, other = next(on_workers), next(here)
        assert one["image"].shape == (16, 64, 64, 3)
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    on_workers.close()
