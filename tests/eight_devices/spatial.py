"""Convolution and pooling of batches that are cut over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.models.spatial import convolve, max_pool
from ssvq_jax.training.layout import local_layout


def depthwise(images, kernel):
    return convolve(images, kernel, (2, 2), "SAME", feature_group_count=4)


def pointwise(images, kernel):
    return convolve(images, kernel[:1, :1, :, :] * jnp.ones((1, 1, 4, 1)), (1, 1), "SAME")


def pooled(images, kernel):
    return max_pool(images * kernel[:1, :1], 3, 2, 1)


@pytest.mark.parametrize("function", [depthwise, pointwise, pooled])
@pytest.mark.parametrize("devices", [2, 8])
def test_a_batch_stays_cut(function, devices):
    layout = local_layout(devices)
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.normal(size=(16, 9, 9, 4)), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(3, 3, 1, 4)), jnp.float32)

    def loss(images, kernel):
        return jnp.sum(function(images, kernel) ** 2)

    places = layout.batch, layout.replicated
    forward = jax.jit(function, in_shardings=places)
    compiled = forward.lower(images, kernel).compile()
    assert compiled.output_shardings.is_equivalent_to(layout.batch, 4)
    gradient = jax.jit(
        jax.grad(loss, argnums=(0, 1)), in_shardings=(layout.batch, layout.replicated)
    )
    program = gradient.lower(images, kernel).compile()
    for text in (compiled.as_text(), program.as_text()):
        assert "all-gather" not in text
    alone = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for found, expected in zip(gradient(images, kernel), alone(images, kernel), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
