"""Convolutions as matrix products: counted by hand and by brute force."""

import math

import flax.linen as nn
import jax.numpy as jnp
import pytest
from jax import lax
from reading import array, feeding, read_linen, sizes

from ssvq_jax.hardware.reader import read_workload

pytestmark = pytest.mark.usefixtures("users_promotion")


def count_with_ones(workload, function, *shapes):
    """Without padding every result of a convolution of ones is the number of its products."""
    (product,) = workload.products
    assert product.macs == jnp.sum(function(*(jnp.ones(shape) for shape in shapes)))
    return product


CONVOLUTIONS = {
    "plain": ((2, 7, 9, 6), (3, 2, 6, 5), {}),
    "strided": ((2, 7, 9, 6), (3, 2, 6, 5), {"window_strides": (2, 3)}),
    "dilated": ((2, 7, 9, 6), (3, 2, 6, 5), {"rhs_dilation": (2, 3)}),
    "grouped": ((2, 7, 9, 6), (3, 2, 3, 8), {"feature_group_count": 2}),
    "depthwise": ((2, 7, 9, 6), (3, 2, 1, 12), {"feature_group_count": 6}),
    "batch groups": ((4, 7, 9, 6), (3, 2, 6, 8), {"batch_group_count": 2}),
    "transposed": ((2, 4, 5, 6), (3, 5, 6, 7), {"lhs_dilation": (2, 3)}),
    "transposed groups": (
        (2, 4, 5, 6),
        (3, 5, 3, 8),
        {"lhs_dilation": (2, 3), "feature_group_count": 2},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_against_brute_force(name):
    images, kernel, settings = CONVOLUTIONS[name]
    full = [(size - 1, size - 1) for size in kernel[:2]]

    def convolve(kernel, images):
        return lax.conv_general_dilated(
            images,
            kernel,
            **{"window_strides": (1, 1)} | settings,
            padding=full if "lhs_dilation" in settings else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    workload = read_workload(convolve, array(*kernel), array(*images))
    product = count_with_ones(workload, convolve, kernel, images)
    groups = settings.get("feature_group_count", 1) * settings.get("batch_group_count", 1)
    assert product.count == groups
    assert product.weights == math.prod(kernel)


def test_convolutions_over_time_and_space_and_in_another_order():
    def apply(params, sound, volume):
        sound = lax.conv_general_dilated(sound, params["sound"], (1,), "VALID")  # NCH, OIH
        volume = lax.conv_general_dilated(volume, params["volume"], (1, 1, 1), "VALID")
        return sound, volume

    params = {"sound": array(5, 3, 4), "volume": array(7, 2, 3, 3, 3)}
    workload = read_workload(apply, params, array(2, 3, 10), array(2, 2, 5, 6, 7))
    assert sizes(workload) == {
        "sound": (2 * 7, 4 * 3, 5, 1),
        "volume": (2 * 3 * 4 * 5, 27 * 2, 7, 1),
    }


def test_flax_transposed_convolution():
    workload = read_linen(nn.ConvTranspose(5, (4, 4), (2, 2)), array(2, 8, 8, 3))
    assert sizes(workload) == {"kernel": (2 * 8 * 8, 3, 16 * 5, 1)}
    # As many as at each of the 16 x 16 outputs for a quarter of the window.
    assert workload.macs == 2 * 16 * 16 * 4 * 3 * 5


def test_convolution_with_an_activation_as_the_kernel():
    def apply(params, kernel):
        return lax.conv_general_dilated(params["images"], kernel, (1, 1), "VALID")

    workload = read_workload(apply, {"images": array(1, 2, 5, 5)}, array(3, 2, 3, 3))
    assert sizes(workload) == {"conv_general_dilated": (9, 18, 3, 1)}
    assert feeding(workload) == {"conv_general_dilated": ()}


def test_convolution_with_strides_in_a_dilated_input_is_refused():
    def apply(kernel, images):
        no_padding = [(0, 0), (0, 0)]
        return lax.conv_general_dilated(images, kernel, (2, 2), no_padding, lhs_dilation=(2, 2))

    with pytest.raises(ValueError, match="conv_general_dilated"):
        read_workload(apply, array(3, 2, 3, 3), array(1, 2, 5, 5))
