"""RandAugment: a few operations drawn for each image, all of one magnitude, by Pillow."""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8

Operation = Literal[
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "posterize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
]

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
"""What `RandAugment` draws from: the paper's fourteen."""

LARGEST_MAGNITUDE = 10
"""The magnitude at which an operation has its full strength."""


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draws some of `OPERATIONS` for each image and applies them one after the other.

    Operations are drawn uniformly, with repetition; those with a direction go either way. Each is
    stronger the larger the magnitude, and does nothing at 0, except autocontrast and equalize,
    which have no strength: `distort` has the table. Source: Cubuk et al., RandAugment, section 3,
    https://arxiv.org/abs/1909.13719, with magnitudes from 0 to 10 and strengths as in timm's
    increasing set, but posterize, which leaves eight to four bits as in AutoAugment.

    Pixels are rounded to 8 bits on the way in, exact for images as they are read. So it belongs
    before the augmentations that interpolate. What comes in from outside is 0, the background, as
    everywhere in this package, not grey as in timm.

    Images have three channels or one. Those of one channel have no colour, so that the operation
    `color` leaves them as they are.

    Attributes:
        operations: How many are drawn, 1 or more.
        magnitude: In [0, 10].
        deviation: Standard deviation of the normal distribution around `magnitude` from which each
            operation's own is drawn, then clipped to [0, 10].
        probability: How probably a drawn operation is applied, in [0, 1].

    Raises:
        ValueError: An attribute is out of range; on call, images have other channels.

    Example:
        >>> images = np.ones((4, 32, 32, 3), np.float32)
        >>> RandAugment()(images, np.random.default_rng(0)).shape
        (4, 32, 32, 3)
    """

    operations: int = 2
    magnitude: int | float = 9
    deviation: int | float = 0
    probability: int | float = 1

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ValueError(f"operations={self.operations}: give how many to draw, 1 or more")
        if not 0 <= self.magnitude <= LARGEST_MAGNITUDE:
            raise ValueError(
                f"magnitude={self.magnitude}: give 0 (no change) to {LARGEST_MAGNITUDE} (strongest)"
            )
        if not 0 <= self.deviation < math.inf:
            raise ValueError(f"deviation={self.deviation}: give a standard deviation, 0 or more")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability}: give a value in [0, 1]")

    def __call__(
        self, images: Float32[np.ndarray, "b h w c"], generator: np.random.Generator
    ) -> Float32[np.ndarray, "b h w c"]:
        """Returns the changed batch, of whole 255ths."""
        channels = images.shape[-1]
        if channels not in (1, 3):
            raise ValueError(
                f"the images have {channels} channels: RandAugment is for 3 (RGB) or 1 (grey); "
                "convert the images, or use other augmentations"
            )
        drawn = (len(images), self.operations)
        chosen = generator.integers(len(OPERATIONS), size=drawn)
        magnitudes = generator.normal(self.magnitude, self.deviation, drawn)
        strengths = np.clip(magnitudes, 0, LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
        strengths *= generator.choice([-1.0, 1.0], drawn)
        chosen[generator.random(drawn) >= self.probability] = OPERATIONS.index("identity")
        pixels = np.rint(images * np.float32(255)).astype(np.uint8)
        for image, which, strong in zip(pixels, chosen, strengths, strict=True):
            for operation, strength in zip(which, strong, strict=True):
                image[...] = distort(image, OPERATIONS[operation], float(strength))
        return pixels.astype(np.float32) / np.float32(255)


def distort(
    image: UInt8[np.ndarray, "h w c"], operation: Operation, strength: float
) -> UInt8[np.ndarray, "h w c"]:
    """Applies one operation, with s for `strength`.

        identity        nothing
        autocontrast    stretches each channel to [0, 255]
        equalize        makes each channel's histogram flat
        rotate          turns anticlockwise by 30 s degrees about the centre
        solarize        inverts values from 256 (1 - |s|) on
        posterize       keeps the 8 - 4 |s| highest bits
        color           grey + (1 + 0.9 s) (image - grey)
        contrast        mean + (1 + 0.9 s) (image - mean), mean of the grey image
        brightness      (1 + 0.9 s) image
        sharpness       smooth + (1 + 0.9 s) (image - smooth)
        shear-x         looks up (x + 0.3 s y, y), origin at the upper left
        shear-y         looks up (x, y + 0.3 s x)
        translate-x     looks up (x + 0.45 s width, y)
        translate-y     looks up (x, y + 0.45 s height)

    Numbers of bits and thresholds are rounded. Look-ups interpolate bilinearly, 0 outside.

    Args:
        image: One or three channels.
        operation: One of `OPERATIONS`.
        strength: In [-1, 1].

    Returns:
        The changed image, of the same shape.

    Example:
        >>> image = np.array([100, 200], np.uint8).reshape(1, 2, 1)
        >>> distort(image, "solarize", 0.5).ravel()
        array([100,  55], dtype=uint8)
    """
    from PIL import Image, ImageEnhance, ImageOps

    height, width, channels = image.shape
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    factor = 1 + 0.9 * strength

    def look_up(*matrix: int | float) -> Image.Image:
        method, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return picture.transform((width, height), method, matrix, bilinear)

    match operation:
        case "identity":
            changed = picture
        case "autocontrast":
            changed = ImageOps.autocontrast(picture)
        case "equalize":
            changed = ImageOps.equalize(picture)
        case "rotate":
            changed = picture.rotate(30 * strength, Image.Resampling.BILINEAR)
        case "solarize":
            changed = ImageOps.solarize(picture, round(256 * (1 - abs(strength))))
        case "posterize":
            changed = ImageOps.posterize(picture, round(8 - 4 * abs(strength)))
        case "color":
            changed = ImageEnhance.Color(picture).enhance(factor)
        case "contrast":
            changed = ImageEnhance.Contrast(picture).enhance(factor)
        case "brightness":
            changed = ImageEnhance.Brightness(picture).enhance(factor)
        case "sharpness":
            changed = ImageEnhance.Sharpness(picture).enhance(factor)
        case "shear-x":
            changed = look_up(1, 0.3 * strength, 0, 0, 1, 0)
        case "shear-y":
            changed = look_up(1, 0, 0, 0.3 * strength, 1, 0)
        case "translate-x":
            changed = look_up(1, 0, 0.45 * strength * width, 0, 1, 0)
        case "translate-y":
            changed = look_up(1, 0, 0, 0, 1, 0.45 * strength * height)
    return np.array(changed).reshape(height, width, channels)
