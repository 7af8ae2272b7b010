"""The same transforms on models of every kind, and in a loop of the user's own."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ssvq_jax as ssvq
from ssvq_jax.models import ViT, ViTConfig

QUANTIZER = ssvq.SignSplit(codewords=4, dim=8, iterations=5)
RULES = (
    ssvq.Rule(r".*(kernel|weight)", QUANTIZER),
    (".*", None),
)


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes, as their users' code does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def inputs():
    return jax.random.normal(jax.random.key(7), (16, 16))


def finetune(params, apply, rules=RULES, steps=30):
    """Ten lines of a user: compress, train signs and codebooks towards the float outputs."""
    plan = ssvq.make_plan(params, rules)
    learned, fixed = ssvq.split(plan.init(jax.random.key(0), params))
    tx = ssvq.freeze_signs(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)),
        every=10,
        threshold=ssvq.cosine_threshold(start=0.1, end=0.02, steps=steps),
    )
    target = apply(params)

    def loss(learned):
        return jnp.mean((apply(plan.decode(learned | fixed)) - target) ** 2)

    @jax.jit
    def step(learned, opt_state):
        value, grads = jax.value_and_grad(loss)(learned)
        updates, opt_state = tx.update(grads, opt_state, learned)
        return optax.apply_updates(learned, updates), opt_state, value

    opt_state, losses = tx.init(learned), []
    for _ in range(steps):
        learned, opt_state, value = step(learned, opt_state)
        losses.append(float(value))
    packed = plan.finalize(learned | fixed)
    return losses, packed.decode(), plan.decode(learned | fixed)


def check(params, result):
    losses, decoded, trained = result
    assert losses[-1] < 0.8 * losses[0]
    assert jax.tree.structure(decoded) == jax.tree.structure(params)
    chex.assert_trees_all_equal(decoded, trained)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.Dense(64)(x)))


def test_linen():
    model = LinenNet()
    params = jax.jit(model.init)(jax.random.key(0), inputs())["params"]
    check(params, finetune(params, lambda p: model.apply({"params": p}, inputs())))


@pytest.mark.slow
def test_linen_attention_convolution_and_embedding_kernels():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(32, 16)(tokens)
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
            x = nn.Conv(16, (3,), feature_group_count=16)(x)  # depthwise
            return nn.Conv(8, (3,))(x)

    model, tokens = Net(), jnp.arange(32).reshape(4, 8)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    quantizer = ssvq.SignSplit(codewords=2, dim=4, iterations=5)
    rules = ((r".*(kernel|embedding)", quantizer), (".*", None))
    paths = {entry.name for entry in ssvq.make_plan(params, rules).entries}
    assert "MultiHeadDotProductAttention_0/query/kernel" in paths
    assert len(paths) == 7
    check(params, finetune(params, lambda p: model.apply({"params": p}, tokens), rules))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)])
        self.norm = nnx.BatchNorm(64, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.norm(self.layers[0](x), use_running_average=True)))


def test_nnx():
    graph, state, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)
    params = nnx.to_pure_dict(state)

    def apply(params):
        return nnx.merge(graph, nnx.State(params), rest)(inputs())

    assert {e.name for e in ssvq.make_plan(params, RULES).entries} == {
        "layers/0/kernel",  # integer keys
        "layers/1/kernel",
    }
    check(params, finetune(params, apply))


def test_equinox():
    model = eqx.nn.MLP(16, 8, 64, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params):
        return jax.vmap(eqx.combine(params, static))(inputs())

    check(params, finetune(params, apply))


def scanned_vit():
    config = ViTConfig(
        image_size=8, channels=1, patch_size=4, width=16, depth=3, heads=2, classes=8
    )
    model = ViT(config, scan=True)
    images = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
    return model, images, jax.jit(model.init)(jax.random.key(0), images)["params"]


def test_scanned_linen_model_gets_a_codebook_a_layer():
    model, images, params = scanned_vit()
    rules = (ssvq.Rule("blocks/.*kernel", QUANTIZER, stacked=1), (".*", None))
    plan = ssvq.make_plan(params, rules)
    variables = plan.init(jax.random.key(0), params)
    assert variables["vq"]["blocks/attn/qkv/kernel"]["codebook"].shape == (3, 4, 8)
    check(params, finetune(params, lambda p: model.apply({"params": p}, images), rules))


def test_scanned_and_unrolled_models_compute_the_same():
    model, images, params = scanned_vit()
    unrolled = {k: v for k, v in params.items() if k != "blocks"}
    for i in range(3):
        unrolled[f"blocks_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
    np.testing.assert_allclose(
        model.apply({"params": params}, images),
        ViT(model.config).apply({"params": unrolled}, images),
        rtol=1e-4,
        atol=1e-5,
    )


def test_train_state_of_the_users_own():
    model = LinenNet()
    params = jax.jit(model.init)(jax.random.key(0), inputs())["params"]
    plan = ssvq.make_plan(params, RULES)
    learned, fixed = ssvq.split(plan.init(jax.random.key(1), params))
    groups = {"dense": optax.adamw(1e-3), "codebook": optax.adam(1e-2), "sign": optax.adam(1e-2)}
    tx = ssvq.freeze_signs(optax.partition(groups, plan.labels), every=2, threshold=0.001)
    state = TrainState.create(apply_fn=model.apply, params=learned, tx=tx)
    labels = jnp.arange(16) % 8

    def loss(learned):
        logits = model.apply({"params": plan.decode(learned | fixed)}, inputs())
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    first = float(loss(state.params))
    for _ in range(20):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    assert float(loss(state.params)) < 0.5 * first
    assert int(state.step) == 20
    assert set(state.params) == {"params", "vq"}
