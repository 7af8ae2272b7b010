"""Which files of an image folder belong to which class and split.

What decides about fixed splits and about order are SHA-256 digests of the files' relative paths,
so neither depends on the machine or the file system. The split of a file depends on its own path
alone: files that are added later move no other.
"""

import collections
import hashlib
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ssvq_jax.data.split_ranges import split_ranges

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Files with other endings are passed over."""

SPLIT_SHARES: Mapping[str, int] = {"validation": 10, "test": 10}
"""Percent of the files in the fixed splits, about; the rest is `train`."""

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


class Layout(NamedTuple):
    """What an image folder holds.

    Attributes:
        names: Names of the classes, sorted.
        splits: The files of each split, `"<class>/<file>"` or `"<split>/<class>/<file>"`, in a
            mixed order.
        passed_over: How many files were passed over, and why, for people; empty for none.
    """

    names: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    passed_over: str


def read_layout(root: Path) -> Layout:
    """Lists the classes and the files of each split of an image folder.

    Args:
        root: The image folder.

    Returns:
        Its layout.

    Raises:
        ValueError: There are no class sub-folders, or one holds no images in any split.
    """
    others: collections.Counter[str] = collections.Counter()
    classes_of = _read(root, others)
    names = tuple(sorted({name for classes in classes_of.values() for name in classes}, key=_nfc))
    _check_classes(root, names, classes_of)
    splits = {key: _mixed(classes) for key, classes in _with_fixed_splits(classes_of).items()}
    where = "are {} files directly in the folder of their class"
    return Layout(names, splits, describe_passed_over(root, others, where))


def describe_passed_over(root: Path, others: Mapping[str, int], images: str) -> str:
    """Counts the files that are passed over, in a sentence.

    Args:
        root: The folder.
        others: Number of files by kind.
        images: What images do instead; their endings take the place of ``{}``.

    Returns:
        The sentence; empty if there are no such files.
    """
    if not others:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    rule = images.format(", ".join(SUFFIXES))
    return f"{sum(others.values())} files in {root} are passed over ({kinds}): images {rule}"


def _read(root: Path, others: collections.Counter[str]) -> dict[str, dict[str, list[str]]]:
    """Lists the files of each class of each split; of the split "" if the folder has no splits."""
    tops = _sub_folders(root)
    _count_loose(root, others)
    if any(top.lower() in _SPLIT_FOLDERS and _sub_folders(root / top) for top in tops):
        inner = {top: _sub_folders(root / top) for top in tops}
        called = [_SPLIT_FOLDERS.get(top.lower(), top) for top in tops]
        for top in tops:
            _count_loose(root / top, others)
        return {
            # Two folders that would be called the same keep their names.
            split if called.count(split) == 1 else top: {
                name: _images(root, f"{top}/{name}", others) for name in inner[top]
            }
            for split, top in zip(called, tops, strict=True)
            if inner[top]
        }
    return {"": {name: _images(root, name, others) for name in tops}}


def _count_loose(folder: Path, others: collections.Counter[str]) -> None:
    """Counts images that lie beside the folders of classes."""
    if loose := sum(is_image(path) and path.is_file() for path in folder.iterdir()):
        others["outside of a class folder"] += loose


def _sub_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(root: Path, folder: str, others: collections.Counter[str]) -> list[str]:
    found = []
    with os.scandir(root / folder) as entries:
        # Hidden ones too are left out: macOS puts a "._cat.jpg" beside "cat.jpg".
        for entry in (entry for entry in entries if not entry.name.startswith(".")):
            if entry.is_dir():
                deeper = sum(map(is_image, Path(entry.path).rglob("*")))
                others.update({"in folders inside a class": deeper} if deeper else {})
            elif entry.name.lower().endswith(SUFFIXES):
                found.append(f"{folder}/{entry.name}")
            else:
                others[kind_of(entry.name)] += 1
    return found


def is_image(path: Path) -> bool:
    """Whether a path has the ending of an image, and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def kind_of(name: str) -> str:
    """The kind of a file, for messages: how its name ends."""
    return Path(name).suffix.lower() or "without ending"


def _check_classes(
    root: Path, names: tuple[str, ...], classes_of: Mapping[str, Mapping[str, list[str]]]
) -> None:
    if not names:
        raise ValueError(
            f"{root} has no sub-folders: put the images of each class into a sub-folder named "
            "after the class"
        )
    for name in names:
        if os.fsencode(name).decode(errors="replace") != name:
            raise ValueError(
                f"the sub-folder {name!r} of {root} would be a class, but its name is not text in "
                "UTF-8: rename it"
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
    divided: dict[str, dict[str, list[str]]] = {key: {} for key in ("train", *SPLIT_SHARES)}
    for name, files in classes_of[""].items():
        for file in files:
            divided[_split_of(file)].setdefault(name, []).append(file)
    return {key: classes for key, classes in divided.items() if classes}


def _split_of(file: str) -> str:
    """The fixed split of a file, from its path alone."""
    percent = int.from_bytes(_digest("split", file)[:8]) * 100 >> 64  # 0 to 99
    for split, share in SPLIT_SHARES.items():
        if percent < share:
            return split
        percent -= share
    return "train"


def _mixed(classes: dict[str, list[str]]) -> tuple[str, ...]:
    files = [file for of_class in classes.values() for file in of_class]
    return tuple(sorted(files, key=lambda file: _digest("order", file)))


def _digest(purpose: str, file: str) -> bytes:
    text = _nfc(f"{purpose}/{file}")
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()  # names may be any bytes


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
