"""Folders of images with one sub-folder for each class.

    <folder>/<split>/<class>/*.jpg      splits as the folder has them, or
    <folder>/<class>/*.jpg              fixed splits: about 80 % train, 10 % validation, 10 % test

Classes are the names of the sub-folders, sorted, over all splits together.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from ssvq_jax.data.fingerprint import fingerprint_files
from ssvq_jax.data.folder_layout import Layout, choose_files, read_layout
from ssvq_jax.data.splits import PILLOW_MODES, Example

MEASURED_FILES = 100_000
"""Up to so many files are asked for their size, to know whether all are of one. It ends at the
first that differs, so only large folders of equal images take long."""


_ORIENTATION = 0x0112  # Exif tag
_ON_THEIR_SIDE = range(5, 9)  # its values for pictures that are to be turned by a right angle


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSplit:
    """A split of an image folder; a file is decoded each time it is asked for.

    Attributes:
        folder: The image folder.
        files: Paths relative to `folder`.
        labels: int32 `[n]`, positions in `class_names`.
        class_names: Names of the classes.
        image_shape: `(h, w, c)`; h and w are None where images differ in size. c is what files
            are converted to: 1, 3 or 4.
    """

    folder: Path
    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """Reads and decodes a file.

        Raises:
            ValueError: The file is not a readable image.
        """
        image = read_image(self.folder / self.files[index], self.image_shape[-1])
        return {"image": image, "label": int(self.labels[index])}

    def take(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """Returns the images and labels at `indices`, stacked.

        Raises:
            ValueError: A file is not a readable image, or the images differ in size.
        """
        images = np.stack([self[int(index)]["image"] for index in indices])
        return images, self.labels[indices]


def open_folder(folder: str | os.PathLike[str], split: str, channels: int = 3) -> FolderSplit:
    """Opens a split of an image folder.

    A folder has splits of its own if a sub-folder called `train`, `val`, `validation`, `test` or
    the like has sub-folders; then every sub-folder with sub-folders is a split, and `val`, `valid`
    and `dev` are called `validation`. In other folders the path of an image decides about its
    split, so that images which are added later move no other; a class of a few images may be
    missing in a split. Files that are passed over are counted in a warning.

    Args:
        folder: The image folder; a leading `~` is expanded.
        split: Name of a split, or as TFDS spells a part or a sum: `"train[:90%]"`,
            `"train+validation"`. Files are in a mixed order, so a part has images of all classes.
        channels: 3 for RGB, 1 for grey, 4 for RGBA: what files are converted to.

    Returns:
        The split.

    Raises:
        ValueError: There is no such folder or split, or no images in class sub-folders; a file is
            not an image; `channels` is another number.

    Example:
        >>> flowers = open_folder("~/flowers", "train")  # doctest: +SKIP
        >>> len(flowers), flowers.class_names  # doctest: +SKIP
        (2936, ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips'))
    """
    if channels not in PILLOW_MODES:
        raise ValueError(f"channels={channels}: give one of {sorted(PILLOW_MODES)}")
    root = _existing(folder)
    names, splits, _ = _layout(root)
    files = choose_files(root, split, splits)
    label = {name: position for position, name in enumerate(names)}
    labels = np.array([label[file.split("/")[-2]] for file in files], np.int32)
    return FolderSplit(root, files, labels, names, (*_common_size(root, files), channels))


def folder_splits(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Lists the splits of an image folder, without reading images.

    Args:
        folder: As for `open_folder`.

    Returns:
        Name of each split, and its number of images.

    Raises:
        ValueError: There is no such folder, or no images in class sub-folders.
    """
    splits = _layout(_existing(folder)).splits
    return {key: len(files) for key, files in splits.items()}


def folder_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Computes a fingerprint of an image folder: classes, splits, files and their contents.

    Args:
        folder: As for `open_folder`.

    Returns:
        16 hexadecimal digits; see `ssvq_jax.data.fingerprint.fingerprint_files`.

    Raises:
        ValueError: There is no such folder, or no images in class sub-folders.
    """
    root = _existing(folder)
    names, splits, _ = _layout(root)
    files = [
        (f"{split}: {file}", root / file) for split in sorted(splits) for file in splits[split]
    ]
    return fingerprint_files(names, files)


def _layout(root: Path) -> Layout:
    """Reads the layout of a folder, and warns of files that it passes over."""
    layout = read_layout(root)
    if layout.passed_over:
        warnings.warn(layout.passed_over, stacklevel=1)  # from here: Python shows it once
    return layout


def _existing(folder: str | os.PathLike[str]) -> Path:
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"no image folder {root}: there is no folder {root.resolve()}")
    return root


def _common_size(root: Path, files: tuple[str, ...]) -> tuple[int | None, int | None]:
    """Returns height and width if all files have the same, as their headers say."""
    from PIL import Image

    size = None
    for file in files if len(files) <= MEASURED_FILES else ():
        with _reading(root / file), Image.open(root / file) as picture:
            turned = picture.getexif().get(_ORIENTATION, 1) in _ON_THEIR_SIDE
            found = picture.size[::-1] if turned else picture.size
        if size not in (None, found):
            return None, None
        size = found
    return (None, None) if size is None else (size[1], size[0])


def read_image(path: Path, channels: int = 3) -> UInt8[np.ndarray, "h w {channels}"]:
    """Decodes an image file, upright.

    Args:
        path: The file.
        channels: 3 for RGB, 1 for grey, 4 for RGBA: what it is converted to.

    Returns:
        Its pixels.

    Raises:
        ValueError: The file is not a readable image.
    """
    from PIL import Image, ImageOps

    with _reading(path), Image.open(path) as stored:
        picture = ImageOps.exif_transpose(stored)  # upright, as cameras mean it
        if "transparency" in picture.info and picture.mode == "P":
            picture = picture.convert("RGBA")
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are {picture.mode}, only 8 bits a channel can be read")
        pixels = np.array(picture.convert(PILLOW_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the file in what Pillow raises."""
    from PIL import Image

    try:
        yield
    except (
        OSError,  # no image, or cut short
        SyntaxError,  # a broken PNG
        ValueError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a readable image ({reason}): replace or delete the file"
        ) from error
