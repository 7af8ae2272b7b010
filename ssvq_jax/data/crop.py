"""Square crops of single images, made before batching, so that images may differ in size.

A crop is a frozen record that is called with a uint8 image and the random generator to draw from.
Pillow resizes, antialiased where an image shrinks.
"""

import dataclasses
import math
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import UInt8

Interpolation = Literal["bicubic", "bilinear"]

_TRIES = 10


@runtime_checkable
class Crop(Protocol):
    """Maps an image of any size to one of a fixed size, with the same number of channels."""

    def __call__(
        self, image: UInt8[np.ndarray, "h w c"], generator: np.random.Generator | None
    ) -> UInt8[np.ndarray, "s s c"]:
        """Returns the cropped image; leaves `image` as it is. Evaluation has no generator."""
        ...


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Resizes the short side to `size / share` and cuts the middle square: no randomness.

    Rounds as timm and torchvision do, so that pixels are theirs exactly: the resized sides down,
    the margins to the nearest, and to even where two are.

    Attributes:
        size: Height and width of the result.
        share: Part of the short side that is kept, in (0, 1]. 0.875 is the usual test crop of
            ImageNet models: 224 of 256 pixels.
        interpolation: How pixels are resized; models want the one that they were trained with.

    Raises:
        ValueError: `size`, `share` or `interpolation` is out of range.

    Example:
        >>> CenterCrop(224)(np.zeros((375, 500, 3), np.uint8)).shape
        (224, 224, 3)
    """

    size: int
    share: float = 0.875
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_interpolation(self.interpolation)
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: give the part to keep, above 0 and at most 1")

    def __call__(
        self, image: UInt8[np.ndarray, "h w c"], generator: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "s s c"]:
        """Returns the middle of the resized image, uint8 `[size, size, c]`."""
        del generator
        height, width, _ = image.shape
        # Never less than the size: no image is too small, none needs a border.
        short = math.floor(self.size / self.share)
        long = int(short * max(height, width) / min(height, width))
        new_height, new_width = (short, long) if height <= width else (long, short)
        box = (0, 0, width, height)
        resized = _resize(image, new_height, new_width, box, self.interpolation)
        top, left = round((new_height - self.size) / 2), round((new_width - self.size) / 2)
        return resized[top : top + self.size, left : left + self.size]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts a random rectangle and resizes it to a square: Inception's augmentation.

    The rectangle's share of the area is uniform in `scale`, its aspect ratio (width by height)
    log-uniform in `ratio`, its place uniform. After ten draws that do not fit into the image, it
    is the largest centred one with a ratio in `ratio`. Source: Szegedy et al., Going Deeper with
    Convolutions, section 6, https://arxiv.org/abs/1409.4842.

    Attributes:
        size: Height and width of the result.
        scale: Least and largest share of the area, in (0, 1].
        ratio: Least and largest aspect ratio, above 0.
        interpolation: How pixels are resized.

    Raises:
        ValueError: `size`, `scale`, `ratio` or `interpolation` is out of range.

    Example:
        >>> crop = RandomResizedCrop(224)
        >>> crop(np.zeros((375, 500, 3), np.uint8), np.random.default_rng(0)).shape
        (224, 224, 3)
    """

    size: int
    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_interpolation(self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale={self.scale}: give the least and largest share of the area, above 0 and "
                "at most 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(
                f"ratio={self.ratio}: give the least and largest width by height, above 0"
            )

    def __call__(
        self, image: UInt8[np.ndarray, "h w c"], generator: np.random.Generator | None
    ) -> UInt8[np.ndarray, "s s c"]:
        """Returns the resized rectangle, uint8 `[size, size, c]`.

        Raises:
            ValueError: There is no generator to draw from, as in evaluation.
        """
        if generator is None:
            raise ValueError(f"{self} draws at random, evaluation does not: give a CenterCrop")
        box = self.draw(image.shape[0], image.shape[1], generator)
        return _resize(image, self.size, self.size, box, self.interpolation)

    def draw(
        self, height: int, width: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draws a rectangle of an image.

        Args:
            height: Height of the image.
            width: Width of the image.
            generator: Where the randomness comes from.

        Returns:
            Left, top, right and bottom, in pixels; right and bottom are outside.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = height * width * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(low, high))
            box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                left = int(generator.integers(0, width - box_width, endpoint=True))
                top = int(generator.integers(0, height - box_height, endpoint=True))
                return left, top, left + box_width, top + box_height
        box_width = min(width, max(1, round(height * self.ratio[1])))
        box_height = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return left, top, left + box_width, top + box_height


def _resize(
    image: UInt8[np.ndarray, "h w c"],
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    interpolation: Interpolation,
) -> UInt8[np.ndarray, "{height} {width} c"]:
    """Resizes the part of the image in `box` (left, top, right, bottom)."""
    from PIL import Image

    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    method = Image.Resampling[interpolation.upper()]
    resized = picture.resize((width, height), method, box=box)
    return np.array(resized).reshape(height, width, channels)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size={size}: give the side of the crop in pixels, 1 or more")


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in get_args(Interpolation):
        raise ValueError(
            f"interpolation={interpolation!r}: choose one of {', '.join(get_args(Interpolation))}"
        )
