"""Tests of image folders: layouts, splits, classes, what is refused."""

import os
import pathlib
import pickle
import shutil
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from ssvq_jax import data
from ssvq_jax.data import fingerprint, folders, sources


def write(file: pathlib.Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> None:
    """Writes an image of one colour, `size` being height and width."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file)


@pytest.fixture
def flat(tmp_path: pathlib.Path) -> pathlib.Path:
    """Classes a, b and c of 20, 3 and 1 images, all pixels 0, 1 and 2."""
    for value, (name, count) in enumerate({"a": 20, "b": 3, "c": 1}.items()):
        for i in range(count):
            write(tmp_path / "flat" / name / f"{i}.png", value)
    return tmp_path / "flat"


def counts(split: data.FolderSplit | data.ArraySplit | data.RecordSplit) -> list[int]:
    _, labels = split.take(range(len(split)))
    return np.bincount(labels, minlength=split.num_classes).tolist()


def test_fixed_splits(flat: pathlib.Path):
    opened = {key: data.open_folder(flat, key) for key in ("train", "validation", "test")}
    assert {key: counts(split) for key, split in opened.items()} == {
        "train": [13, 2, 0],
        "validation": [3, 1, 0],
        "test": [4, 0, 1],
    }
    files = [file for split in opened.values() for file in split.files]
    assert len(set(files)) == len(files) == 24
    for split in opened.values():
        assert isinstance(split, data.ImageSplit)
        assert split.class_names == ("a", "b", "c")
        assert split.image_shape == (4, 3, 3)
        images, labels = split.take(range(len(split)))
        expected = np.broadcast_to(labels[:, None, None, None], images.shape)
        np.testing.assert_array_equal(images, expected)
        assert split[0]["label"] == labels[0]


def test_splits_and_order_depend_on_names_alone(flat: pathlib.Path, tmp_path: pathlib.Path):
    before = data.open_folder(flat, "train").files
    copy = tmp_path / "elsewhere"
    for file in sorted(flat.rglob("*.png"), reverse=True):  # another order of creation
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / file.parent.name)
    assert data.open_folder(copy, "train").files == before
    # Pinned: another order would be another data set.
    assert before[:3] == ("a/0.png", "b/2.png", "a/19.png")


def test_new_files_move_no_old_ones(flat: pathlib.Path):
    def split_of_files() -> dict[str, str]:
        splits = {key: data.open_folder(flat, key).files for key in data.list_splits(str(flat))}
        return {file: key for key, files in splits.items() for file in files}

    before = split_of_files()
    for i in range(100, 160):
        write(flat / "a" / f"{i}.png")
        write(flat / "d" / f"{i}.png")
    after = split_of_files()
    assert {file: after[file] for file in before} == before
    added = [key for file, key in after.items() if file not in before]
    assert {key: added.count(key) for key in ("train", "validation", "test")} == {
        "train": 100,
        "validation": 5,
        "test": 15,
    }


def test_a_fingerprint_is_of_names_classes_and_contents(flat: pathlib.Path):
    seen = {folders.folder_fingerprint(flat)}
    assert folders.folder_fingerprint(flat) in seen
    for change in ("rename", "swap", "add", "edit"):
        if change == "rename":
            (flat / "a").rename(flat / "d")
        elif change == "swap":  # files of equal names and sizes
            (flat / "b").rename(flat / "x")
            (flat / "d").rename(flat / "b")
            (flat / "x").rename(flat / "d")
        elif change == "add":
            write(flat / "b" / "new.png")
        else:
            file = flat / "b" / "new.png"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        found = folders.folder_fingerprint(flat)
        assert found not in seen, change
        seen.add(found)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_file_names_may_be_any_bytes_but_classes_are_text(flat: pathlib.Path):
    before = folders.folder_fingerprint(flat)
    name = next((flat / "b").iterdir()).name
    (flat / "b" / name).rename(flat / "b" / os.fsdecode(b"caf\xe9.png"))
    assert sum(folders.folder_splits(flat).values()) == 24
    assert folders.folder_fingerprint(flat) != before
    (flat / "b").rename(flat / os.fsdecode(b"b\xf6"))
    with pytest.raises(ValueError, match=r"sub-folder 'b.udcf6' of .* is not text in UTF-8"):
        folders.folder_splits(flat)


def test_passed_over_files_are_reported_once(flat: pathlib.Path):
    (flat / "b" / "note.txt").write_text("woof")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        folders.folder_splits(flat)
        folders.folder_fingerprint(flat)
        data.open_folder(flat, "train")
    assert [str(one.message).split(" are ")[0] for one in shown] == [f"1 files in {flat}"]


def test_large_sets_are_sampled(flat: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    file = flat / "a" / "0.png"
    file.write_bytes(file.read_bytes() + bytes(20_000))
    whole = folders.folder_fingerprint(flat)
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    ends = folders.folder_fingerprint(flat)
    content = bytearray(file.read_bytes())
    content[10_000] ^= 1  # in the middle, which is not read
    file.write_bytes(content)
    assert folders.folder_fingerprint(flat) == ends != whole
    content[-1] ^= 1
    file.write_bytes(content)
    assert folders.folder_fingerprint(flat) != ends


def test_parts_and_sums(flat: pathlib.Path):
    whole = data.open_folder(flat, "train").files
    assert data.open_folder(flat, "train[:50%]").files == whole[:8]
    both = data.open_folder(flat, "train[-2:]+test").files
    assert both == (*whole[-2:], *data.open_folder(flat, "test").files)


def test_own_splits_share_their_classes(tmp_path: pathlib.Path):
    for file in ("train/cat/1.png", "train/emu/2.JPG", "val/bee/3.bmp", "val/emu/4.webp"):
        write(tmp_path / file)
    write(tmp_path / "docs" / "cover.png")  # holds no sub-folders: no split
    write(tmp_path / "train" / "cat" / ".hidden.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"2 files .*\(1 .txt, 1 outside of a class folder\)"):
        train, val = (data.open_folder(tmp_path, key) for key in ("train", "val"))
    assert train.class_names == val.class_names == ("bee", "cat", "emu")
    assert dict(zip(train.files, train.labels.tolist(), strict=True)) == {
        "train/cat/1.png": 1,
        "train/emu/2.JPG": 2,
    }
    assert dict(zip(val.files, val.labels.tolist(), strict=True)) == {
        "val/bee/3.bmp": 0,
        "val/emu/4.webp": 2,
    }
    (tmp_path / "docs" / "cover.png").unlink()
    (tmp_path / "train" / "cat" / "notes.txt").unlink()
    assert data.open_folder(tmp_path, "validation").files == val.files
    assert data.list_splits(str(tmp_path)) == {"train": 2, "validation": 2}


def test_two_folders_for_one_split_keep_their_names(tmp_path: pathlib.Path):
    for file in ("train/a/1.png", "val/a/2.png", "dev/a/3.png"):
        write(tmp_path / file)
    assert data.list_splits(str(tmp_path)) == {"dev": 1, "train": 1, "val": 1}
    assert data.open_folder(tmp_path, "val").files == ("val/a/2.png",)


def test_a_class_may_be_called_like_a_split(tmp_path: pathlib.Path):
    for file in ("train/1.png", "plane/2.png"):
        write(tmp_path / file)
    assert data.open_folder(tmp_path, "train").class_names == ("plane", "train")


@pytest.mark.parametrize(("channels", "expected"), [(1, 150), (3, 150), (4, 150)])
def test_channels(tmp_path: pathlib.Path, channels: int, expected: int):
    write(tmp_path / "a" / "1.png", 150)
    split = data.open_folder(tmp_path, "train", channels=channels)
    assert split.image_shape == (4, 3, channels)
    assert split[0]["image"].shape == (4, 3, channels)
    assert split[0]["image"][0, 0, 0] == expected


def test_load_split_keeps_small_folders_in_memory(
    flat: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    in_memory = data.load_split(str(flat), "train")
    assert isinstance(in_memory, data.ArraySplit)
    assert in_memory.class_names == ("a", "b", "c")
    monkeypatch.setattr(sources, "CACHE_BYTES", 15 * 4 * 3 * 3 - 1)
    on_disk = data.load_split(str(flat), "train")
    assert isinstance(on_disk, data.FolderSplit)
    for one, other in zip(in_memory.take([3, 1]), on_disk.take([3, 1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_images_of_several_sizes_stay_on_disk(flat: pathlib.Path):
    write(flat / "a" / "wide.png", size=(4, 9))
    split = data.load_split(str(flat), "all")
    assert isinstance(split, data.FolderSplit)
    assert split.image_shape == (None, None, 3)


def test_too_many_files_are_not_measured(flat: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders, "MEASURED_FILES", 14)
    assert data.open_folder(flat, "train").image_shape == (None, None, 3)
    assert data.open_folder(flat, "test").image_shape == (4, 3, 3)


def test_which_names_are_folders(flat: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(flat.parent)
    monkeypatch.setenv("HOME", str(flat.parent))
    for name in ("./flat", "~/flat", "../" + flat.parent.name + "/flat", str(flat)):
        assert len(data.load_split(name, "train")) == 15
    with pytest.raises(ValueError, match="no data set 'flat' in .* is written './flat'"):
        data.load_split("flat", "train", flat)
    with pytest.raises(ValueError, match="no data set 'some/flat' in .* is written './some/flat'"):
        data.load_split("some/flat", "train", flat)
    for name in ("a/b/c", "my-photos", "cifar-10"):  # not even names of sets
        with pytest.raises(
            ValueError, match=f"no data set '{name}' in .* prepare it with"
        ) as error:
            data.load_split(name, "train", flat)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"no image folder no_such: .* {flat.parent}/no_such"):
        data.load_split("./no_such", "train")


def test_photographs_are_turned_upright(tmp_path: pathlib.Path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png", exif=exif)
    split = data.open_folder(tmp_path, "train")
    assert split.image_shape == (6, 4, 3)
    np.testing.assert_array_equal(split[0]["image"][:3], 255)
    np.testing.assert_array_equal(split[0]["image"][3:], 0)


def test_grey_and_transparent_files(tmp_path: pathlib.Path):
    (tmp_path / "a").mkdir()
    grey = Image.fromarray(np.full((3, 3), 7, np.uint8))
    grey.save(tmp_path / "a" / "grey.png")
    palette = grey.convert("P")
    palette.info["transparency"] = bytes([0] * 256)
    palette.save(tmp_path / "a" / "palette.png", transparency=bytes([0] * 256))
    split = data.load_split(str(tmp_path), "train", channels=1)
    assert split.image_shape == (3, 3, 1)
    images, _ = split.take(range(2))
    np.testing.assert_array_equal(images, 7)


def test_splits_pickle(flat: pathlib.Path):
    split = data.open_folder(flat, "train")
    copy = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(copy.take([5])[0], split.take([5])[0])


@pytest.mark.parametrize(
    "split", ["tset", "train[:200%]", "train[", "", "validation[3:3]", "train[9:4]"]
)
def test_bad_split(flat: pathlib.Path, split: str):
    message = "cannot be read: .*'train': 15, 'validation': 4, 'test': 5|holds no images"
    with pytest.raises(ValueError, match=message):
        data.open_folder(flat, split)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no sub-folders: put the images of each class into a sub-folder"),
        (["1.png"], "has no sub-folders"),
        (["a/notes.txt", "b/notes.txt"], "sub-folders of .*, a, b, hold no images: put .bmp"),
        (["a/1.png", "labels/notes.txt"], "'labels' of .* would be a class but holds no images"),
        (["a/deep/1.png"], "sub-folders of .*, a, hold no images"),
    ],
)
def test_what_is_no_image_folder(tmp_path: pathlib.Path, files: Sequence[str], message: str):
    for file in files:
        if file.endswith(".png"):
            write(tmp_path / file)
        else:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text("no image")
    with pytest.raises(ValueError, match=message):
        data.open_folder(tmp_path, "train")


def test_bad_channels(flat: pathlib.Path):
    with pytest.raises(ValueError, match=r"channels=2: give one of \[1, 3, 4\]"):
        data.open_folder(flat, "train", channels=2)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "16 bits"])
def test_unreadable_file_is_named(tmp_path: pathlib.Path, damage: str):
    file = tmp_path / "a" / "1.png"
    write(file, size=(100, 100))
    if damage == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "16 bits":
        Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(file)
    else:
        file.write_text("no image" if damage == "text" else "")
    with pytest.raises(ValueError, match=f"{file} is not a readable image .* replace or delete"):
        data.load_split(str(tmp_path), "train")
