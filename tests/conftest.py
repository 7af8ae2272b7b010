"""Shared test set-up: run-time shape checks, strict promotion, the slow mark."""

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Every annotated function of the package checks its shapes and dtypes while the tests run.
_hook = install_import_hook("ssvq_jax", "beartype.beartype")
_hook.__enter__()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Doctests are looked for in modules, and there can be one module `conftest`.
collect_ignore_glob = ["*/conftest.py"]


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_compiled_programs() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Forgets them now and then: each has memory maps, and a process gets 65,530 on Linux."""
    yield
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the embedded data set, prepared once."""
    from ssvq_jax import data

    root = tmp_path_factory.mktemp("tfds")
    data.prepare_embedded(root)
    return root


@pytest.fixture
def as_installed() -> Iterator[None]:
    """Without the run-time annotation checks, which would refuse some bad input first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def on_eight_devices() -> Callable[[pathlib.Path], None]:
    """Runs a file of tests in a process of its own with eight devices, which JAX then keeps."""

    def run(checks: pathlib.Path) -> None:
        environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
            env=environment, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --run-slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
