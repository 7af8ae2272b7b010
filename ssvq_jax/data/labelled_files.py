"""Image files and their class indices, as a folder or a table has them."""

import collections
import csv
import warnings
from pathlib import Path

from ssvq_jax.data.folder_layout import SUFFIXES, describe_passed_over, is_image, kind_of


def find_images(folder: Path) -> list[str]:
    """Lists the image files of a folder and its sub-folders, sorted.

    Args:
        folder: The folder.

    Returns:
        Paths relative to it, with slashes.

    Raises:
        ValueError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give one with images")
    files = [x for x in folder.rglob("*") if x.is_file() and not x.name.startswith(".")]
    found = [x for x in files if is_image(x)]
    if not found:
        raise ValueError(f"no images in {folder}: its files end in none of {', '.join(SUFFIXES)}")
    others = collections.Counter(kind_of(x.name) for x in files if not is_image(x))
    if passed_over := describe_passed_over(folder, others, "end in {}"):
        warnings.warn(passed_over, stacklevel=2)
    return sorted(x.relative_to(folder).as_posix() for x in found)


def folder_labels(files: list[str], classes: int) -> dict[str, int] | None:
    """Takes classes from the folders that images are in.

    Folders stand for the classes in sorted order if there are as many, or are numbers: the class
    indices themselves.

    Args:
        files: Paths with slashes.
        classes: How many classes the model knows.

    Returns:
        The class of each file; None if files are not in folders.

    Raises:
        ValueError: Folders are neither as many as the classes, nor numbers below them.
    """
    if any("/" not in file for file in files):
        return None
    names = sorted({file.split("/")[0] for file in files})
    if all(name.isdecimal() and int(name) < classes for name in names):
        index = {name: int(name) for name in names}
    elif len(names) == classes:
        index = {name: i for i, name in enumerate(names)}
    else:
        raise ValueError(
            f"{len(names)} folders of images ({', '.join(names[:3])}, ...), but the model has "
            f"{classes} classes: name folders by class index (0 to {classes - 1}), or give "
            "--labels with a table"
        )
    return {file: index[file.split("/")[0]] for file in files}


def read_labels(table: Path, files: list[str], classes: int) -> dict[str, int]:
    """Reads classes from a table ``file,label``, with or without these headings.

    Args:
        table: The file.
        files: What is to be labelled; all must be in the table.
        classes: How many classes the model knows.

    Returns:
        The class of each file.

    Raises:
        ValueError: The table cannot be read, a file has no label, or a label is no class index.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as opened:
            rows = [row for row in csv.reader(opened) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels {table} cannot be read ({error})") from error
    if rows and [cell.strip().lower() for cell in rows[0]] == ["file", "label"]:
        rows = rows[1:]
    labels = {}
    for number, row in enumerate(rows, 1):
        text = row[1].strip() if len(row) == 2 else ""
        if not text.isdecimal() or int(text) >= classes:
            raise ValueError(
                f"labels {table}, row {number}: {','.join(row)!r}; give file,label with a class "
                f"index of 0 to {classes - 1}"
            )
        labels[row[0].strip()] = int(text)
    missing = [file for file in files if file not in labels]
    if missing:
        raise ValueError(
            f"labels {table} has none for {len(missing)} of {len(files)} images, e.g. "
            f"'{missing[0]}': give paths relative to the folder of images"
        )
    return {file: labels[file] for file in files}
