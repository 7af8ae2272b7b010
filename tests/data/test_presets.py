"""Tests of the presets."""

import numpy as np
import pytest

from ssvq_jax import data


@pytest.mark.parametrize("channels", [1, 3])
def test_every_preset_keeps_shape_and_range(channels: int):
    images = np.random.default_rng(0).random((5, 12, 12, channels), dtype=np.float32)
    for name in data.AUGMENTATION_PRESETS:
        result = images
        for augmentation in data.augmentation_preset(name).augment:
            result = augmentation(result, np.random.default_rng(0))
        mix = data.augmentation_preset(name).mix
        if mix is not None:
            result = mix(result, np.arange(5, dtype=np.int32), np.random.default_rng(0)).images
        assert result.shape == images.shape
        assert result.min() >= 0
        assert result.max() <= 1


def test_what_the_presets_are():
    assert data.augmentation_preset("none") == data.AugmentationPreset()
    digits = data.augmentation_preset("digits").augment
    assert digits == (data.Affine(degrees=12.0, scale=0.12), data.Shift(2))
    scales = {name: preset.crop_scale for name, preset in data.AUGMENTATION_PRESETS.items()}
    scales = {name: scale for name, scale in scales.items() if scale is not None}
    assert scales == {"imagenet": (0.25, 1.0), "deit": (0.08, 1.0)}
    mixed = {name: preset.mix for name, preset in data.AUGMENTATION_PRESETS.items() if preset.mix}
    assert mixed == dict.fromkeys(("deit", "cifar-deit"), data.MixupOrCutMix(0.8, 1.0, 1.0, 0.5))


@pytest.mark.parametrize("name", data.AUGMENTATION_PRESETS)
def test_rounding_to_8_bits_comes_first(name: str):
    augment = data.augmentation_preset(name).augment
    places = [i for i, each in enumerate(augment) if isinstance(each, data.RandAugment)]
    assert places == ([0] if name.endswith(("deit", "rand")) else [])


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        ("auto", 1, data.MNIST_NORMALIZATION),
        ("auto", 3, data.IMAGENET_NORMALIZATION),
        ("mnist", 1, data.MNIST_NORMALIZATION),
        ("cifar10", 3, data.CIFAR10_NORMALIZATION),
        ("imagenet", 3, data.IMAGENET_NORMALIZATION),
        ("half", 4, data.Normalization((0.5,) * 4, (0.5,) * 4)),
        ("unit", 1, data.Normalization((0.0,), (1.0,))),
    ],
)
def test_normalization(name: str, channels: int, expected: data.Normalization):
    assert data.normalization_preset(name, channels) == expected


def test_every_name_fits_some_images():
    for name in data.NORMALIZATION_PRESETS:
        channels = 1 if name == "mnist" else 3
        assert len(data.normalization_preset(name, channels).mean) == channels


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("imgnet", 3, "normalization='imgnet': choose one of auto, mnist, cifar10, imagenet"),
        ("mnist", 3, "'mnist' is not for images of 3 channels: choose one of auto, cifar10"),
        ("auto", 4, "'auto' is not for images of 4 channels: choose one of half, lite, unit"),
    ],
)
def test_bad_normalization(name: str, channels: int, message: str):
    with pytest.raises(ValueError, match=message):
        data.normalization_preset(name, channels)


def test_bad_augmentation():
    with pytest.raises(
        ValueError, match="augment='flip': choose one of none, digits, cifar, imagenet, deit, ci"
    ):
        data.augmentation_preset("flip")
