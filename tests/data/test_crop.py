"""Tests of the crops: exact small cases, ranges, errors."""

import numpy as np
import pytest

from ssvq_jax import data


def random_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_crops_are_crops():
    assert isinstance(data.CenterCrop(4), data.Crop)
    assert isinstance(data.RandomResizedCrop(4), data.Crop)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_centre_without_resizing_is_a_slice(channels: int):
    image = random_image(8, 11, channels)
    cropped = data.CenterCrop(4, share=0.5)(image)
    np.testing.assert_array_equal(cropped, image[2:6, 4:8])  # 3.5 rounds to even
    np.testing.assert_array_equal(data.CenterCrop(8, share=1.0)(image[:, :8]), image[:, :8])


@pytest.mark.parametrize("shape", [(300, 200, 3), (200, 300, 3), (7, 5, 3), (1, 40, 1)])
@pytest.mark.parametrize("crop", [data.CenterCrop(32), data.RandomResizedCrop(32)])
def test_any_size_gives_the_size(shape: tuple[int, int, int], crop: data.Crop):
    cropped = crop(random_image(*shape), np.random.default_rng(0))
    assert cropped.shape == (32, 32, shape[-1])
    assert cropped.dtype == np.uint8


@pytest.mark.parametrize(
    ("width", "left"),
    [(248, 12), (261, 18), (251, 14)],  # margins of 18.5 and 13.5 to the even side, as torchvision
)
def test_the_short_side_is_rounded_down_as_in_timm(width: int, left: int):
    image = random_image(248, width, 3)  # 224 / 0.9 = 248.9, so nothing is resized
    cropped = data.CenterCrop(224, share=0.9)(image)
    np.testing.assert_array_equal(cropped, image[12:236, left : left + 224])


@pytest.mark.parametrize("share", [1.0, 0.999, 0.904, 0.9, 0.882])
@pytest.mark.parametrize("shape", [(30, 31, 3), (31, 30, 3), (8, 8, 3), (223, 225, 3)])
def test_nothing_is_too_small_after_resizing(shape: tuple[int, int, int], share: float):
    assert data.CenterCrop(30, share)(random_image(*shape)).shape == (30, 30, 3)


def test_centre_keeps_its_share():
    # A gradient of 256 columns: the crop shows columns 16 to 240.
    image = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 1))
    cropped = data.CenterCrop(28)(image)[14, :, 0].astype(int)
    np.testing.assert_allclose(cropped, 16 + 8 * np.arange(28) + 3.5, atol=1)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    np.testing.assert_allclose(data.CenterCrop(8, share=1.0)(stripes), 127.5, atol=8)


def test_random_crop_of_everything_is_resizing():
    image = random_image(40, 40, 3)
    whole = data.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    expected = data.CenterCrop(16, share=1.0)(image)
    np.testing.assert_array_equal(whole(image, np.random.default_rng(0)), expected)


def test_random_boxes_keep_to_scale_and_ratio():
    crop = data.RandomResizedCrop(8, scale=(0.1, 0.9), ratio=(0.5, 2.0))
    generator = np.random.default_rng(0)
    boxes = np.array([crop.draw(400, 400, generator) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0
    assert boxes.max() <= 400
    width, height = right - left, bottom - top
    share, ratio = width * height / 160_000, width / height
    assert 0.099 < share.min() < 0.12 < 0.8 < share.max() < 0.901
    assert 0.49 < ratio.min() < 0.52 < 1.9 < ratio.max() < 2.02
    assert np.median(ratio) == pytest.approx(1, abs=0.1)  # neither wide nor tall
    assert len(np.unique(boxes, axis=0)) > 1900


def test_random_crop_falls_back_to_the_centre():
    crop = data.RandomResizedCrop(4, scale=(1.0, 1.0), ratio=(0.5, 2.0))
    assert crop.draw(10, 1000, np.random.default_rng(0)) == (490, 0, 510, 10)
    assert crop.draw(1000, 10, np.random.default_rng(0)) == (0, 490, 10, 510)


def test_random_crop_depends_on_the_generator_alone():
    image, crop = random_image(50, 60, 3), data.RandomResizedCrop(16)
    first, again, other = (crop(image, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_random_crop_needs_a_generator():
    with pytest.raises(ValueError, match="evaluation does not: give a CenterCrop"):
        data.RandomResizedCrop(4)(random_image(8, 8, 3), None)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (data.CenterCrop, {"size": 0}, "size=0"),
        (data.CenterCrop, {"size": 8, "share": 0.0}, "share=0.0"),
        (data.CenterCrop, {"size": 8, "share": 1.1}, "share=1.1"),
        (data.RandomResizedCrop, {"size": -1}, "size=-1"),
        (data.RandomResizedCrop, {"size": 8, "scale": (0.0, 1.0)}, "scale=(0.0, 1.0)"),
        (data.RandomResizedCrop, {"size": 8, "scale": (0.9, 0.1)}, "scale=(0.9, 0.1)"),
        (data.RandomResizedCrop, {"size": 8, "ratio": (2.0, 1.0)}, "ratio=(2.0, 1.0)"),
    ],
)
def test_bad_arguments(make: type, arguments: dict, message: str):
    with pytest.raises(ValueError, match="give the") as error:
        make(**arguments)
    assert message in str(error.value)
