"""Which files of an image folder belong to which class and split.

What decides about fixed splits and about order are SHA-256 digests of the files' relative paths,
so neither depends on the machine or the file system.
"""

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from ssvq_jax.data.split_ranges import split_ranges

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Files with other endings are passed over."""

SPLIT_SHARES: Mapping[str, int] = {"validation": 10, "test": 10}
"""Percent of each class in the fixed splits; the rest is `train`."""

_SPLIT_FOLDERS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def read_layout(root: Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Lists the classes and the files of each split of an image folder.

    Args:
        root: The image folder.

    Returns:
        Names of the classes, sorted, and the files of each split, `"<class>/<file>"` or
        `"<split>/<class>/<file>"`, in a mixed order.

    Raises:
        ValueError: There are no class sub-folders, or one holds no images in any split.
    """
    classes_of = _read(root)
    names = tuple(sorted({name for classes in classes_of.values() for name in classes}, key=_nfc))
    _check_classes(root, names, classes_of)
    return names, {key: _mixed(classes) for key, classes in _with_fixed_splits(classes_of).items()}


def _read(root: Path) -> dict[str, dict[str, list[str]]]:
    """Lists the files of each class of each split; of the split "" if the folder has no splits."""
    tops = _sub_folders(root)
    if any(top.lower() in _SPLIT_FOLDERS and _sub_folders(root / top) for top in tops):
        inner = {top: _sub_folders(root / top) for top in tops}
        called = [_SPLIT_FOLDERS.get(top.lower(), top) for top in tops]
        return {
            # Two folders that would be called the same keep their names.
            split if called.count(split) == 1 else top: {
                name: _images(root, f"{top}/{name}") for name in inner[top]
            }
            for split, top in zip(called, tops, strict=True)
            if inner[top]
        }
    return {"": {name: _images(root, name) for name in tops}}


def _sub_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(root: Path, folder: str) -> list[str]:
    with os.scandir(root / folder) as entries:
        return [
            f"{folder}/{entry.name}"
            for entry in entries
            # Hidden ones too are left out: macOS puts a "._cat.jpg" beside "cat.jpg".
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        ]


def _check_classes(
    root: Path, names: tuple[str, ...], classes_of: Mapping[str, Mapping[str, list[str]]]
) -> None:
    if not names:
        raise ValueError(
            f"{root} has no sub-folders: put the images of each class into a sub-folder named "
            "after the class"
        )
    counts = {
        name: sum(len(classes.get(name, ())) for classes in classes_of.values()) for name in names
    }
    if not any(counts.values()):
        raise ValueError(
            f"the sub-folders of {root}, {', '.join(names[:5])}{', …' * (len(names) > 5)}, hold no "
            f"images: put {', '.join(SUFFIXES)} files directly into a sub-folder for each class"
        )
    for name, count in counts.items():
        if not count:  # most likely not a class at all, and it would shift the labels after it
            raise ValueError(
                f"the sub-folder {name!r} of {root} would be a class but holds no images: move it "
                f"away, or put {', '.join(SUFFIXES)} files directly into it"
            )


def _with_fixed_splits(
    classes_of: dict[str, dict[str, list[str]]],
) -> dict[str, dict[str, list[str]]]:
    """Divides the classes of a folder without splits."""
    if "" not in classes_of:
        return classes_of
    divided: dict[str, dict[str, list[str]]] = {"train": {}, **{key: {} for key in SPLIT_SHARES}}
    for name, files in classes_of[""].items():
        ranked = sorted(files, key=lambda file: _digest("split", file))
        if len(files) > len(SPLIT_SHARES):
            for split, share in SPLIT_SHARES.items():
                count = max(1, round(len(files) * share / 100))
                divided[split][name], ranked = ranked[:count], ranked[count:]
        divided["train"][name] = ranked
    return divided


def _mixed(classes: dict[str, list[str]]) -> tuple[str, ...]:
    files = [file for of_class in classes.values() for file in of_class]
    return tuple(sorted(files, key=lambda file: _digest("order", file)))


def _digest(purpose: str, file: str) -> bytes:
    return hashlib.sha256(_nfc(f"{purpose}/{file}").encode()).digest()


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # file systems differ in how they spell accents


def choose_files(root: Path, split: str, splits: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Looks up the files of a split, a part of one, or a sum.

    Args:
        root: The image folder, for messages.
        split: What to look up, as TFDS spells it.
        splits: The files of each split.

    Returns:
        The files.

    Raises:
        ValueError: There is no such split, or it is empty.

    Example:
        >>> choose_files(Path("flowers"), "train[:2]", {"train": ("b/1.png", "a/7.png", "a/3.png")})
        ('b/1.png', 'a/7.png')
    """
    if split not in splits:
        split = _SPLIT_FOLDERS.get(split.lower(), split)
    try:
        files = splits[split] if split in splits else _slices(split, splits)
    except ValueError as error:
        sizes = {key: len(files) for key, files in splits.items()}
        raise ValueError(
            f"split {split!r} of {root} cannot be read: its splits and their sizes are {sizes}; "
            "slices are written as in 'train[:10%]'"
        ) from error
    if not files:
        raise ValueError(f"split {split!r} of {root} holds no images: choose another")
    return files


def _slices(split: str, splits: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    sizes = {key: len(files) for key, files in splits.items()}
    parts = split_ranges(split, sizes)
    return tuple(file for name, start, stop in parts for file in splits[name][start:stop])
