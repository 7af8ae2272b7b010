"""Convolution and pooling against XLA's own, with their derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.models.spatial import convolve, max_pool


def drawn(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


def own(images, kernel, strides, padding, dilation, groups):
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def check(images, kernel, strides, padding, dilation, groups):
    """Values, gradients and a directional derivative are XLA's."""

    def ours(images, kernel):
        return convolve(
            images,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
        )

    def theirs(images, kernel):
        return own(images, kernel, strides, padding, dilation, groups)

    expected, pull = jax.vjp(theirs, images, kernel)
    found, pull_ours = jax.vjp(ours, images, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (cotangent,) = drawn(expected.shape, seed=1)
    for a, b in zip(pull_ours(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    tangents = tuple(drawn(images.shape, kernel.shape, seed=2))
    along = jax.jvp(ours, (images, kernel), tangents)[1]
    expected = jax.jvp(theirs, (images, kernel), tangents)[1]
    np.testing.assert_allclose(along, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "size", "strides", "dilation", "padding"),
    [
        (8, 3, (1, 1), (1, 1), "SAME"),
        (7, 3, (2, 2), (1, 1), "SAME"),
        (8, 5, (2, 2), (1, 1), "SAME"),  # pads more at the end
        (9, 3, (2, 1), (1, 2), ((2, 2), (1, 0))),
        (9, 3, (1, 1), (2, 2), "VALID"),
        (8, 1, (1, 1), (1, 1), "VALID"),
    ],
)
def test_each_feature_alone(height, size, strides, dilation, padding):
    images, kernel = drawn((2, height, 11, 3), (size, size, 1, 3))
    check(images, kernel, strides, padding, dilation, groups=3)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (0, 0))])
def test_one_pixel(stride, padding):
    images, kernel = drawn((2, 7, 9, 3), (1, 1, 3, 5))
    check(images, kernel, (stride, stride), padding, (1, 1), groups=1)


@pytest.mark.parametrize(
    ("kernel", "padding", "groups"),
    [
        ((3, 3, 4, 6), "SAME", 1),
        ((1, 1, 4, 6), ((1, 1), (0, 0)), 1),  # padded: no product of matrices
        ((3, 3, 2, 6), "VALID", 2),
        ((3, 3, 1, 8), "SAME", 4),  # two outputs of each feature
    ],
)
def test_others_are_left_to_xla(kernel, padding, groups):
    images, weights = drawn((2, 7, 6, 4), kernel)
    check(images, weights, (1, 2), padding, (1, 1), groups)
    text = jax.jit(convolve, static_argnums=(2, 3), static_argnames="feature_group_count").lower(
        images, weights, (1, 2), padding, feature_group_count=groups
    )
    assert "stablehlo.convolution" in text.as_text()


@pytest.mark.parametrize(("size", "groups"), [(3, 4), (1, 1)])
def test_platforms_get_what_is_fast_on_them(size, groups):
    images, kernel = drawn((2, 8, 8, 4), (size, size, 4 // groups, 4))

    def loss(images, kernel):
        return convolve(images, kernel, (1, 1), "SAME", feature_group_count=groups).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for platform, convolves in [("cpu", False), ("tpu", True), ("cuda", True)]:
        text = jax.export.export(step, platforms=[platform])(images, kernel).mlir_module()
        assert ("stablehlo.convolution" in text) == convolves


def test_over_another_axis():
    images, kernel = drawn((3, 2, 6, 6, 4), (3, 3, 1, 4))

    def one(images):
        return convolve(images, kernel, (1, 1), "SAME", feature_group_count=4)

    expected = jnp.stack([one(x) for x in images])
    np.testing.assert_allclose(jax.vmap(one)(images), expected, rtol=1e-6, atol=1e-6)


def test_sums_of_16_bit_numbers_are_kept_in_32():
    images = jnp.ones((1, 17, 17, 2), jnp.bfloat16)
    kernel = jnp.ones((17, 17, 1, 2), jnp.bfloat16)  # 289 ones: of 256 and one, 16 bits keep 256
    found = convolve(images, kernel, (1, 1), "VALID", feature_group_count=2)
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 0, 0, 0]) == 288  # the nearest to 289 that 8 bits hold


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("size", "stride", "pad"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0)])
def test_max_pool(size, stride, pad, seed):
    # Few values, so that many are equal and the gradient has to choose.
    images = jnp.asarray(
        np.random.default_rng(seed).integers(0, 3, (2, 7, 8, 2)).astype(np.float32)
    )

    def theirs(images):
        return nn.max_pool(images, (size, size), (stride, stride), ((pad, pad), (pad, pad)))

    expected, pull = jax.vjp(theirs, images)
    found, pull_ours = jax.vjp(lambda x: max_pool(x, size, stride, pad), images)
    np.testing.assert_array_equal(found, expected)
    (cotangent,) = drawn(expected.shape)
    np.testing.assert_allclose(pull_ours(cotangent)[0], pull(cotangent)[0], atol=1e-5)


