"""Moments of inputs from batches that are cut over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np

import ssvq_jax as ssvq
from ssvq_jax.calibration import input_moments
from ssvq_jax.training.layout import local_layout


def network(params, x):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    images = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.lax.scan(layer, images, params["stack"])[0]


def test_a_batch_that_is_cut_gives_the_same_sums():
    layout = local_layout(8)
    generator = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "stack": (3, 4, 4)}
    params = {
        name: jnp.asarray(generator.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }
    method = ssvq.Uniform(bits=4)
    plan = ssvq.make_plan(params, [("conv", method), ssvq.Rule("stack", method, stacked=1)])
    batches = [jnp.asarray(generator.normal(size=(16, 5, 5, 2)), jnp.float32) for _ in range(2)]
    cut = [jax.device_put(batch, layout.batch) for batch in batches]
    placed = jax.device_put(params, layout.replicated)
    alone = input_moments(network, params, plan, batches)
    together = input_moments(network, placed, plan, cut)
    assert together.rows == alone.rows == {"conv": 800, "stack": 800}
    for path, moments in together.inputs.items():
        assert len(moments.matrix.sharding.device_set) == 8
        expected = alone.inputs[path].matrix
        np.testing.assert_allclose(moments.matrix, expected, rtol=1e-5, atol=1e-5)
