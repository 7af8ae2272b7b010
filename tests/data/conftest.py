"""The embedded digits, opened once for all tests of the room."""

import pathlib

import pytest

from ssvq_jax import data


@pytest.fixture(scope="session")
def digits(data_dir: pathlib.Path) -> data.ArraySplit:
    split = data.load_split("mnist_digits_5k", "train", data_dir)
    assert isinstance(split, data.ArraySplit)
    return split