def test_max_pool_keeps_what_is_no_number():
    images = jnp.ones((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    expected = [[False, True], [False, False]]
    np.testing.assert_array_equal(jnp.isnan(max_pool(images, 2, 2, 0)[0, :, :, 0]), expected)


# What is neither of the two is XLA's own, and refused in its words


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((2, 9, 9, 4), (1, 1, 4, 4), {"lhs_dilation": (2, 2), "padding": ((0, 0), (0, 0))}),
        (
            (2, 9, 9, 4),
            (3, 3, 1, 4),
            {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1)), "feature_group_count": 4},
        ),
        ((2, 9, 9, 4), (1, 1, 4, 4), {"padding": ((1, -1), (0, 0))}),
        ((2, 9, 9, 4), (3, 3, 1, 4), {"padding": ((-1, 0), (0, 0)), "feature_group_count": 4}),
        ((0, 9, 9, 4), (1, 1, 4, 4), {}),
        ((0, 9, 9, 4), (3, 3, 1, 4), {"feature_group_count": 4}),
        ((2, 4, 9, 9), (4, 4, 1, 1), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    ],
)
def test_other_convolutions(shape, kernel, settings):
    images, weights = drawn(shape, kernel)
    given = {"window_strides": (1, 1), "padding": "VALID", **settings}
    expected = jax.lax.conv_general_dilated(
        images, weights, **{"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **given}
    )
    np.testing.assert_allclose(convolve(images, weights, **given), expected, rtol=1e-5, atol=1e-5)


def test_results_of_another_type():
    images, weights = (x.astype(jnp.bfloat16) for x in drawn((2, 5, 5, 4), (1, 1, 4, 4)))
    found = convolve(images, weights, (1, 1), "VALID", preferred_element_type=jnp.float32)
    assert found.dtype == jnp.float32


def test_a_line_of_pixels():
    images, weights = drawn((2, 9, 4), (3, 1, 4))
    numbers = ("NWC", "WIO", "NWC")
    found = convolve(
        images, weights, (1,), "SAME", dimension_numbers=numbers, feature_group_count=4
    )
    assert found.shape == (2, 9, 4)


@pytest.mark.parametrize("size", [1, 3])
def test_channels_that_do_not_fit(size):
    images, weights = drawn((2, 5, 5, 4), (size, size, 3, 4))
    with pytest.raises(ValueError, match="feature_group_count"):
        convolve(images, weights, (1, 1), "SAME")


def test_second_derivatives():
    images, kernel = drawn((1, 4, 4, 2), (3, 3, 1, 2))

    def along(convolve):
        def loss(kernel):
            return jnp.sum(convolve(images, kernel) ** 3)

        return jax.jvp(jax.grad(loss), (kernel,), (jnp.ones_like(kernel),))[1]

    found = along(lambda x, k: convolve(x, k, (1, 1), "SAME", feature_group_count=2))
    expected = along(lambda x, k: own(x, k, (1, 1), "SAME", (1, 1), 2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_no_images_to_pool():
    assert max_pool(jnp.zeros((0, 4, 4, 1)), 2, 2, 0).shape == (0, 2, 2, 1)
    assert max_pool(jnp.zeros((1, 2, 2, 1)), 3, 1, 0).shape == (1, 0, 0, 1)
