"""Fisher diagonals by hand and against gradients one by one; importance from inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.calibration import calibrations, fisher_diagonal, importance_of_inputs
from ssvq_jax.quantizers.calibration import InputMoments
from ssvq_jax.tree import LeafSpec

PLAN_RULES = [("kernel", ssvq.Uniform(bits=4)), (".*", None)]


def squared_error(params, x, y):
    found = x @ params["kernel"] + params["bias"][None]
    return jnp.mean(jnp.sum(jnp.square(found - y), axis=1)) / 2


@pytest.fixture(scope="module")
def params():
    return {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.zeros(2)}


@pytest.fixture(scope="module")
def plan(params):
    return ssvq.make_plan(params, PLAN_RULES)


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_linear_model_by_hand(params, plan, at_once):
    """The gradient of an example is x (xW - y): here [1, 2] x [1, 3], [0, 1] x [1, 1], ..."""
    x = jnp.array([[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]])
    y = jnp.array([[0.0, 1.0], [-1.0, 1.0], [0.0, 1.0]])
    # Residuals [1, 3], [1, 1], [2, -1]; squares of x and of residuals, summed and divided by 3.
    squares = np.array([[1 + 16, 9 + 4], [4 + 1, 36 + 1]])
    batches = [(x, y)]
    found = fisher_diagonal(squared_error, params, plan, batches, at_once=at_once)
    np.testing.assert_allclose(found["kernel"], squares / 3, rtol=1e-6)
    split = fisher_diagonal(squared_error, params, plan, [(x[:2], y[:2]), (x[2:], y[2:])])
    np.testing.assert_allclose(split["kernel"], found["kernel"], rtol=1e-6)
    assert set(found) == {"kernel"}
    encoded = plan.init(jax.random.key(0), params, calibrations(importance=found))
    assert "kernel" in encoded["vq"]


def test_half_precision_weights():
    params = {"kernel": jnp.eye(2, dtype=jnp.bfloat16), "bias": jnp.zeros(2, jnp.bfloat16)}
    plan = ssvq.make_plan(params, PLAN_RULES)

    def loss(params, x):
        return jnp.sum((x.astype(jnp.bfloat16) @ params["kernel"]).astype(jnp.float32))

    found = fisher_diagonal(loss, params, plan, [jnp.full((512, 2), 1.0)], at_once=64)["kernel"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.ones((2, 2)))


def test_errors(params, plan):
    x, y = jnp.ones((2, 2)), jnp.ones((2, 2))
    with pytest.raises(ValueError, match="at_once=0"):
        fisher_diagonal(squared_error, params, plan, [(x, y)], at_once=0)
    with pytest.raises(ValueError, match="no example"):
        fisher_diagonal(squared_error, params, plan, [])
    with pytest.raises(ValueError, match="first axes"):
        fisher_diagonal(squared_error, params, plan, [(x, y[:1])])
    with pytest.raises(ValueError, match="'kernel' are NaN"):
        fisher_diagonal(squared_error, params, plan, [(x * jnp.nan, y)])
    with pytest.raises(ValueError, match="'kernel' has no gradient"):
        fisher_diagonal(lambda params, x, y: jnp.sum(params["bias"]), params, plan, [(x, y)])
    with pytest.raises(ValueError, match=r"leaves \['kernel'\]"):
        fisher_diagonal(squared_error, {"bias": params["bias"]}, plan, [(x, y)])


def test_importance_of_inputs_of_stacked_and_other_axes():
    spec = LeafSpec("w", (2, 3, 4, 5), "float32", stacked=1)
    diagonals = np.random.default_rng(0).uniform(1, 2, (2, 12)).astype(np.float32)
    moments = InputMoments(jnp.asarray(np.stack([np.diag(x) for x in diagonals])), (0, 1))
    found = importance_of_inputs(moments, spec)
    expected = np.broadcast_to(diagonals.reshape(2, 3, 4, 1), spec.shape)
    np.testing.assert_array_equal(found, expected)
    head = InputMoments(jnp.diag(jnp.arange(1.0, 6.0)), (1,))
    found = importance_of_inputs(head, LeafSpec("embedding", (7, 5), "float32"))
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(1.0, 6.0), (7, 5)))
    with pytest.raises(ValueError, match="'w' have shape"):
        importance_of_inputs(head, dataclasses.replace(spec, stacked=0))
