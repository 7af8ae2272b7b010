"""Random changes to batches of images, in NumPy.

An augmentation is a frozen record that is called with a batch and the random generator to draw
from: nothing is random but through that argument. Pixel values are those of the image scaled to
[0, 1], 0 being background, and stay in that range.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32


@runtime_checkable
class Augmentation(Protocol):
    """Maps a batch of images to a changed batch of the same shape."""

    def __call__(
        self, images: Float32[np.ndarray, "b h w c"], generator: np.random.Generator
    ) -> Float32[np.ndarray, "b h w c"]:
        """Returns the changed batch; leaves `images` as it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves each image by whole pixels, uniform in [-pixels, pixels] on both axes.

    What comes in from outside is 0.

    Attributes:
        pixels: Largest shift.

    Raises:
        ValueError: `pixels` is negative.
    """

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels={self.pixels}: a shift is 0 pixels or more")

    def __call__(
        self, images: Float32[np.ndarray, "b h w c"], generator: np.random.Generator
    ) -> Float32[np.ndarray, "b h w c"]:
        """Returns the shifted batch."""
        reach = self.pixels
        offsets = generator.integers(-reach, reach, size=(2, len(images)), endpoint=True)
        return shift(images, offsets[0], offsets[1], reach)


@dataclasses.dataclass(frozen=True)
class Affine:
    """Turns and scales each image about its centre, with bilinear interpolation.

    What comes in from outside is 0.

    Attributes:
        degrees: The angle is uniform in [-degrees, degrees].
        scale: The magnification is uniform in [1 - scale, 1 + scale].

    Raises:
        ValueError: `degrees` is negative, or `scale` is not in [0, 1).
    """

    degrees: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ValueError(f"degrees={self.degrees}: give the largest angle, 0 or more")
        if not 0 <= self.scale < 1:
            raise ValueError(
                f"scale={self.scale}: give the largest change of size, at least 0 and below 1"
            )

    def __call__(
        self, images: Float32[np.ndarray, "b h w c"], generator: np.random.Generator
    ) -> Float32[np.ndarray, "b h w c"]:
        """Returns the turned and scaled batch."""
        angles = np.deg2rad(generator.uniform(-self.degrees, self.degrees, len(images)))
        scales = generator.uniform(1 - self.scale, 1 + self.scale, len(images))
        return turn_and_scale(images, angles, scales)


@dataclasses.dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors each image left to right with a given probability.

    Attributes:
        probability: In [0, 1].

    Raises:
        ValueError: `probability` is not in [0, 1].
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability}: give a value in [0, 1]")

    def __call__(
        self, images: Float32[np.ndarray, "b h w c"], generator: np.random.Generator
    ) -> Float32[np.ndarray, "b h w c"]:
        """Returns the batch, some of it mirrored."""
        mirrored = generator.random(len(images)) < self.probability
        result = images.copy()
        result[mirrored] = images[mirrored, :, ::-1]
        return result


def shift(
    images: Float32[np.ndarray, "b h w c"],
    down: np.ndarray,
    right: np.ndarray,
    reach: int,
) -> Float32[np.ndarray, "b h w c"]:
    """Moves image i down by `down[i]` and right by `right[i]` pixels, filling with 0.

    Args:
        images: `[b, h, w, c]`.
        down: Integers `[b]` in [-reach, reach].
        right: Integers `[b]` in [-reach, reach].
        reach: Width of the border of zeros to cut from.

    Returns:
        `[b, h, w, c]`.

    Example:
        >>> image = np.array([[1, 2], [3, 4]], np.float32).reshape(1, 2, 2, 1)
        >>> shift(image, np.array([1]), np.array([0]), 1)[0, :, :, 0]
        array([[0., 0.],
               [1., 2.]], dtype=float32)
    """
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (reach, reach), (reach, reach), (0, 0)])
    shifted = np.empty_like(images)
    # A loop of slices: five times as fast as one indexed gather of all pixels.
    for target, source, top, left in zip(shifted, padded, reach - down, reach - right, strict=True):
        target[...] = source[top : top + height, left : left + width]
    return shifted


def turn_and_scale(
    images: Float32[np.ndarray, "b h w c"], angles: np.ndarray, scales: np.ndarray
) -> Float32[np.ndarray, "b h w c"]:
    """Turns image i anticlockwise by `angles[i]` and magnifies it by `scales[i]`.

    Each output pixel looks up where it came from: with the centre as origin and y downward,

        [y']             [ cos a  sin a] [y]
        [x']  =  1/s  ·  [-sin a  cos a] [x]

    and takes the bilinear mean of the four pixels around (y', x'), 0 outside of the image.

    Args:
        images: `[b, h, w, c]`.
        angles: Radians, `[b]`.
        scales: Magnifications above 0, `[b]`.

    Returns:
        `[b, h, w, c]`.

    Example:
        >>> image = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
        >>> turn_and_scale(image, np.array([np.pi / 2]), np.array([1.0]))[0, :, :, 0].round(5)
        array([[1., 3.],
               [0., 2.]], dtype=float32)
    """
    count, height, width, channels = images.shape
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(middle_y)
    x = np.arange(width, dtype=np.float32) - np.float32(middle_x)
    cosine = (np.cos(angles) / scales).astype(np.float32)[:, None, None]
    sine = (np.sin(angles) / scales).astype(np.float32)[:, None, None]
    # One pixel outside is as far out as it gets: there the interpolation is 0.
    from_y = np.clip(cosine * y + sine * x + np.float32(middle_y), -1, height)
    from_x = np.clip(cosine * x - sine * y + np.float32(middle_x), -1, width)
    top = np.minimum(np.floor(from_y), height - 1)
    left = np.minimum(np.floor(from_x), width - 1)
    weight_y, weight_x = from_y - top, from_x - left

    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])  # the border of zeros
    stride = width + 2
    corner = (top + 1).astype(np.intp) * stride + (left + 1).astype(np.intp)
    corner += (np.arange(count) * (height + 2) * stride)[:, None, None]
    result = np.empty_like(images)
    for channel in range(channels):  # twice as fast as gathering pixels of three values
        pixels = np.ascontiguousarray(padded[..., channel]).reshape(-1)
        upper = _mean(pixels.take(corner), pixels.take(corner + 1), weight_x)
        lower = _mean(pixels.take(corner + stride), pixels.take(corner + stride + 1), weight_x)
        result[..., channel] = _mean(upper, lower, weight_y)
    return result


def _mean(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return first + (second - first) * weight
