"""Tests of the mixtures: exact small cases, shares that match the pixels, ranges."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax import data
from ssvq_jax.data import mixing

ALL = (
    data.Mixup(),
    data.CutMix(),
    data.MixupOrCutMix(),
    data.MixupOrCutMix(probability=0.5, switch=0.25),
)

seeds = st.integers(0, 2**32 - 1)
alphas = st.floats(0.05, 20)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
kinds = st.one_of(
    st.builds(data.Mixup, alphas),
    st.builds(data.CutMix, alphas),
    st.builds(data.MixupOrCutMix, alphas, alphas, st.floats(0, 1), st.floats(0, 1)),
)


def batch_of(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random images, labelled by their places."""
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    return images, np.arange(shape[0], dtype=np.int32)


def flat(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images of one value each, which is the label."""
    labels = np.arange(shape[0], dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.float32)[:, None, None, None], shape)
    return np.ascontiguousarray(images) / shape[0], labels


def test_blend_by_hand():
    images = np.array([[[0, 1], [0.5, 0.25]], [[1, 1], [0.5, 0.75]]], np.float32)[..., None]
    shares = np.array([0.75, 0.5], np.float32)
    expected = [[[0.25, 1], [0.5, 0.375]], [[0.5, 1], [0.5, 0.5]]]
    mixed = mixing.blend(images, images[::-1], shares)
    np.testing.assert_array_equal(mixed[..., 0], expected)


def test_paste_by_hand():
    images = np.stack([np.full((3, 4, 1), 2, np.float32), np.full((3, 4, 1), 5, np.float32)])
    boxes = np.array([[0, 2, 1, 4], [2, 3, 0, 1]])
    pasted, shares = mixing.paste(images, images[::-1], boxes)
    expected = [
        [[2, 5, 5, 5], [2, 5, 5, 5], [2, 2, 2, 2]],
        [[5, 5, 5, 5], [5, 5, 5, 5], [2, 5, 5, 5]],
    ]
    np.testing.assert_array_equal(pasted[..., 0], expected)
    np.testing.assert_array_equal(shares, np.array([6 / 12, 11 / 12], np.float32))


def test_mixup_of_two_images():
    """Whatever is drawn: both with each other, or each with itself."""
    images, labels = batch_of((2, 2, 2, 1))
    for seed in range(20):
        mixed = data.Mixup()(images, labels, np.random.default_rng(seed))
        weights = mixed.shares.astype(np.float64)[:, None, None, None]
        other = images[[1, 0]] if mixed.other_labels[0] == 1 else images
        expected = weights * images + (1 - weights) * other
        np.testing.assert_allclose(mixed.images, expected, rtol=1e-6)


def test_boxes_by_hand():
    """The whole range of centres, for boxes of a quarter, of nothing and of everything."""

    class Centres(np.random.Generator):
        def integers(self, *bounds: Any, **arguments: Any) -> Any:  # all in turn
            return np.arange(arguments["size"]) % bounds[1]

    generator = Centres(np.random.PCG64(0))
    quarter = mixing.draw_boxes(np.full(4, 0.75), 4, 4, generator)
    np.testing.assert_array_equal(quarter, [[0, 1] * 2, [0, 2] * 2, [1, 3] * 2, [2, 4] * 2])
    nothing = mixing.draw_boxes(np.ones(4), 4, 4, generator)
    np.testing.assert_array_equal(nothing[:, 0], nothing[:, 1])
    wide = mixing.draw_boxes(np.zeros(6), 3, 6, generator)
    np.testing.assert_array_equal(wide[1], [0, 3, 0, 4])
    np.testing.assert_array_equal(wide[3], [0, 2, 0, 6])


@given(alphas, shapes, seeds)
def test_mixup_is_the_weighted_mean(alpha: float, shape: tuple[int, ...], seed: int):
    images, labels = batch_of(shape)
    mixed = data.Mixup(alpha)(images, labels, np.random.default_rng(seed))
    own, other = images.mean((1, 2, 3)), images[mixed.other_labels].mean((1, 2, 3))
    expected = mixed.shares * own + (1 - mixed.shares) * other
    np.testing.assert_allclose(mixed.images.mean((1, 2, 3)), expected, rtol=1e-4)


@given(alphas, shapes, seeds)
def test_cutmix_share_is_the_area(alpha: float, shape: tuple[int, ...], seed: int):
    images, labels = batch_of(shape)
    mixed = data.CutMix(alpha)(images, labels, np.random.default_rng(seed))
    own = (mixed.images == images).all(-1)
    other = (mixed.images == images[mixed.other_labels]).all(-1)
    assert (own | other).all()
    area = shape[1] * shape[2]
    for i in range(shape[0]):
        if mixed.other_labels[i] != i:
            assert mixed.shares[i] == np.float32(own[i].sum() / area)
            rows, columns = np.where(~own[i])  # what is pasted is a full rectangle
            if len(rows):
                box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
                assert box == len(rows)


@given(alphas, alphas, st.floats(0, 1), st.floats(0, 1), shapes, seeds)
def test_the_share_is_that_of_the_pixels(
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    shape: tuple[int, ...],
    seed: int,
):
    """Of images of one value each, the mean pixel is the mean of the labels."""
    images, labels = flat(shape)
    mix = data.MixupOrCutMix(mixup, cutmix, probability, switch)
    mixed = mix(images, labels, np.random.default_rng(seed))
    values = images[:, 0, 0, 0]
    expected = mixed.shares * values + (1 - mixed.shares) * values[mixed.other_labels]
    np.testing.assert_allclose(mixed.images.mean((1, 2, 3)), expected, atol=1e-5)


@given(kinds, shapes, seeds)
def test_contract(mix: data.Mixing, shape: tuple[int, ...], seed: int):
    images, labels = batch_of(shape)
    before = images.copy(), labels.copy()
    mixed = mix(images, labels, np.random.default_rng(seed))
    again = mix(images, labels, np.random.default_rng(seed))
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])
    for one, other in zip(mixed, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [array.dtype for array in mixed] == [np.float32, np.int32, np.float32]
    assert mixed.images.shape == shape
    assert mixed.shares.shape == labels.shape
    assert mixed.images.min() >= 0
    assert mixed.images.max() <= 1
    assert ((mixed.shares >= 0) & (mixed.shares <= 1)).all()
    np.testing.assert_array_equal(np.sort(mixed.other_labels), labels)  # a permutation
    assert isinstance(mix, data.Mixing)
    assert hash(mix) == hash(mix)


@pytest.mark.parametrize("mix", ALL)
def test_white_stays_white(mix: data.Mixing):
    images, labels = np.ones((500, 3, 3, 1), np.float32), np.zeros(500, np.int32)
    mixed = mix(images, labels, np.random.default_rng(0))
    np.testing.assert_array_equal(mixed.images, images)


@pytest.mark.parametrize("mix", ALL)
def test_one_image_mixes_with_itself(mix: data.Mixing):
    images, labels = batch_of((1, 6, 5, 3))
    for seed in range(10):
        mixed = mix(images, labels, np.random.default_rng(seed))
        np.testing.assert_allclose(mixed.images, images, rtol=1e-6)
        np.testing.assert_array_equal(mixed.other_labels, labels)


@pytest.mark.parametrize("mix", ALL)
def test_another_generator_another_mixture(mix: data.Mixing):
    images, labels = batch_of((16, 6, 6, 1))
    first = mix(images, labels, np.random.default_rng(0))
    second = mix(images, labels, np.random.default_rng(1))
    assert (first.images != second.images).any()
    assert (first.other_labels != second.other_labels).any()
    assert (first.shares != second.shares).any()


def test_images_draw_for_themselves():
    images, labels = batch_of((64, 20, 20, 1))
    for mix in (data.Mixup(1.0), data.CutMix()):
        shares = mix(images, labels, np.random.default_rng(0)).shares
        assert len(np.unique(shares)) > 32


def test_mixup_draws_from_the_beta_distribution():
    images, labels = batch_of((4000, 1, 1, 1))
    for alpha in (0.2, 1.0, 5.0):
        shares = data.Mixup(alpha)(images, labels, np.random.default_rng(0)).shares
        variance = 1 / (4 * (2 * alpha + 1))
        # 5 standard deviations; the fourth central moment is at most variance / 4.
        assert shares.mean() == pytest.approx(0.5, abs=5 * np.sqrt(variance / 4000))
        assert shares.var() == pytest.approx(variance, abs=5 * np.sqrt(variance / 16000))


@pytest.mark.parametrize(("probability", "switch"), [(1, 0.5), (0.5, 0.25), (0, 1), (1, 0), (1, 1)])
def test_how_often_which(probability: float, switch: float):
    """Images of one value each: one of another value is Mixup's, one of two values CutMix's."""
    images, labels = flat((4000, 8, 8, 1))
    mix = data.MixupOrCutMix(probability=probability, switch=switch)
    mixed = mix(images, labels, np.random.default_rng(0))
    values = np.array([len(np.unique(image)) for image in mixed.images])
    whole = mixed.images[:, 0, 0, 0] == images[:, 0, 0, 0]
    cut = np.mean(values == 2)
    blended = np.mean((values == 1) & ~whole)
    tolerance = 5 * np.sqrt(0.25 / 4000)
    assert blended == pytest.approx(probability * (1 - switch), abs=tolerance)
    # A box of nothing is no box: of 8 by 8 pixels, where sqrt(1 - share) rounds to less than 1/16.
    assert cut == pytest.approx(probability * switch * (1 - 1 / 256), abs=tolerance)
    both = np.stack([images, images[mixed.other_labels]])
    assert (mixed.images == both).any(0)[values == 2].all()  # never blended and pasted
    untouched = mixed.shares == 1
    np.testing.assert_array_equal(mixed.images[untouched], images[untouched])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.Mixup(0), "alpha=0: give the parameter of Beta"),
        (lambda: data.Mixup(float("inf")), "alpha=inf"),
        (lambda: data.CutMix(-1.0), "alpha=-1.0"),
        (lambda: data.CutMix(float("nan")), "alpha=nan"),
        (lambda: data.MixupOrCutMix(mixup=0.0), "mixup=0.0: give the parameter"),
        (lambda: data.MixupOrCutMix(cutmix=0.0), "cutmix=0.0: give the parameter"),
        (lambda: data.MixupOrCutMix(probability=1.5), r"probability=1.5: give a value in \[0, 1\]"),
        (lambda: data.MixupOrCutMix(switch=-0.5), "switch=-0.5: give a value"),
    ],
)
def test_errors(make: Callable[[], data.Mixing], message: str):
    with pytest.raises(ValueError, match=message):
        make()
