"""The train step and decode lower for accelerators that this machine does not have.

This is lowering to StableHLO with ``jax.export``: it shows that every operation has a rule for the
platform. It compiles nothing, so it says nothing of memory, speed or the compiler's own limits.
"""

import chex
import jax
import jax.numpy as jnp
import pytest

import ssvq_jax as ssvq
from ssvq_jax.models import create, param_shapes
from ssvq_jax.models.vit import Block
from ssvq_jax.recipe import load_recipe
from ssvq_jax.training.optimizer import OptimizerConfig, make_optimizer
from ssvq_jax.training.step import linen_forward, make_state, make_train_step

RECIPES = ["ssvq-21x", "vq-21x", "uniform-2bit"]
BATCH = {
    "image": jax.ShapeDtypeStruct((64, 28, 28, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((64,), jnp.int32),
}
PLATFORMS = ("tpu", "cuda")


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def abstract(recipe):
    """A plan of the digits model, and the shapes of its variables."""
    shapes = param_shapes(create("deit_digits"))
    plan = ssvq.make_plan(shapes, load_recipe(recipe))
    return plan, jax.eval_shape(plan.init, jax.random.key(0), shapes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_train_step(recipe):
    plan, variables = abstract(recipe)
    tx = make_optimizer(plan, 100, OptimizerConfig())  # with freezing, where there are signs
    forward = linen_forward(create("deit_digits"))
    state = jax.eval_shape(
        lambda variables, key: make_state(forward, variables, tx, key),
        variables, jax.random.key(0),
    )  # fmt: skip
    exported = jax.export.export(make_train_step(plan), platforms=PLATFORMS)(state, BATCH)
    assert exported.platforms == PLATFORMS
    next_state, metrics = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    chex.assert_trees_all_equal_shapes_and_dtypes(next_state, state)
    signs = {"flipped", "frozen", "oscillation"} if recipe == "ssvq-21x" else set()
    assert set(metrics) == {"loss", "accuracy"} | signs


def test_train_step_with_all_options():
    model = create("deit_digits")
    shapes = param_shapes(model)
    half = ssvq.SignSplit(codewords=16, dim=8, latent_dtype="bfloat16")
    plan = ssvq.make_plan(shapes, [("blocks_.*kernel", half), (".*", None)])
    variables = jax.eval_shape(plan.init, jax.random.key(0), shapes)
    tx = make_optimizer(plan, 100, OptimizerConfig(accumulate=2, moment_dtype="bfloat16"))
    forward = linen_forward(model, remat=Block)
    state = jax.eval_shape(
        lambda variables, key: make_state(forward, variables, tx, key),
        variables, jax.random.key(0),
    )  # fmt: skip
    step = make_train_step(plan, remat=True)
    exported = jax.export.export(step, platforms=PLATFORMS)(state, BATCH)
    assert exported.platforms == PLATFORMS


@pytest.mark.parametrize("recipe", RECIPES)
def test_decode(recipe):
    plan, variables = abstract(recipe)
    exported = jax.export.export(jax.jit(plan.decode), platforms=PLATFORMS)(variables)
    assert exported.platforms == PLATFORMS
    decoded = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    shapes = param_shapes(create("deit_digits"))
    chex.assert_trees_all_equal_shapes_and_dtypes(decoded, shapes)
