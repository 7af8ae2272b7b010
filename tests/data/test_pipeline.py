"""Tests of the batches: order, reproducibility, resumption, padding, normalisation."""

import copy
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax import data

AUGMENT = (data.Shift(2), data.Affine(degrees=10.0, scale=0.1))


@pytest.fixture
def numbered() -> data.ArraySplit:
    """Ten images of 2x2 pixels; the label is the position in the split."""
    labels = np.arange(10, dtype=np.int32)
    images = np.tile(labels.astype(np.uint8)[:, None, None, None] * 20, (1, 2, 2, 1))
    return data.ArraySplit(images, labels, num_classes=10)


def take(batches: data.BatchIterator[data.Batch], count: int) -> list[data.Batch]:
    return list(itertools.islice(batches, count))


def take_mixed(batches: data.BatchIterator[data.Batch], count: int) -> list[dict[str, np.ndarray]]:
    return [{key: np.asarray(value) for key, value in x.items()} for x in take(batches, count)]


def assert_same(first: list[data.Batch], second: list[data.Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        chex.assert_trees_all_equal(one, other)


def test_shapes_dtypes_and_values(digits: data.ArraySplit):
    batch = next(data.train_batches(digits, 32, seed=0))
    assert batch["image"].shape == (32, 28, 28, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (32,)
    assert batch["label"].dtype == np.int32
    normalization = data.MNIST_NORMALIZATION
    pixels = batch["image"] * normalization.std[0] + normalization.mean[0]
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-6)


def test_default_normalisation_fits_the_digits(digits: data.ArraySplit):
    images = np.concatenate([b["image"] for b in data.eval_batches(digits, 500)])
    assert images.mean() == pytest.approx(0, abs=0.02)
    assert images.std() == pytest.approx(1, abs=0.02)


def test_normalisation_is_per_channel():
    split = data.ArraySplit(np.full((1, 1, 1, 3), 255, np.uint8), np.zeros(1, np.int32), 1)
    normalization = data.Normalization(mean=(0.5, 0.0, 1.0), std=(0.25, 2.0, 1.0))
    batch = next(data.eval_batches(split, 1, normalization=normalization))
    np.testing.assert_array_equal(batch["image"].reshape(3), [2, 0.5, 0])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 24])
def test_each_epoch_holds_every_example_once(numbered: data.ArraySplit, batch_size: int):
    batches = take(data.train_batches(numbered, batch_size, seed=3), 120 // batch_size)
    assert {len(batch["label"]) for batch in batches} == {batch_size}
    epochs = np.concatenate([batch["label"] for batch in batches]).reshape(12, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (12, 1)))
    assert len(np.unique(epochs, axis=0)) == 12  # a new order each time


def test_order_does_not_depend_on_the_batch_size(numbered: data.ArraySplit):
    def order(size: int) -> np.ndarray:
        batches = take(data.train_batches(numbered, size, seed=0), 60 // size)
        return np.concatenate([batch["label"] for batch in batches])

    np.testing.assert_array_equal(order(4), order(15))


def test_images_stay_with_their_labels(numbered: data.ArraySplit):
    plain = data.Normalization((0.0,), (1.0,))
    for batch in take(data.train_batches(numbered, 4, seed=0, normalization=plain), 10):
        expected = np.broadcast_to(batch["label"][:, None, None, None] * 20 / 255, (4, 2, 2, 1))
        np.testing.assert_allclose(batch["image"], expected, rtol=1e-6)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_same_seed_same_batches(digits: data.ArraySplit, threads: int):
    first = data.train_batches(digits, 64, seed=7, augment=AUGMENT, threads=0)
    second = data.train_batches(digits, 64, seed=7, augment=AUGMENT, threads=threads)
    assert_same(take(first, 60), take(second, 60))  # 60 batches reach into the second epoch


def test_other_seed_other_batches(digits: data.ArraySplit):
    first = take(data.train_batches(digits, 100, seed=0), 60)
    second = take(data.train_batches(digits, 100, seed=1), 60)
    orders = [np.concatenate([b["label"] for b in run]).reshape(2, -1) for run in (first, second)]
    assert (orders[0] != orders[1]).mean() > 0.8
    # Nor is one seed's second epoch another's first.
    assert (orders[0][1] != orders[1][0]).mean() > 0.8


def test_augmentation_differs_between_batches(numbered: data.ArraySplit):
    images = [
        b["image"] for b in take(data.train_batches(numbered, 10, seed=0, augment=AUGMENT), 4)
    ]
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize("threads", [0, 1])
def test_resumes_where_it_stopped(digits: data.ArraySplit, threads: int):
    def start() -> data.BatchIterator[data.Batch]:
        return data.train_batches(digits, 64, seed=7, augment=AUGMENT, threads=threads)

    batches = start()
    take(batches, 45)
    state = json.loads(json.dumps(batches.get_state()))  # as a checkpoint would hold it
    expected = take(batches, 5)
    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, 5), expected)
    batches.set_state(state)
    assert_same(take(batches, 5), expected)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"next_index": 3}, r"has the keys \['next_index'\], not \['batch_size', 'batches'"),
        ({"batch_size": 5}, "made with batch_size=5, these are made with batch_size=4: resume"),
        ({"seed": 1}, "made with seed=1, these are made with seed=0"),
        ({"examples": 9}, "made with examples=9, these are made with examples=10"),
        ({"batches": -1}, "batches=-1: there are 0 to"),
    ],
)
def test_state_of_other_batches(numbered: data.ArraySplit, state: dict, message: str):
    batches = data.train_batches(numbered, 4, seed=0)
    whole = {} if "next_index" in state else batches.get_state()
    with pytest.raises(ValueError, match=message):
        batches.set_state(whole | state)


