"""Tests of RandAugment: every operation against its formula, and what is drawn."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssvq_jax import data
from ssvq_jax.data import augment, rand_augment
from ssvq_jax.data.rand_augment import OPERATIONS, Operation, distort

STRENGTHS = (-1.0, -0.35, 0.2, 0.9)

each_strength = pytest.mark.parametrize("strength", STRENGTHS)
each_depth = pytest.mark.parametrize("channels", [1, 3])


def picture(channels: int, height: int = 11, width: int = 14) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(channels: int, height: int = 24, width: int = 30) -> np.ndarray:
    """An image whose interpolated values hardly depend on how places are rounded."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (4 + i)) * np.cos(y / 5) for i in range(channels)]
    return np.rint(127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def grey(image: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601, as Pillow rounds it."""
    if image.shape[-1] == 1:
        return image[..., 0]
    weights = np.array([19595, 38470, 7471])  # of 2**16
    return ((image.astype(np.int64) @ weights + 2**15) // 2**16).astype(np.uint8)


def away_from(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """base + factor (image - base), cut off to 8 bits."""
    return np.clip(base + factor * (image.astype(np.float64) - base), 0, 255)


def assert_near(image: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to the last bit: Pillow rounds some results and truncates others."""
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(np.float64), expected, atol=1.001)


def along_rows(image: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row y looks up x + offsets[y]; and where that is between centres of pixels."""
    places = np.arange(image.shape[1])
    shifted = np.empty(image.shape)
    for y, offset in enumerate(offsets):
        for c in range(image.shape[2]):
            shifted[y, :, c] = np.interp(places + offset, places, image[y, :, c])
    inside = places + offsets[:, None]
    return shifted, (inside >= 0) & (inside <= image.shape[1] - 1)


@each_depth
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_strength_is_the_identity(operation: Operation, channels: int):
    image = picture(channels)
    if operation in ("autocontrast", "equalize"):
        for strength in STRENGTHS:
            np.testing.assert_array_equal(
                distort(image, operation, strength), distort(image, operation, 0.0)
            )
    else:
        np.testing.assert_array_equal(distort(image, operation, 0.0), image)


@each_depth
@each_strength
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_operation_contract(
    operation: Operation, strength: float, channels: int, size: tuple[int, int]
):
    image = picture(channels, *size)
    before = image.copy()
    result = distort(image, operation, strength)
    np.testing.assert_array_equal(image, before)
    assert result.shape == image.shape
    assert result.dtype == np.uint8


def test_autocontrast_by_hand():
    image = np.array([[50, 100, 150]], np.uint8)[..., None]
    np.testing.assert_array_equal(distort(image, "autocontrast", 1.0)[..., 0], [[0, 127, 255]])
    flat = np.full((2, 2, 3), 9, np.uint8)
    np.testing.assert_array_equal(distort(flat, "autocontrast", 1.0), flat)


def test_equalize_by_hand():
    """Values that are equally frequent end up equally far from each other."""
    image = np.repeat(np.array([10, 20, 21, 90], np.uint8), 85).reshape(17, 20, 1)
    expected = np.repeat([0, 85, 170, 255], 85).reshape(17, 20, 1)
    np.testing.assert_array_equal(distort(image, "equalize", 1.0), expected)


@each_depth
@each_strength
def test_rotate(strength: float, channels: int):
    """As our own turning by NumPy does, away from the border that Pillow smears."""
    image = smooth(channels)
    turned = distort(image, "rotate", strength)
    angle = np.array([np.deg2rad(30 * strength)])
    pixels = image[None].astype(np.float32)
    expected = augment.turn_and_scale(pixels, angle, np.ones(1))[0]
    inside = augment.turn_and_scale(np.ones_like(pixels), angle, np.ones(1))[0, ..., 0] == 1
    assert inside.mean() > 0.5
    assert_near(turned[inside], expected[inside])
    np.testing.assert_array_equal(turned[0, -1], 0)  # a corner from outside


@each_depth
@each_strength
def test_solarize(strength: float, channels: int):
    image = picture(channels)
    expected = np.where(image < round(256 * (1 - abs(strength))), image, 255 - image)
    np.testing.assert_array_equal(distort(image, "solarize", strength), expected)


@each_depth
@pytest.mark.parametrize(("strength", "bits"), [(0.1, 8), (-0.25, 7), (0.5, 6), (0.9, 4), (-1, 4)])
def test_posterize(strength: float, bits: int, channels: int):
    image = picture(channels)
    step = 2 ** (8 - bits)
    expected = image // step * step
    np.testing.assert_array_equal(distort(image, "posterize", float(strength)), expected)


@each_strength
def test_color(strength: float):
    image = picture(3)
    expected = away_from(grey(image)[..., None], image, 1 + 0.9 * strength)
    assert_near(distort(image, "color", strength), expected)
    single = picture(1)
    np.testing.assert_array_equal(distort(single, "color", strength), single)


@each_depth
@each_strength
def test_contrast(strength: float, channels: int):
    image = picture(channels)
    mean = np.floor(grey(image).mean() + 0.5)
    expected = away_from(mean, image, 1 + 0.9 * strength)
    assert_near(distort(image, "contrast", strength), expected)


@each_depth
@each_strength
def test_brightness(strength: float, channels: int):
    image = picture(channels)
    expected = away_from(np.zeros(()), image, 1 + 0.9 * strength)
    assert_near(distort(image, "brightness", strength), expected)


@each_depth
@each_strength
def test_sharpness(strength: float, channels: int):
    """The smooth image is the mean of nine pixels, the middle five times; its border is left."""
    image = picture(channels)
    height, width, _ = image.shape
    shifts = [(i, j) for i in range(3) for j in range(3)]
    total = 4.0 * image[1:-1, 1:-1]
    for i, j in shifts:
        total = total + image[i : i + height - 2, j : j + width - 2]
    blurred = image.astype(np.float64)
    blurred[1:-1, 1:-1] = np.rint(total / 13)
    expected = away_from(blurred, image, 1 + 0.9 * strength)
    assert_near(distort(image, "sharpness", strength), expected)


@each_depth
@each_strength
@pytest.mark.parametrize("operation", ["shear-x", "shear-y"])
def test_shear(operation: Operation, strength: float, channels: int):
    """The middle of row y, y + 1/2 from the top, moves by 0.3 s (y + 1/2)."""
    image = smooth(channels)
    rows = image if operation == "shear-x" else image.transpose(1, 0, 2)
    sheared = distort(image, operation, strength)
    sheared = sheared if operation == "shear-x" else sheared.transpose(1, 0, 2)
    offsets = 0.3 * strength * (np.arange(len(rows)) + 0.5)
    expected, inside = along_rows(rows, offsets)
    assert inside.mean() > 0.5
    assert_near(sheared[inside], expected[inside])
    outside = np.abs(np.arange(rows.shape[1]) + offsets[:, None] - (rows.shape[1] - 1) / 2)
    np.testing.assert_array_equal(sheared[outside > rows.shape[1] / 2 + 1e-3], 0)


def test_shear_by_hand():
    """Pixels of 20 a column: the rows look up 0.15 and 0.45 to the right."""
    image = np.tile(np.arange(4, dtype=np.uint8) * 20, (2, 1))[..., None]
    sheared = distort(image, "shear-x", 1.0)
    np.testing.assert_array_equal(sheared[..., 0], [[3, 23, 43, 60], [9, 29, 49, 60]])


@each_depth
@pytest.mark.parametrize(("strength", "pixels"), [(1.0, 9), (-1.0, -9), (5 / 9, 5), (-1 / 9, -1)])
@pytest.mark.parametrize(("operation", "axis"), [("translate-y", 0), ("translate-x", 1)])
def test_translate_by_whole_pixels(
    operation: Operation, axis: int, strength: float, pixels: int, channels: int
):
    image = picture(channels, 20, 20)
    down, right = (-pixels, 0) if axis == 0 else (0, -pixels)
    expected = augment.shift(
        image[None].astype(np.float32), np.array([down]), np.array([right]), 9
    )[0]
    assert_near(distort(image, operation, strength), expected)


@each_depth
@each_strength
@pytest.mark.parametrize("operation", ["translate-x", "translate-y"])
def test_translate_between_pixels(operation: Operation, strength: float, channels: int):
    image = smooth(channels)
    moved = distort(image, operation, strength)
    if operation == "translate-y":
        image, moved = image.transpose(1, 0, 2), moved.transpose(1, 0, 2)
    height, width, _ = image.shape
    expected, inside = along_rows(image, np.full(height, 0.45 * strength * width))
    assert inside.mean() > 0.5
    assert_near(moved[inside], expected[inside])


def draw_of(images: np.ndarray, seed: int = 0, **arguments: float) -> np.ndarray:
    return data.RandAugment(**arguments)(images, np.random.default_rng(seed))


def unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


@given(
    operations=st.integers(1, 3),
    magnitude=st.one_of(st.integers(0, 10), st.floats(0, 10)),
    deviation=st.floats(0, 5),
    probability=st.floats(0, 1),
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_contract(
    operations: int,
    magnitude: int | float,
    deviation: float,
    probability: float,
    shape: tuple[int, ...],
    seed: int,
):
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    before = images.copy()
    change = data.RandAugment(operations, magnitude, deviation, probability)
    changed = change(images, np.random.default_rng(seed))
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(changed, change(images, np.random.default_rng(seed)))
    assert changed.shape == shape
    assert changed.dtype == np.float32
    assert changed.min() >= 0
    assert changed.max() <= 1
    np.testing.assert_array_equal(changed, unit(np.rint(changed * 255)))  # whole 255ths
    assert isinstance(change, data.Augmentation)
    assert hash(change) == hash(change)


def test_never_applied_is_the_identity_on_8_bits():
    images = unit(np.arange(256).reshape(4, 8, 8, 1))
    np.testing.assert_array_equal(draw_of(images, probability=0.0), images)
    between = np.array([100.4, 100.6], np.float32).reshape(1, 2, 1, 1) / 255
    rounded = draw_of(between.astype(np.float32), probability=0.0)
    np.testing.assert_array_equal(rounded, unit(np.array([100, 101]).reshape(1, 2, 1, 1)))


@pytest.mark.parametrize("probability", [1.0, 0.4])
def test_every_operation_is_drawn_alike(probability: float, monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def note(image: np.ndarray, operation: str, strength: float) -> np.ndarray:
        drawn.append((operation, strength))
        return image

    monkeypatch.setattr(rand_augment, "distort", note)
    draw_of(np.zeros((3000, 1, 1, 3), np.float32), probability=probability)
    names = [operation for operation, _ in drawn]
    assert len(names) == 6000
    shares = {name: names.count(name) / 6000 for name in OPERATIONS}
    for name in OPERATIONS:
        expected = probability / 14 + (1 - probability if name == "identity" else 0)
        tolerance = 5 * np.sqrt(expected * (1 - expected) / 6000)
        assert shares[name] == pytest.approx(expected, abs=tolerance)
    strengths = np.array([strength for _, strength in drawn])
    np.testing.assert_allclose(np.abs(strengths), 0.9, rtol=1e-6)
    assert np.mean(strengths > 0) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(6000))


def test_magnitudes_deviate(monkeypatch: pytest.MonkeyPatch):
    drawn = []

    def note(image: np.ndarray, operation: str, strength: float) -> np.ndarray:
        drawn.append(abs(strength) * 10)
        return image

    monkeypatch.setattr(rand_augment, "distort", note)
    draw_of(np.zeros((2000, 1, 1, 1), np.float32), magnitude=5, deviation=0.5)
    assert np.mean(drawn) == pytest.approx(5, abs=5 * 0.5 / np.sqrt(4000))
    assert np.std(drawn) == pytest.approx(0.5, rel=5 / np.sqrt(8000))
    drawn.clear()
    draw_of(np.zeros((2000, 1, 1, 1), np.float32), magnitude=10, deviation=0.5)
    assert np.max(drawn) == 10
    assert np.mean(np.array(drawn) == 10) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))


@pytest.mark.parametrize("operations", [1, 2, 5])
def test_operations_follow_each_other(operations: int, monkeypatch: pytest.MonkeyPatch):
    """The first gives the second its image."""
    monkeypatch.setattr(rand_augment, "distort", lambda image, *_: 2 * image + 1)
    changed = draw_of(np.zeros((3, 2, 2, 1), np.float32), operations=operations)
    np.testing.assert_array_equal(changed, unit(np.full((3, 2, 2, 1), 2**operations - 1)))


def test_other_generator_other_images():
    images = unit(np.stack([picture(3)] * 8))
    assert (draw_of(images) != draw_of(images, seed=1)).any()
    assert len({image.tobytes() for image in draw_of(images)}) > 4  # each draws for itself


def test_other_channels_are_refused():
    for channels in (2, 4):
        images = np.zeros((1, 4, 4, channels), np.float32)
        with pytest.raises(ValueError, match=f"have {channels} channels: RandAugment is for 3"):
            draw_of(images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.RandAugment(operations=0), "operations=0: give how many"),
        (lambda: data.RandAugment(magnitude=-1), "magnitude=-1: give 0"),
        (lambda: data.RandAugment(magnitude=10.5), "magnitude=10.5: give 0"),
        (lambda: data.RandAugment(magnitude=float("nan")), "magnitude=nan"),
        (lambda: data.RandAugment(deviation=-0.5), "deviation=-0.5"),
        (lambda: data.RandAugment(deviation=float("inf")), "deviation=inf"),
        (lambda: data.RandAugment(probability=1.5), "probability=1.5"),
    ],
)
def test_errors(make: Callable[[], data.RandAugment], message: str):
    with pytest.raises(ValueError, match=message):
        make()
