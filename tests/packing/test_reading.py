"""A packed file read leaf by leaf, from several threads, and while it changes."""

import os
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from packed_models import pack, same, weight

import ssvq_jax
from ssvq_jax import PackedFileError, load, save


def test_a_leaf_reads_its_own_bytes_alone(file, monkeypatch):
    with load(file) as opened:
        read, asked = opened._stored.container.read, []

        def counted(start, size, what):
            asked.append(size)
            return read(start, size, what)

        monkeypatch.setattr(opened._stored.container, "read", counted)
        opened.leaf("head")
        assert sorted(asked) == [2 * 16, 8 * 16 * 3 // 8]  # steps, levels
        asked.clear()
        opened.leaf("norm")
        assert asked == [6]


def test_a_leaf_that_is_not_there_is_named(file):
    with load(file) as opened, pytest.raises(ValueError, match=r"no leaf 'x'; it has blocks/0/"):
        opened.leaf("x")


def test_threads_read_one_open_file(packed, file):
    expected = ssvq_jax.tree.leaves_by_path(packed.decode())
    wrong = []
    with load(file) as opened:

        def read(paths):
            wrong.extend(path for path in paths if not same(opened.leaf(path), expected[path]))

        paths = list(expected)
        threads = [threading.Thread(target=read, args=(paths[i:] * 5,)) for i in range(len(paths))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_readers_see_the_old_or_the_new_file_while_several_save(tmp_path):
    path = tmp_path / "x"
    versions = [pack({"w": jnp.full(20_000, float(i))}, [(".*", None)]) for i in range(3)]
    save(path, versions[0])
    failures, seen, done = [], [], threading.Event()

    def write(version):
        try:
            for _ in range(15):
                save(path, version)
        except BaseException as error:
            failures.append(error)

    def read():
        try:
            while not done.is_set():
                with load(path) as file:
                    seen.append(np.unique(file.read().params["w"]).tolist())
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(version,)) for version in versions]
    reader = threading.Thread(target=read)
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert all(values in ([0.0], [1.0], [2.0]) for values in seen)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_replaced_stays_open_as_it_was(packed, file):
    with load(file) as opened:
        save(file, pack({"other": weight()}, [(".*", None)]))
        assert same(opened.read(), packed)
    with load(file) as opened:
        assert [leaf.path for leaf in opened.plan.leaves] == ["other"]


def test_a_file_that_is_cut_off_while_it_is_read(file):
    with load(file) as opened:
        opened.leaf("head")
        os.truncate(file, opened.header_bytes + 1)
        for read in (opened.read, opened.verify):
            with pytest.raises(
                PackedFileError, match=r"tensor '\w+' of '.*' is cut off: .* changed"
            ):
                read()
        message = "tensor 'dense.bfloat16' of 'norm' is cut off: the file changed meanwhile"
        with pytest.raises(PackedFileError, match=message):
            opened.leaf("norm")


def test_a_file_that_is_overwritten_while_it_is_read(file):
    size = file.stat().st_size
    with load(file) as opened:
        opened.leaf("head")
        with file.open("r+b") as other:
            other.write(bytes(size))
        for path in ("head", "norm", "pair/b", "stack"):
            owner = "pairs" if path.startswith("pair") else path
            with pytest.raises(PackedFileError, match=f"'{owner}' is damaged: its checksum"):
                opened.leaf(path)


def test_a_closed_file_is_named(file):
    with load(file) as opened:
        pass
    with pytest.raises(PackedFileError, match=r"'head' cannot be read .*closed"):
        opened.leaf("head")
