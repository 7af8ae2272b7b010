import pytest

from ssvq_jax.data.labelled_files import find_images, folder_labels, read_labels


def test_images_are_found_in_sub_folders(tmp_path):
    for name in ("b/2.JPG", "a/1.png", "a/notes.txt", "c/d/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 files in .* are passed over \(1 .txt\)"):
        assert find_images(tmp_path) == ["a/1.png", "b/2.JPG", "c/d/3.webp"]
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="no images in .*notes"):
        find_images(tmp_path / "notes")
    with pytest.raises(ValueError, match="no folder .*nothing: give one with images"):
        find_images(tmp_path / "nothing")


def test_folders_are_classes_in_order_or_by_number():
    assert folder_labels(["cat/1.png", "ant/2.png", "cat/3.png"], 2) == {
        "cat/1.png": 1, "ant/2.png": 0, "cat/3.png": 1,
    }  # fmt: skip
    assert folder_labels(["7/1.png", "12/2.png"], 1000) == {"7/1.png": 7, "12/2.png": 12}
    assert folder_labels(["1.png", "ant/2.png"], 2) is None
    with pytest.raises(
        ValueError, match=r"2 folders of images \(ant, cat, ...\), but the model has"
    ):
        folder_labels(["cat/1.png", "ant/2.png"], 1000)


@pytest.mark.parametrize("head", ["", "file,label\n", "File, Label\n"])
def test_labels_from_a_table(tmp_path, head):
    table = tmp_path / "labels.csv"
    table.write_text(f'{head}1.png,3\n"a, b.png", 0\n\nother.png,1\n')
    assert read_labels(table, ["1.png", "a, b.png"], 4) == {"1.png": 3, "a, b.png": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.png,4\n", "row 1: '1.png,4'; give file,label with a class index of 0 to 3"),
        ("1.png,cat\n", "row 1: '1.png,cat'"),
        ("1.png\n", "row 1: '1.png'"),
        ("1.png,-1\n", "row 1"),
        ("2.png,1\n", "none for 1 of 1 images, e.g. '1.png'"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, message):
    table = tmp_path / "labels.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(table, ["1.png"], 4)
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "nothing.csv", ["1.png"], 4)
