"""Serving and products on a mesh of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ssvq_jax as ssvq
from ssvq_jax.inference import matmul, packed_params, serve

METHOD = ssvq.SignSplit(codewords=4, dim=8, iterations=2)
MODELS = {
    "product": lambda p, x: jnp.tanh(x @ p["one"]) @ p["one"],
    "scan": lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0],
    "loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["one"]), x),
    "choice": lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda x: x @ p["one"], lambda x: x @ p["one"] + 1, x
    ),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.fixture(scope="module")
def packed():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "one": jax.random.normal(keys[0], (64, 64)) / 8,
        "stack": jax.random.normal(keys[1], (3, 64, 64)) / 8,
    }
    plan = ssvq.make_plan(params, [("one", METHOD), ssvq.Rule("stack", METHOD, stacked=1)])
    return plan.finalize(plan.init(jax.random.key(0), params))


def placed(packed, axes):
    """Packed weights on every device, and a batch cut over all."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.random.normal(jax.random.key(1), (16, 64))
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    return mesh, jax.device_put(packed_params(packed), everywhere), x, cut


@every_model
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_served_on_a_mesh(packed, model, axes):
    _, weights, x, cut = placed(packed, axes)
    found = jax.jit(serve(model))(weights, cut)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, model(packed.decode(), x), rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("check_vma", [True, False])
def test_served_within_a_shard_map(packed, model, check_vma):
    if model is MODELS["choice"]:
        pytest.skip("devices choose for themselves there")
    mesh, weights, x, cut = placed(packed, AxisType.Auto)
    part, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        serve(model), mesh=mesh, in_specs=(whole, part), out_specs=part, check_vma=check_vma
    )
    found = jax.jit(mapped)(weights, cut)
    np.testing.assert_allclose(found, model(packed.decode(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_products_on_a_mesh(packed, axes):
    mesh, weights, x, cut = placed(packed, axes)
    expected = x @ packed.decode()["one"]
    np.testing.assert_allclose(matmul(cut, weights["one"]), expected, rtol=1e-5, atol=1e-5)
    part, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(matmul, mesh=mesh, in_specs=(part, whole), out_specs=part)
    np.testing.assert_allclose(jax.jit(mapped)(cut, weights["one"]), expected, rtol=1e-5, atol=1e-5)
