import itertools

import numpy as np
import pytest

from ssvq_jax.data.text import read_documents, token_windows


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("length", [1, 4, 7, 100])
def test_windows_are_the_joined_documents_cut(length, separator):
    documents = [[1, 2, 3], [], [4], list(range(5, 30)), [30, 31]]
    end = [] if separator is None else [separator]
    joined = list(itertools.chain.from_iterable([*document, *end] for document in documents))
    windows = list(token_windows(documents, length, separator=separator))
    assert all(window.shape == (length,) and window.dtype == np.int32 for window in windows)
    full = len(joined) // length * length
    assert np.concatenate([np.zeros(0, np.int32), *windows]).tolist() == joined[:full]


def test_documents_are_read_as_they_are_needed():
    windows = token_windows(itertools.repeat([1, 2, 3]), 2)
    assert [next(windows).tolist() for _ in range(3)] == [[1, 2], [3, 1], [2, 3]]


def test_refuses():
    with pytest.raises(ValueError, match="length=0: give at least 1"):
        next(token_windows([[1]], 0))


def test_files_of_both_kinds_are_read_in_their_order(tmp_path):
    page = "<page><ns>0</ns><revision><text>{}</text></revision></page>"
    dump = f"<mediawiki>{page}{page}</mediawiki>"
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "b.xml").write_text(dump.format("One", "[[Two]]"))
    files = [tmp_path / name for name in ("b.xml", "a.txt")]
    assert list(read_documents(files)) == ["One", "Two", "some text\n"]
    (tmp_path / "c.xml").write_text(dump.format("", "{{only|a template}}"))
    with pytest.raises(ValueError, match="c.xml holds no articles: give another"):
        list(read_documents([tmp_path / "c.xml"]))
    with pytest.raises(ValueError, match="no text at .*d.txt"):
        next(read_documents([tmp_path / "a.txt", tmp_path / "d.txt"]))  # before any is read
