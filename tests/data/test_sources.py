"""Tests of opening sets that lie on disk."""

import io
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ssvq_jax import data
from ssvq_jax.data import sources


def test_attributes(data_dir: pathlib.Path):
    split = data.load_split("mnist_digits_5k", "test", data_dir)
    assert (len(split), split.image_shape, split.num_classes) == (1500, (28, 28, 1), 10)
    example = split[3]
    assert example["image"].shape == (28, 28, 1)
    assert example["image"].dtype == np.uint8
    assert example["label"] in range(10)


@pytest.mark.parametrize(
    ("split", "count"),
    [("train[:10%]", 250), ("train[-20:]", 20), ("validation+test", 2500), ("all", 5000)],
)
def test_split_strings_as_in_tfds(data_dir: pathlib.Path, split: str, count: int):
    loaded = data.load_split("mnist_digits_5k", split, data_dir)
    assert len(loaded) == count
    _, labels = loaded.take(range(count))
    np.testing.assert_array_equal(np.bincount(labels), count // 10)


def test_large_sets_stay_on_disk(data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    in_memory = data.load_split("mnist_digits_5k", "test", data_dir)
    monkeypatch.setattr(sources, "CACHE_BYTES", 1500 * 28 * 28 - 1)
    on_disk = data.load_split("mnist_digits_5k", "test", data_dir)
    assert isinstance(in_memory, data.ArraySplit)
    assert isinstance(on_disk, data.RecordSplit)
    assert len(on_disk) == 1500
    for expected, actual in zip(in_memory.take([5, 9]), on_disk.take([5, 9]), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_home_is_expanded(data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(data_dir.parent))
    monkeypatch.chdir(data_dir.parent)
    assert len(data.load_split("mnist_digits_5k", "test", f"~/{data_dir.name}")) == 1500
    assert not pathlib.Path("~").exists()


def test_version_may_be_named(data_dir: pathlib.Path):
    assert len(data.load_split("mnist_digits_5k:1.0.0", "test", data_dir)) == 1500


@pytest.mark.parametrize("split", ["tset", "train[:200%]", "train[", "train[7:7]", "train[9:4]"])
def test_bad_split_lists_the_splits(data_dir: pathlib.Path, split: str):
    with pytest.raises(ValueError, match=r"cannot be read .*'train': 2500, 'validation': 1000"):
        data.load_split("mnist_digits_5k", split, data_dir)


def test_splits_are_listed(data_dir: pathlib.Path):
    expected = {"train": 2500, "validation": 1000, "test": 1500}
    assert data.list_splits("mnist_digits_5k", data_dir) == expected
    assert data.ImageData("mnist_digits_5k", data_dir).splits() == expected
    with pytest.raises(ValueError, match="no data set 'cifar10'"):
        data.list_splits("cifar10", data_dir)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar10:3.0.2", "no_such_set", "mnist_digits_5k:9.0.0"]
)
def test_missing_set_says_where_it_looked(data_dir: pathlib.Path, name: str):
    with pytest.raises(ValueError, match="no data set") as error:
        data.load_split(name, "train", data_dir)
    command = f"tfds build {name} --data_dir {data_dir} --file_format array_record"
    assert f"no data set {name!r} in {data_dir}" in str(error.value)
    assert command in str(error.value)
    assert "needs TensorFlow installed" in str(error.value)


def test_format_without_random_access(data_dir: pathlib.Path, tmp_path: pathlib.Path):
    copy = tmp_path / "mnist_digits_5k" / "1.0.0"
    shutil.copytree(data_dir / "mnist_digits_5k" / "1.0.0", copy)
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="no random access: prepare it again with `tfds build"):
        data.load_split("mnist_digits_5k", "train", tmp_path)


class MadeUp(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the given examples."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, features: dict, examples: list[dict], **arguments: Any):
        self._features, self._examples = features, examples
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._examples)


def write_set(root: pathlib.Path, features: dict, examples: list[dict]) -> None:
    MadeUp(features, examples, data_dir=root).download_and_prepare(file_format="array_record")


IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
LABEL = tfds.features.ClassLabel(num_classes=3)


def picture(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), height, np.uint8)).save(file, format="png")
    return file.getvalue()


def test_images_of_several_sizes_stay_on_disk(tmp_path: pathlib.Path):
    examples = [{"image": picture(4, 6), "label": 0}, {"image": picture(5, 6), "label": 2}]
    write_set(tmp_path, {"image": IMAGE, "label": LABEL}, examples)
    split = data.load_split("made_up", "train", tmp_path)
    assert isinstance(split, data.RecordSplit)
    assert (split.image_shape, split.num_classes) == ((None, None, 3), 3)
    assert [split[i]["image"].shape for i in range(2)] == [(4, 6, 3), (5, 6, 3)]
    with pytest.raises(ValueError, match="images of several sizes cannot be batched"):
        data.train_batches(split, 2, seed=0)


def test_raw_tensors_are_read_too(tmp_path: pathlib.Path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
    tensor = tfds.features.Tensor(shape=(3, 4, 1), dtype=np.uint8)
    examples = [{"image": image, "label": 1} for image in pixels]
    write_set(tmp_path, {"image": tensor, "label": LABEL}, examples)
    split = data.load_split("made_up", "train", tmp_path)
    assert isinstance(split, data.ArraySplit)
    np.testing.assert_array_equal(split.images, pixels)


@pytest.mark.parametrize(
    ("features", "example", "message"),
    [
        ({"label": LABEL}, {"label": 0}, r"has the features \['label'\]"),
        (
            {"image": IMAGE, "label": np.int64},
            {"image": picture(4, 4), "label": 0},
            "only a ClassLabel",
        ),
        (
            {"image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.float32), "label": LABEL},
            {"image": np.zeros((2, 2, 1), np.float32), "label": 0},
            "only uint8",
        ),
    ],
)
def test_other_features_are_refused(
    tmp_path: pathlib.Path, features: dict, example: dict, message: str
):
    write_set(tmp_path, features, [example])
    with pytest.raises(ValueError, match=message):
        data.load_split("made_up", "train", tmp_path)


@pytest.mark.parametrize("damage", ["shard", "info", "empty"])
def test_damaged_set_names_the_folder_to_delete(damage: str, tmp_path: pathlib.Path):
    folder = pathlib.Path(data.prepare_embedded(tmp_path))
    if damage == "shard":
        (shard,) = folder.glob("*test.array_record*")
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "info":
        (folder / "dataset_info.json").write_text("{")
    else:
        for file in folder.iterdir():
            file.unlink()
    with pytest.raises(
        ValueError, match=f"{folder.parent} cannot be read, or is damaged .* delete that folder"
    ):
        data.load_split("mnist_digits_5k", "test", tmp_path)
