"""Forged headers and contents under right checksums, which the reader's own checks must stand."""

import collections
import contextlib
import itertools
import signal
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_edits import EVIL, edits, forged

from ssvq_jax import PackedFileError, load
from ssvq_jax.tree import leaves_by_path

pytestmark = pytest.mark.usefixtures("as_installed")  # checked annotations would refuse some first


@contextlib.contextmanager
def limits(size):
    """Five seconds of processor time, and memory in proportion to the file's size.

    Beside that, what Python and JAX keep of a compilation, which no file can make larger.
    """

    def stop(number, frame):
        raise AssertionError("it takes more than 5 s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 5)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert peak < 16 * 2**20 + 200 * size


def outcome(path, raw):
    """Reads all of a file in every way; what is loaded must be finite and of the plan's shapes."""
    path.write_bytes(raw)
    found, messages = collections.Counter(), []
    with limits(len(raw)):
        try:
            with load(path) as opened:
                assert hash(opened.plan) == hash(opened.plan)
                for read in (opened.verify, opened.read, opened.state, opened.bits, opened.decode):
                    try:
                        result = read()
                    except PackedFileError as error:
                        messages.append(str(error))
                        found["refused when read"] += 1
                    except ValueError as error:
                        if "give load(..., like=" not in str(error):
                            raise
                        found["needs like="] += 1
                    else:
                        if read == opened.decode:
                            check_decoded(opened.plan, leaves_by_path(result))
                        found["loaded"] += 1
        except PackedFileError as error:
            messages.append(str(error))
            found["refused"] += 1
    assert all(message.startswith(str(path)) for message in messages)
    return found


def check_decoded(plan, decoded):
    assert set(decoded) == {leaf.path for leaf in plan.leaves}
    for leaf in plan.leaves:
        assert (decoded[leaf.path].shape, decoded[leaf.path].dtype) == (leaf.shape, leaf.dtype)
        if leaf.path in plan.compressed:
            assert np.isfinite(np.asarray(decoded[leaf.path], np.float32)).all()


def run_forgeries(files, path, examples):
    seen = collections.Counter()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(files)), st.lists(edits, min_size=1, max_size=4))
    def run(name, changes):
        found = outcome(path, forged(files[name], changes))
        seen.update(found)
        seen.update({(change[0], kind) for change, kind in itertools.product(changes, found)})

    run()
    return seen


def check_forgeries(seen):
    # Every kind of edit is refused, and some are let pass: those that change what is valid.
    for kind in ("put", "remove", "repeat", "copy", "shape", "quantizer", "rule", "structure"):
        assert seen[kind, "refused"] + seen[kind, "refused when read"] > 0
    for kind in ("put", "swap rows", "quantizer", "bytes"):
        assert seen[kind, "loaded"] > 0
    for kind in ("refused", "refused when read", "loaded"):
        assert seen[kind] > 0


def test_forged_files(files, tmp_path):
    check_forgeries(run_forgeries(files, tmp_path / "x", 400))


@pytest.mark.slow
def test_many_forged_files(files, tmp_path):
    seen = run_forgeries(files, tmp_path / "x", 5000)
    for kind, count in sorted(seen.items(), key=str):
        print(f"{count:7,} {kind}")
    check_forgeries(seen)


def test_a_file_that_is_not_forged_loads(files, tmp_path):
    """What the forging itself does to a file is nothing."""
    for raw in files.values():
        assert set(outcome(tmp_path / "x", forged(raw, []))) == {"loaded"}
        assert set(outcome(tmp_path / "x", raw)) == {"loaded"}


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_are_not_matched(pattern, files, tmp_path):
    change = ("rule", (4, "pattern"), pattern)
    found = outcome(tmp_path / "x", forged(files["plain"], [change]))
    compiles = pattern in EVIL[:3]
    assert set(found) == ({"loaded"} if compiles else {"refused"})
