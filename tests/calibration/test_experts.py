"""Tests of experts that receive few inputs or none: they are named, not passed over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.calibration import input_moments
from ssvq_jax.quantizers import Calibration


@pytest.fixture
def routed():
    """Four experts with room for five tokens each: 5, 2, 0 and 5 arrive, zeros fill the rest."""
    x = np.zeros((4, 5, 8), np.float32)
    for expert, tokens in enumerate((5, 2, 0, 5)):
        x[expert, :tokens] = np.random.default_rng(expert).standard_normal((tokens, 8))
    params = {"experts": jax.random.normal(jax.random.key(0), (4, 8, 6))}
    plan = ssvq.make_plan(params, [ssvq.Rule("experts", ssvq.Uniform(bits=4), stacked=1)])
    moments = input_moments(
        lambda params, x: jnp.einsum("etc,eco->eto", x, params["experts"]), params, plan, [x]
    )
    return params, plan, moments, x


def test_padding_counts_for_no_input(routed):
    _, _, moments, x = routed
    assert moments.rows == {"experts": 0}
    assert moments.few == {"experts": (0, 8)}
    for expert, tokens in ((0, 5), (1, 2)):
        taken = x[expert, :tokens]
        np.testing.assert_allclose(
            moments.inputs["experts"].matrix[expert], taken.T @ taken / tokens, rtol=1e-5
        )


def test_an_expert_without_inputs_is_reported(routed):
    params, plan, moments, _ = routed
    assert moments.unseen == {"experts": "slices 2 of 4"}
    assert "experts: no inputs reached slices 2 of 4: uncalibrated" in str(moments)
    calibration = {"experts": Calibration(inputs=moments.inputs["experts"])}
    with pytest.warns(UserWarning, match="leaf 'experts': no data reached slices 2 of 4"):
        plan.init(jax.random.key(1), params, calibration)


def test_importance_that_is_nowhere_is_reported(routed):
    params, plan, _, _ = routed
    importance = jnp.ones((4, 8, 6)).at[jnp.array([1, 3])].set(0)
    with pytest.warns(UserWarning, match="'experts': no data reached slices 1; 3 of 4"):
        plan.init(jax.random.key(1), params, {"experts": Calibration(importance)})
