"""Tests of the augmentations: exact small cases, identities, ranges."""

from typing import Any

import numpy as np
import pytest
import scipy.ndimage

from ssvq_jax import data
from ssvq_jax.data import augment

ALL = (data.Shift(3), data.Affine(degrees=15.0, scale=0.2), data.HorizontalFlip())


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_shift_by_hand():
    image = np.arange(1, 10, dtype=np.float32).reshape(1, 3, 3, 1)
    batch = np.repeat(image, 3, axis=0)
    shifted = augment.shift(batch, down=np.array([1, 0, -2]), right=np.array([0, -1, 1]), reach=2)
    expected = [
        [[0, 0, 0], [1, 2, 3], [4, 5, 6]],
        [[2, 3, 0], [5, 6, 0], [8, 9, 0]],
        [[0, 7, 8], [0, 0, 0], [0, 0, 0]],
    ]
    np.testing.assert_array_equal(shifted[..., 0], expected)


def test_shift_reaches_every_offset_alike():
    images = np.zeros((5000, 5, 5, 1), np.float32)
    images[:, 2, 2] = 1
    total = data.Shift(2)(images, np.random.default_rng(0)).sum(axis=0)[..., 0]
    np.testing.assert_allclose(total, 200, atol=70)  # 25 offsets, 5 standard deviations


def test_turn_by_quarters_is_exact():
    images = random_images(4, 9, 9, 2)
    quarters = [0, 1, 2, 3]
    turned = augment.turn_and_scale(images, np.array(quarters) * np.pi / 2, np.ones(4))
    expected = np.stack([np.rot90(image, k) for image, k in zip(images, quarters, strict=True)])
    np.testing.assert_allclose(turned, expected, atol=2e-5)


def test_doubling_by_hand():
    image = np.zeros((1, 5, 5, 1), np.float32)
    image[0, 2, 2] = 1
    doubled = augment.turn_and_scale(image, np.zeros(1), np.full(1, 2.0))[0, :, :, 0]
    tent = np.array([0, 0.5, 1, 0.5, 0])
    np.testing.assert_allclose(doubled, np.outer(tent, tent), atol=1e-6)


def test_turn_and_scale_as_scipy_does():
    images = random_images(3, 12, 10, 1)
    angles, scales = np.array([0.3, -0.7, 2.0]), np.array([0.8, 1.3, 1.0])
    actual = augment.turn_and_scale(images, angles, scales)
    centre = (np.array([12, 10]) - 1) / 2
    for image, angle, scale, result in zip(images, angles, scales, actual, strict=True):
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        matrix = np.array([[cosine, sine], [-sine, cosine]])
        offset: Any = centre - matrix @ centre
        expected = scipy.ndimage.affine_transform(
            image[..., 0], matrix, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(result[..., 0], expected, atol=1e-5)


def test_flip():
    images = random_images(64, 3, 5, 2)
    always = data.HorizontalFlip(1.0)(images, np.random.default_rng(0))
    np.testing.assert_array_equal(always, images[:, :, ::-1])
    half = data.HorizontalFlip()(images, np.random.default_rng(0))
    mirrored = (half == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (half == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 16 < mirrored.sum() < 48


@pytest.mark.parametrize("nothing", [data.Shift(0), data.Affine(), data.HorizontalFlip(0.0)])
@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (2, 7, 10, 3)])
def test_zero_strength_is_the_identity(nothing: data.Augmentation, shape: tuple[int, ...]):
    images = random_images(*shape)
    np.testing.assert_array_equal(nothing(images, np.random.default_rng(0)), images)


@pytest.mark.parametrize("augmentation", ALL)
def test_contract(augmentation: data.Augmentation):
    images = random_images(16, 11, 8, 3)
    before = images.copy()
    first = augmentation(images, np.random.default_rng(5))
    second = augmentation(images, np.random.default_rng(5))
    other = augmentation(images, np.random.default_rng(6))
    np.testing.assert_array_equal(images, before)  # the input is left as it is
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert first.dtype == np.float32
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6
    assert hash(augmentation) == hash(augmentation)
    assert isinstance(augmentation, data.Augmentation)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.Shift(-1), "pixels=-1"),
        (lambda: data.Affine(degrees=-1.0), "degrees=-1.0"),
        (lambda: data.Affine(scale=1.0), "scale=1.0"),
        (lambda: data.HorizontalFlip(1.5), "probability=1.5"),
    ],
)
def test_errors(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
