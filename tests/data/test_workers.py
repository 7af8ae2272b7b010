"""Tests of batches from several processes: the same ones, the same state, nothing left behind."""

import gc
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from ssvq_jax import data

AUGMENT = (data.Shift(2), data.Affine(degrees=10.0, scale=0.1))


def make(digits: data.ArraySplit, **changes: int) -> data.BatchIterator[data.Batch]:
    arguments = {"batch_size": 64, "seed": 7, "crop": data.RandomResizedCrop(20)} | changes
    return data.train_batches(digits, augment=AUGMENT, **arguments)


def assert_same(first: list[data.Batch], second: list[data.Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        chex.assert_trees_all_equal(one, other)


def assert_workers_end() -> None:
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def expected(digits: data.ArraySplit) -> list[data.Batch]:
    batches = make(digits)
    return [next(batches) for _ in range(45)]  # reaches into the second epoch


@pytest.mark.parametrize(
    ("workers", "threads"), [(1, 2), pytest.param(3, 0, marks=pytest.mark.slow)]
)
def test_same_batches_and_state(
    digits: data.ArraySplit, expected: list[data.Batch], workers: int, threads: int
):
    batches = make(digits, workers=workers, threads=threads)
    assert_same([next(batches) for _ in range(42)], expected[:42])
    state = batches.get_state()
    assert state == {"batches": 42, "examples": 2500, "batch_size": 64, "seed": 7}
    resumed = make(digits)  # on no workers
    resumed.set_state(state)
    assert_same([next(resumed) for _ in range(3)], expected[42:])
    batches.set_state(state | {"batches": 41})  # and back on workers
    assert_same([next(batches) for _ in range(4)], expected[41:])
    assert type(next(batches)["image"]) is np.ndarray
    del batches
    assert_workers_end()


def test_eval_ends_on_workers(digits: data.ArraySplit):
    batches = data.eval_batches(digits, 900, workers=2)
    assert_same(list(batches), list(data.eval_batches(digits, 900)))
    assert list(batches) == []
    assert_workers_end()


def test_more_workers_than_batches():
    split = data.ArraySplit(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32), 3)
    (batch,) = data.eval_batches(split, 4, workers=2)
    np.testing.assert_array_equal(batch["mask"], [True, True, True, False])
    assert_workers_end()


def test_error_of_a_worker_arrives(tmp_path: pathlib.Path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.fromarray(np.zeros((8 + i, 8, 3), np.uint8)).save(tmp_path / "a" / f"{i}.png")
    split = data.open_folder(tmp_path, "all")
    (tmp_path / split.files[2]).write_text("no image")
    plain = data.normalization_preset("unit", 3)
    batches = data.eval_batches(
        split, 1, crop=data.CenterCrop(4), normalization=plain, workers=1, threads=0
    )
    assert next(batches)["image"].shape == next(batches)["image"].shape == (1, 4, 4, 3)
    for _ in range(2):  # it does not pass for the end of the data
        with pytest.raises(ValueError, match="2?.png is not a readable image"):
            next(batches)
    batches.close()
    assert_workers_end()
    with pytest.raises(ValueError, match="is closed: make a new one"):
        next(batches)


SCRIPT = """
import multiprocessing, os, numpy as np
from ssvq_jax import data

class Probe:  # defined in the script, so only it knows it
    def __call__(self, images, generator):
        from jax._src import xla_bridge
        in_worker = multiprocessing.parent_process() is not None
        return images + np.float32(in_worker and not xla_bridge._backends)

print("main", __name__)
split = data.ArraySplit(np.zeros((9, 4, 4, 1), np.uint8), np.zeros(9, np.int32), 1)
unit = data.normalization_preset("unit", 1)
batches = data.train_batches(split, 4, seed=0, augment=[Probe()], normalization=unit, workers=2)
print(*(next(batches)["image"].min() for _ in range(3)), os.path.basename(__file__))
"""


def test_script_without_main_guard(tmp_path: pathlib.Path):
    """Workers neither run the script again nor touch an accelerator, and end silently with it."""
    (tmp_path / "train.py").write_text(SCRIPT)
    root = pathlib.Path(data.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["main", "__main__", "1.0", "1.0", "1.0", "train.py"]