def test_state_past_the_end(numbered: data.ArraySplit):
    batches = data.eval_batches(numbered, 4)
    batches.set_state(batches.get_state() | {"batches": 3})
    assert list(batches) == []
    with pytest.raises(ValueError, match="batches=4: there are 0 to 3"):
        batches.set_state(batches.get_state() | {"batches": 4})


def test_crop_comes_before_batching(numbered: data.ArraySplit):
    plain = data.Normalization((0.0,), (1.0,))
    crop = data.CenterCrop(3, share=1.0)
    for make in (data.train_batches, data.eval_batches):
        seed = {"seed": 0} if make is data.train_batches else {}
        batch = next(make(numbered, 4, crop=crop, normalization=plain, **seed))
        expected = np.broadcast_to(batch["label"][:, None, None, None] * 20 / 255, (4, 3, 3, 1))
        np.testing.assert_allclose(batch["image"], expected, rtol=1e-6)


def test_batches_stay_what_they_were(numbered: data.ArraySplit):
    """Published results depend on the order and on what each batch's generator draws."""

    class Draw:
        def __call__(self, images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
            return np.full_like(images, generator.integers(1000))

    plain = data.Normalization((0.0,), (1.0,))
    batches = take(
        data.train_batches(numbered, 4, seed=7, augment=[Draw()], normalization=plain), 3
    )
    assert [batch["label"].tolist() for batch in batches] == [
        [8, 0, 7, 1],
        [3, 6, 2, 4],
        [5, 9, 9, 0],
    ]
    assert [int(batch["image"].max()) for batch in batches] == [888, 263, 606]


class QuarterOfNext:
    """Mixes each image with a quarter of the next in the batch."""

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> data.Mixed:
        share = np.full(len(images), 0.75, np.float32)
        mixed = np.float32(0.75) * images + np.float32(0.25) * np.roll(images, -1, axis=0)
        return data.Mixed(mixed, np.roll(labels, -1), share)


def test_mixed_batches_by_hand(numbered: data.ArraySplit):
    """Images of 20 times the label; the order is that without mixing."""
    normalization = data.Normalization((0.5,), (0.25,))
    batches = data.train_batches(
        numbered, 4, seed=7, mix=QuarterOfNext(), normalization=normalization
    )
    (batch,) = take_mixed(batches, 1)
    assert batch["label"].tolist() == [8, 0, 7, 1]
    assert batch["other_label"].tolist() == [0, 7, 1, 8]
    assert batch["share"].tolist() == [0.75] * 4
    pixels = batch["image"][:, 0, 0, 0] * 0.25 + 0.5
    np.testing.assert_allclose(pixels * 255, [120, 35, 110, 55], rtol=1e-6)


def test_mixing_comes_after_augmentation(digits: data.ArraySplit):
    """It is given the augmented pixels, and the generator as augmentation leaves it."""

    class Note:
        def __call__(self, images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
            noted.append((data.Shift(2)(images, generator), copy.deepcopy(generator)))
            return noted[-1][0]

    noted: list[tuple[np.ndarray, np.random.Generator]] = []
    mix, plain = data.MixupOrCutMix(), data.Normalization((0.0,), (1.0,))
    batches = data.train_batches(
        digits, 32, seed=0, augment=[Note()], mix=mix, normalization=plain, threads=0
    )
    for batch, (augmented, generator) in zip(take_mixed(batches, 3), noted, strict=True):
        mixed = mix(augmented, batch["label"], generator)
        np.testing.assert_array_equal(batch["image"], mixed.images)
        np.testing.assert_array_equal(batch["other_label"], mixed.other_labels)
        np.testing.assert_array_equal(batch["share"], mixed.shares)
        assert batch["other_label"].dtype == np.int32
        assert batch["share"].dtype == np.float32


def test_without_mixing_there_are_two_arrays(numbered: data.ArraySplit):
    assert set(next(data.train_batches(numbered, 4, seed=0))) == {"image", "label"}
    assert set(next(data.eval_batches(numbered, 4))) == {"image", "label", "mask"}


def test_mixed_batches_resume_on_any_threads_and_workers(digits: data.ArraySplit):
    def start(**changes: int) -> data.BatchIterator[data.Batch]:
        return data.train_batches(
            digits, 48, seed=7, augment=(data.RandAugment(),), mix=data.MixupOrCutMix(), **changes
        )

    batches = start(threads=0)
    expected = take(batches, 6)
    assert all("share" in batch for batch in expected)
    assert_same(take(start(threads=3), 6), expected)
    on_workers = start(workers=2)
    assert_same(take(on_workers, 2), expected[:2])
    state = json.loads(json.dumps(on_workers.get_state()))
    on_workers.close()
    for changes in ({"threads": 0}, {"threads": 1}):
        resumed = start(**changes)
        resumed.set_state(state)
        assert_same(take(resumed, 4), expected[2:])


@pytest.mark.parametrize(("batch_size", "masks"), [(5, [5, 5]), (4, [4, 4, 2]), (16, [10])])
def test_eval_passes_once_in_order(numbered: data.ArraySplit, batch_size: int, masks: list[int]):
    batches = list(data.eval_batches(numbered, batch_size))
    assert [int(batch["mask"].sum()) for batch in batches] == masks
    assert {batch["image"].shape for batch in batches} == {(batch_size, 2, 2, 1)}
    assert {batch["mask"].dtype for batch in batches} == {np.dtype(np.bool_)}
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(10))
    padding = batches[-1]["image"][~batches[-1]["mask"]]
    np.testing.assert_array_equal(padding, np.zeros_like(padding))


def test_eval_batches_share_one_trace(numbered: data.ArraySplit):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def count(batch: data.EvalBatch) -> jax.Array:
        return jnp.sum(batch["label"] > 4, where=batch["mask"])

    assert sum(int(count(batch)) for batch in data.eval_batches(numbered, 3)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"threads": -1}, "threads=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"normalization": data.Normalization((0.5,) * 3, (0.5,) * 3)}, "has 3 channels.*have 1"),
    ],
)
@pytest.mark.parametrize("make", [data.eval_batches, data.train_batches])
def test_errors_come_at_once(numbered: data.ArraySplit, make, changes: dict, message: str):
    arguments = {"batch_size": 4} | changes
    if make is data.train_batches:
        arguments["seed"] = 0
    with pytest.raises(ValueError, match=message):
        make(numbered, **arguments)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_range(numbered: data.ArraySplit, seed: int):
    with pytest.raises(ValueError, match=f"seed={seed}"):
        data.train_batches(numbered, 4, seed=seed)


def test_empty_split():
    empty = data.ArraySplit(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32), 10)
    with pytest.raises(ValueError, match="no examples"):
        data.eval_batches(empty, 4)


@pytest.mark.parametrize(("mean", "std"), [((0.1, 0.2), (1.0,)), ((0.1,), (0.0,))])
def test_bad_normalisation(mean: tuple[float, ...], std: tuple[float, ...]):
    with pytest.raises(ValueError, match="one positive std"):
        data.Normalization(mean, std)
