"""Normalisation of pixel values."""

import dataclasses

import numpy as np
from jaxtyping import Float32


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Subtracts a mean and divides by a standard deviation, per channel, pixels being in [0, 1].

    Attributes:
        mean: One value a channel.
        std: One value a channel, above 0.

    Raises:
        ValueError: The two differ in length, or a `std` is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(
                f"mean={self.mean}, std={self.std}: give one mean and one positive std a channel"
            )

    def __call__(self, images: Float32[np.ndarray, "b h w c"]) -> Float32[np.ndarray, "b h w c"]:
        """Returns the normalised images."""
        return (images - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


MNIST_NORMALIZATION = Normalization(mean=(0.1307,), std=(0.3081,))
"""Mean and standard deviation of the pixels of MNIST's 60,000 training images."""
