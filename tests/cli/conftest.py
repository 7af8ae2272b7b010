"""A short quickstart, which several files of tests look into."""

import contextlib

import jax
import pytest

from ssvq_jax.cli.main import main


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory, data_dir):
    """The folder of the run; what it printed lies beside it. Nobody writes to them."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    arguments = ["--out", str(out), "--data-dir", str(data_dir), "--float-steps", "20"]
    arguments += ["--steps", "10", "--methods", "vq-26x-shared", "ssvq-26x-shared"]
    with (
        (out.parent / "printed.txt").open("w") as printed,
        contextlib.redirect_stdout(printed),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        main(["quickstart", *arguments])
    return out
