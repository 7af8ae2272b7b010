"""Augmentations and normalizations by name."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ssvq_jax.data.augment import Affine, Augmentation, HorizontalFlip, Shift
from ssvq_jax.data.mixing import Mixing, MixupOrCutMix
from ssvq_jax.data.normalization import MNIST_NORMALIZATION, Normalization
from ssvq_jax.data.rand_augment import RandAugment


@dataclasses.dataclass(frozen=True)
class AugmentationPreset:
    """What training does to images at random.

    Attributes:
        augment: Changes of whole batches, in order.
        crop_scale: The `scale` of the `RandomResizedCrop` that first cuts each image; None for no
            random crop.
        mix: Mixes images and labels after `augment`; None for no mixing.
    """

    augment: tuple[Augmentation, ...] = ()
    crop_scale: tuple[float, float] | None = None
    mix: Mixing | None = None


_DEIT = RandAugment(operations=2, magnitude=9, deviation=0.5, probability=0.5)

AUGMENTATION_PRESETS: Mapping[str, AugmentationPreset] = MappingProxyType(
    {
        "none": AugmentationPreset(),
        "digits": AugmentationPreset((Affine(degrees=12.0, scale=0.12), Shift(2))),
        "cifar": AugmentationPreset((Shift(4), HorizontalFlip())),
        "imagenet": AugmentationPreset((HorizontalFlip(),), crop_scale=(0.25, 1.0)),
        "deit": AugmentationPreset(
            (_DEIT, HorizontalFlip()), crop_scale=(0.08, 1.0), mix=MixupOrCutMix()
        ),
        "cifar-rand": AugmentationPreset((_DEIT, Shift(4), HorizontalFlip())),
        "cifar-deit": AugmentationPreset((_DEIT, Shift(4), HorizontalFlip()), mix=MixupOrCutMix()),
    }
)
"""`digits` turns, scales and shifts but never mirrors; `cifar` is for images of about 32 pixels,
and `cifar-rand` puts RandAugment before it; `imagenet` is for photographs. `deit`, for photographs,
and `cifar-deit`, for images of about 32 pixels, are for long training from scratch, with
RandAugment, and Mixup or CutMix, as for DeiT (https://arxiv.org/abs/2012.12877, table 9). Its
random erasing, repeated augmentation and label smoothing are not part of them."""

CIFAR10_NORMALIZATION = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
"""Mean and standard deviation of the pixels of CIFAR-10's 50,000 training images."""

IMAGENET_NORMALIZATION = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels, as most published models use them."""

NORMALIZATION_PRESETS = ("auto", "mnist", "cifar10", "imagenet", "half", "lite", "unit")
"""Names that `normalization_preset` takes."""


def augmentation_preset(name: str) -> AugmentationPreset:
    """Looks up an augmentation preset.

    Args:
        name: A key of `AUGMENTATION_PRESETS`.

    Returns:
        The preset.

    Raises:
        ValueError: There is no such preset.

    Example:
        >>> augmentation_preset("cifar").augment
        (Shift(pixels=4), HorizontalFlip(probability=0.5))
    """
    if name not in AUGMENTATION_PRESETS:
        raise ValueError(f"augment={name!r}: choose one of {', '.join(AUGMENTATION_PRESETS)}")
    return AUGMENTATION_PRESETS[name]


def normalization_preset(name: str, channels: int) -> Normalization:
    """Looks up a normalization preset.

    Args:
        name: `"mnist"` for one channel; `"cifar10"` or `"imagenet"` for three; `"half"`, pixels in
            [-1, 1], `"lite"`, (p - 127) / 128 of pixels p in 0 to 255, as EfficientNet-Lite has it,
            or `"unit"`, pixels in [0, 1], for any number; `"auto"` is `"mnist"` for one
            channel and `"imagenet"` for three.
        channels: Channels of the images.

    Returns:
        The normalization, with one mean and standard deviation for each channel.

    Raises:
        ValueError: There is no such preset, or it is for another number of channels.

    Example:
        >>> normalization_preset("half", 3)
        Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    """
    if name not in NORMALIZATION_PRESETS:
        choices = ", ".join(NORMALIZATION_PRESETS)
        raise ValueError(f"normalization={name!r}: choose one of {choices}")
    fitting = {
        "half": Normalization((0.5,) * channels, (0.5,) * channels),
        "lite": Normalization((127 / 255,) * channels, (128 / 255,) * channels),
        "unit": Normalization((0.0,) * channels, (1.0,) * channels),
    }
    if channels == 1:
        fitting |= {"auto": MNIST_NORMALIZATION, "mnist": MNIST_NORMALIZATION}
    if channels == 3:
        fitting |= {
            "auto": IMAGENET_NORMALIZATION,
            "cifar10": CIFAR10_NORMALIZATION,
            "imagenet": IMAGENET_NORMALIZATION,
        }
    if name not in fitting:
        raise ValueError(
            f"normalization={name!r} is not for images of {channels} channels: choose one of "
            f"{', '.join(sorted(fitting))}"
        )
    return fitting[name]
