"""Mixing images and labels within a batch, in NumPy.

A mixing is a frozen record that is called with a batch, its labels and the random generator to draw
from: nothing is random but through that argument. Pixel values stay in [0, 1].

An image's partner is its counterpart in a random permutation of the batch, as in the code of both
papers, so each image is a partner once; it may be its own, as that in a batch of one always is.
(timm takes the batch in reverse, which wants an even number.) Shares, boxes and the choice of the
method are drawn for each image. The reference code draws one for the batch; the papers' formulas
are about single pairs, and a step over many different shares has the less noisy gradient.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

Images = Float32[np.ndarray, "b h w c"]
Labels = Int32[np.ndarray, " b"]
Shares = Float32[np.ndarray, " b"]


class Mixed(NamedTuple):
    """A mixed batch; the loss is `share * loss(label) + (1 - share) * loss(other_label)`.

    Attributes:
        images: float32 `[b, h, w, c]`.
        other_labels: The labels of the partners, int32 `[b]`.
        shares: How much of each image is the image's own, in [0, 1], float32 `[b]`.
    """

    images: Images
    other_labels: Labels
    shares: Shares


@runtime_checkable
class Mixing(Protocol):
    """Maps a batch of images and labels to a batch of mixtures of two images each."""

    def __call__(self, images: Images, labels: Labels, generator: np.random.Generator) -> Mixed:
        """Returns the mixed batch; leaves `images` as it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Weighted means of images: share · image + (1 - share) · partner, share ~ Beta(alpha, alpha).

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, equation in section 2,
    https://arxiv.org/abs/1710.09412.

    Attributes:
        alpha: Above 0. The larger, the closer shares are to 1/2; at 1 they are uniform.

    Raises:
        ValueError: `alpha` is out of range.

    Example:
        >>> images = np.stack([np.zeros((2, 2, 1), np.float32), np.ones((2, 2, 1), np.float32)])
        >>> mixed = Mixup()(images, np.array([5, 7], np.int32), np.random.default_rng(0))
        >>> bool(np.isin(mixed.other_labels, [5, 7]).all())
        True
    """

    alpha: int | float = 0.8

    def __post_init__(self) -> None:
        _check_alpha("alpha", self.alpha)

    def __call__(self, images: Images, labels: Labels, generator: np.random.Generator) -> Mixed:
        """Returns the mixed batch."""
        partners = generator.permutation(len(images))
        shares = generator.beta(self.alpha, self.alpha, len(images)).astype(np.float32)
        return Mixed(blend(images, images[partners], shares), labels[partners], shares)


@dataclasses.dataclass(frozen=True)
class CutMix:
    """Pastes a box of the partner, 1 - Beta(alpha, alpha) of the area, at the same place.

    The box has the image's proportions and a uniform centre. What of it is outside of the image is
    lost; the share that is returned counts the pixels that were pasted. Source: Yun et al., CutMix,
    equations 1 and 2, https://arxiv.org/abs/1905.04899.

    Attributes:
        alpha: Above 0; at 1 the area, before the box is clipped, is uniform.

    Raises:
        ValueError: `alpha` is out of range.

    Example:
        >>> images = np.stack([np.zeros((8, 8, 1), np.float32), np.ones((8, 8, 1), np.float32)])
        >>> mixed = CutMix()(images, np.array([5, 7], np.int32), np.random.default_rng(0))
        >>> bool(np.isin(mixed.images, [0, 1]).all())
        True
    """

    alpha: int | float = 1.0

    def __post_init__(self) -> None:
        _check_alpha("alpha", self.alpha)

    def __call__(self, images: Images, labels: Labels, generator: np.random.Generator) -> Mixed:
        """Returns the mixed batch."""
        count, height, width, _ = images.shape
        partners = generator.permutation(count)
        shares = generator.beta(self.alpha, self.alpha, count)
        boxes = draw_boxes(shares, height, width, generator)
        mixed, shares = paste(images, images[partners], boxes)
        return Mixed(mixed, labels[partners], shares)


@dataclasses.dataclass(frozen=True)
class MixupOrCutMix:
    """Draws for each image whether it is mixed, and whether by `CutMix` or by `Mixup`.

    Attributes:
        mixup: `Mixup`'s alpha.
        cutmix: `CutMix`'s alpha.
        probability: How probably an image is mixed, in [0, 1]; the others have share 1.
        switch: How probably a mixed image is one of `CutMix`, in [0, 1].

    Raises:
        ValueError: An attribute is out of range.

    Example:
        >>> images, labels = np.ones((3, 8, 8, 1), np.float32), np.arange(3, dtype=np.int32)
        >>> MixupOrCutMix(probability=0.0)(images, labels, np.random.default_rng(0)).shares
        array([1., 1., 1.], dtype=float32)
    """

    mixup: int | float = 0.8
    cutmix: int | float = 1.0
    probability: int | float = 1.0
    switch: int | float = 0.5

    def __post_init__(self) -> None:
        _check_alpha("mixup", self.mixup)
        _check_alpha("cutmix", self.cutmix)
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a value in [0, 1]")

    def __call__(self, images: Images, labels: Labels, generator: np.random.Generator) -> Mixed:
        """Returns the mixed batch."""
        count, height, width, _ = images.shape
        partners = generator.permutation(count)
        mixed = generator.random(count) < self.probability
        cut = generator.random(count) < self.switch
        # A share of 1 changes nothing, so every image goes through both, one of them idle.
        blended = np.where(mixed & ~cut, generator.beta(self.mixup, self.mixup, count), 1)
        pasted = np.where(mixed & cut, generator.beta(self.cutmix, self.cutmix, count), 1)
        boxes = draw_boxes(pasted, height, width, generator)
        others, shares = images[partners], blended.astype(np.float32)
        result, kept = paste(blend(images, others, shares), others, boxes)
        return Mixed(result, labels[partners], shares * kept)


def blend(images: Images, others: Images, shares: Shares) -> Images:
    """Returns shares · images + (1 - shares) · others.

    Example:
        >>> pair = np.array([0.0, 1.0], np.float32).reshape(2, 1, 1, 1)
        >>> blend(pair, pair[::-1], np.array([0.25, 0.75], np.float32)).ravel()
        array([0.75, 0.75], dtype=float32)
    """
    weights = shares[:, None, None, None]
    return weights * images + (1 - weights) * others


def draw_boxes(
    shares: Float[np.ndarray, " b"], height: int, width: int, generator: np.random.Generator
) -> Int64[np.ndarray, "b 4"]:
    """Draws boxes of about 1 - shares of an image, less what is outside of it.

    Args:
        shares: In [0, 1]. A box has sqrt(1 - share) of the image's height and of its width.
        height: Height of the images.
        width: Width of the images.
        generator: Where the centres come from.

    Returns:
        Top, bottom, left and right, in pixels; bottom and right are outside.
    """
    bounds = []
    for side in (height, width):
        length = np.rint(side * np.sqrt(1 - shares)).astype(np.int64)
        start = generator.integers(0, side, size=len(shares)) - length // 2
        bounds += [np.clip(start, 0, side), np.clip(start + length, 0, side)]
    return np.stack(bounds, axis=1)


def paste(images: Images, others: Images, boxes: Int64[np.ndarray, "b 4"]) -> tuple[Images, Shares]:
    """Pastes a box of each other image at the same place.

    Args:
        images: `[b, h, w, c]`.
        others: `[b, h, w, c]`.
        boxes: Top, bottom, left and right, as `draw_boxes` returns them.

    Returns:
        The images, and the exact shares of their area that are their own.

    Example:
        >>> zeros, ones = np.zeros((1, 2, 2, 1), np.float32), np.ones((1, 2, 2, 1), np.float32)
        >>> pasted, shares = paste(zeros, ones, np.array([[0, 1, 1, 2]]))
        >>> pasted[0, :, :, 0]
        array([[0., 1.],
               [0., 0.]], dtype=float32)
        >>> shares
        array([0.75], dtype=float32)
    """
    result = images.copy()
    for target, other, (top, bottom, left, right) in zip(result, others, boxes, strict=True):
        target[top:bottom, left:right] = other[top:bottom, left:right]
    total = images.shape[1] * images.shape[2]
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    return result, ((total - areas) / total).astype(np.float32)


def _check_alpha(name: str, alpha: int | float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"{name}={alpha}: give the parameter of Beta(alpha, alpha), above 0")
