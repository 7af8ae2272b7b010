"""Tests of the two kinds of split."""

import io

import numpy as np
import pytest
from PIL import Image

from ssvq_jax import data


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def test_both_kinds_give_the_same_examples(colours: np.ndarray):
    labels = np.array([2, 0, 1, 1, 2], np.int32)
    arrays = data.ArraySplit(colours, labels, num_classes=3)
    records = data.RecordSplit(
        [{"image": png(c), "label": int(n)} for c, n in zip(colours, labels, strict=True)],
        num_classes=3,
        image_shape=(6, 4, 3),
    )
    assert isinstance(arrays, data.ImageSplit)
    assert isinstance(records, data.ImageSplit)
    assert len(arrays) == len(records) == 5
    assert arrays.image_shape == records.image_shape == (6, 4, 3)
    np.testing.assert_array_equal(records[3]["image"], colours[3])
    assert records[3]["label"] == arrays[3]["label"] == 1
    for taken in (arrays.take([4, 1, 1]), records.take(np.array([4, 1, 1]))):
        np.testing.assert_array_equal(taken[0], colours[[4, 1, 1]])
        np.testing.assert_array_equal(taken[1], [2, 0, 0])
        assert taken[1].dtype == np.int32


def test_records_may_hold_arrays(colours: np.ndarray):
    records = data.RecordSplit([{"image": colours[0], "label": 0}], 1, (6, 4, 3))
    np.testing.assert_array_equal(records[0]["image"], colours[0])


def test_grey_file_in_a_colour_set_gets_three_channels():
    grey = np.arange(24, dtype=np.uint8).reshape(6, 4)
    records = data.RecordSplit([{"image": png(grey), "label": 0}], 1, (None, None, 3))
    np.testing.assert_array_equal(records[0]["image"], np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(4, np.int32), r"labels are int32 \[4\]: give int32 \[5\]"),
        (np.zeros(5, np.int64), r"labels are int64 \[5\]: give int32 \[5\]"),
        (np.array([0, 1, 2, 3, -1], np.int32), r"from -1 to 3: num_classes=3 allows 0 to 2"),
    ],
)
def test_array_split_checks_its_labels(colours: np.ndarray, labels: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        data.ArraySplit(colours, labels, num_classes=3)


def test_array_split_checks_its_images():
    with pytest.raises(ValueError, match=r"images are float64 \[5, 6, 4\]: give uint8"):
        data.ArraySplit(np.zeros((5, 6, 4)), np.zeros(5, np.int32), num_classes=3)
