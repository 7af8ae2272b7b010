"""Shared test set-up: compilation, run-time shape checks, strict promotion, the slow mark."""

import atexit
import gc
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

# Before JAX is imported; the processes that tests start inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles far more than it computes. These flags take a quarter of the time to compile;
# XLA_FLAGS= (set, and empty) compiles as users do, and nightly runs set it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# All processes of a run share what they compile. The folder goes with the run, unless the variable
# names one to keep.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssvq-tests-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import chex
import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Annotated functions of the package can check their shapes and dtypes; see _annotations_checked.
_hook = install_import_hook("ssvq_jax", "beartype.beartype")
_hook.__enter__()

# Daily, few examples and always the same: what fails is the change. Nightly, many and others.
hypothesis.settings.register_profile("daily", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.register_profile("nightly", deadline=None, print_blob=True, max_examples=100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Doctests are looked for in modules, and there can be one module `conftest`.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


_tests_run = itertools.count(1)
_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def _few_memory_maps() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Forgets compiled programs in time: each has memory maps, and Linux allows 65,530."""
    yield
    if next(_tests_run) % 10 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _own_traces() -> None:  # pyright: ignore[reportUnusedFunction]
    """Resets `chex.assert_max_traces`, which counts functions of the same source together."""
    chex.clear_trace_counter()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the embedded data set, prepared once."""
    from ssvq_jax import data

    root = tmp_path_factory.mktemp("tfds")
    data.prepare_embedded(root)
    return root


_checked: set[tuple[pathlib.Path, str]] = set()
_WHOLE_PROGRAMS = {"cli", "experiments", "test_composition.py", "test_readme.py"}


@pytest.fixture(autouse=True)
def _annotations_checked(request: pytest.FixtureRequest) -> None:  # pyright: ignore[reportUnusedFunction]
    """Checks annotations in the first case of each test, but for whole programs; nightly in all."""
    path = request.path
    test = path, getattr(request.node, "originalname", request.node.name)
    whole = {path.name, path.parent.name} & _WHOLE_PROGRAMS
    skipped = (whole or test in _checked) and not request.config.getoption("--run-slow")
    jaxtyping.config.update("jaxtyping_disable", bool(skipped))
    _checked.add(test)


@pytest.fixture
def as_installed(_annotations_checked: None) -> None:
    """Without the run-time annotation checks, which would refuse some bad input first."""
    jaxtyping.config.update("jaxtyping_disable", True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("nightly" if config.getoption("--run-slow") else "daily")


def pytest_collection_finish() -> None:
    """Spares the garbage collector what stays to the end: modules and tests are most of it."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # What takes longest comes first, so that no worker waits for it at the end.
    items.sort(key=lambda item: item.path.name not in ("test_eight_devices.py", "test_readme.py"))
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --run-slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives neighbouring tests, which share fixtures and programs, to one worker."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
