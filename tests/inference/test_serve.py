"""Serving packed weights: the same outputs from every kind of model, in the memory of a layer."""

import functools
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

import ssvq_jax as ssvq
from ssvq_jax.inference import decode_params, packed_params, serve
from ssvq_jax.inference.ordering import _zero
from ssvq_jax.models import ViT, ViTConfig
from ssvq_jax.models.vit import Block
from ssvq_jax.training.remat import remat_calls

QUANTIZER = ssvq.SignSplit(codewords=4, dim=8, iterations=2)
DENSE = ssvq.Rule(".*", None, optional=True)
EVERYWHERE = (ssvq.Rule(".*(kernel|weight|embedding)", QUANTIZER), DENSE)
STACKED = (ssvq.Rule("blocks/.*kernel", QUANTIZER, stacked=1), DENSE)


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax mixes dtypes, as its users' code does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def pack(params, rules=EVERYWHERE):
    plan = ssvq.make_plan(params, rules)
    return packed_params(plan.finalize(plan.init(jax.random.key(0), params)))


def activations(*shape):
    return jax.random.normal(jax.random.key(7), shape)


# Undoes the suite's flags: the bits of two programs are compared as users have them.
AS_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}


def check_same(function, packed, *args, rtol=0.0, compiler_options=None, **kwargs):
    """Compares with decoding first; the outputs are to have the same bits, unless rtol is given."""
    jit = functools.partial(jax.jit, compiler_options=compiler_options)
    expected = jit(lambda p, args: function(p, *args, **kwargs))(decode_params(packed), args)
    served = jit(lambda p, args: serve(function)(p, *args, **kwargs))(packed, args)
    chex.assert_trees_all_close(served, expected, rtol=rtol, atol=0.1 * rtol)
    return packed


class Tower(nn.Module):
    """Layers of many kinds; one is used twice, and a kernel is the module's own."""

    def setup(self):
        self.embed = nn.Embed(32, 16)
        self.attention = nn.MultiHeadDotProductAttention(num_heads=2)
        self.conv = nn.Conv(16, (3,))
        self.norm = nn.BatchNorm(use_running_average=False)
        self.twice = nn.WeightNorm(nn.Dense(16))
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (16, 16))

    def __call__(self, tokens):
        x = self.conv(self.attention(self.embed(tokens)))
        x = self.norm(self.twice(nn.relu(self.twice(x)))) @ self.kernel
        return self.embed.attend(x)

    def encode(self, tokens, scale=1.0):
        return scale * self.embed(tokens)


def test_linen_layers_batch_statistics_and_methods():
    model, tokens = Tower(), jnp.arange(32).reshape(4, 8)
    variables = model.init(jax.random.key(0), tokens)
    params, state = variables.pop("params"), variables

    def apply(params, tokens, **kwargs):
        return model.apply({"params": params, **state}, tokens, **kwargs)

    packed = pack(params)
    check_same(apply, packed, tokens, mutable=["batch_stats"])
    check_same(apply, packed, tokens, method="encode", scale=2.0)
    logits, updated = serve(model.apply)(
        {"params": packed, **state}, tokens, mutable=["batch_stats"]
    )
    assert logits.shape == (4, 8, 32)
    assert set(updated) == {"batch_stats"}


WIDTH, DEPTH = 64, 6
LAYER = 12 * WIDTH * WIDTH * 4  # bytes of a decoded block


@functools.cache
def packed_vit(scan):
    config = ViTConfig(
        image_size=8, channels=1, patch_size=4, width=WIDTH, depth=DEPTH, heads=2, classes=8
    )
    model, images = ViT(config, scan=scan), activations(4, 8, 8, 1)
    params = ViT(config, scan=True).init(jax.random.key(0), images)["params"]
    packed = pack(params, STACKED)
    if not scan:
        blocks = packed.pop("blocks")
        for i in range(DEPTH):
            packed[f"blocks_{i}"] = jax.tree.map(lambda x, i=i: x[i], blocks)
    return model, packed, images


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_linen_blocks_in_a_row_and_scanned(scan):
    model, packed, images = packed_vit(scan)
    check_same(
        lambda p, x: model.apply({"params": p}, x), packed, images, compiler_options=AS_USERS
    )


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.dense(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.List([NnxBlock(rngs), nnx.Conv(16, 16, (3,), rngs=rngs)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        create = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))
        self.blocks = create(rngs)

    def __call__(self, x):
        for layer in self.first:
            x = layer(x)
        x = self.norm(x, use_running_average=True)
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["plain", "nnx.jit"])
def test_nnx(jit):
    graph, state, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, x):
        own = jax.tree.map(lambda x: x, rest)  # nnx.jit writes to what it is given
        return jit(lambda model, x: model(x))(nnx.merge(graph, nnx.State(params), own), x)

    packed = pack(nnx.to_pure_dict(state), (*STACKED[:1], *EVERYWHERE))
    check_same(apply, packed, activations(4, 8, 16))


def test_equinox():
    model = eqx.nn.MLP(16, 8, 64, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    packed, x = pack(params), activations(5, 16)
    check_same(lambda params, x: jax.vmap(eqx.combine(params, static))(x), packed, x)
    outputs = jax.vmap(lambda x: serve(lambda p, x: eqx.combine(p, static)(x))(packed, x))
    expected = jax.vmap(eqx.combine(decode_params(packed), static))(x)
    np.testing.assert_allclose(outputs(x), expected, rtol=1e-5, atol=1e-6)


def weights(*names, depth=None):
    shape = (16, 16) if depth is None else (depth, 16, 16)
    keys = jax.random.split(jax.random.key(5), len(names))
    return {
        name: 0.1 * jax.random.normal(key, shape) for name, key in zip(names, keys, strict=True)
    }


def loops(params, x):
    def step(carry, _):
        return carry @ params["a"]["kernel"] + x, jnp.sum(carry)

    x, sums = jax.lax.scan(step, x, length=3)
    x = jax.lax.while_loop(
        lambda x: jnp.sum(x**2) > 1, lambda x: 0.1 * x @ params["b"]["kernel"], x
    )
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ params["c"]["kernel"], lambda x: x, x), sums


def from_weights_alone(params, x):
    table = jnp.tanh(jnp.arange(16.0) @ params["a"]["kernel"]).reshape(4, 4)
    scale = jax.nn.softplus(params["b"]["kernel"]) / jnp.linalg.norm(params["b"]["kernel"])
    return jax.nn.gelu(x[:, :4] @ table), x @ scale, table, params["c"]["kernel"]


# What is computed from weights alone is fused with the decoding, and rounded elsewhere.
@pytest.mark.parametrize(("function", "rtol"), [(loops, 0.0), (from_weights_alone, 1e-5)])
def test_plain_functions(function, rtol):
    params = {name: {"kernel": weight} for name, weight in weights("a", "b", "c").items()}
    check_same(function, pack(params), activations(4, 16), rtol=rtol)


def test_decoding_at_the_place_of_use():
    params = {"blocks": {"kernel": weights("w", depth=3)["w"]}}
    packed = pack(params, STACKED)

    def apply(blocks, x):
        return jax.lax.scan(lambda x, p: (x @ decode_params(p)["kernel"], None), x, blocks)[0]

    expected = jax.jit(apply)(decode_params(packed)["blocks"], activations(4, 16))
    np.testing.assert_array_equal(jax.jit(apply)(packed["blocks"], activations(4, 16)), expected)


def memory(function, *args):
    found: Any = jax.jit(function).lower(*args).compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def resting(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def plainly(model, params, images):
    return model.apply({"params": params}, images)


def cast_first(model, params, images):
    return plainly(model, jax.tree.map(lambda x: x.astype("bfloat16"), params), images)


def recomputed(model, params, images):
    with remat_calls(Block):
        return plainly(model, params, images)


@pytest.mark.parametrize(
    ("scan", "apply"),
    [(False, plainly), (True, plainly), (True, cast_first), (True, recomputed)],
)
def test_at_most_about_one_layer_is_decoded_at_any_time(scan, apply):
    model, packed, images = packed_vit(scan)
    apply = functools.partial(apply, model)
    hidden = 4 * 5 * (4 * WIDTH) * 4  # tokens as wide as they get
    bound = resting(packed) + 2 * LAYER + 4 * hidden
    assert memory(serve(apply), packed, images) <= bound
    assert memory(lambda p, x: apply(decode_params(p), x), packed, images) > bound + LAYER


def test_decoded_layers_are_not_kept_for_a_backward_pass():
    model, packed, images = packed_vit(scan=True)
    images = images[:1]

    def loss(apply):
        return lambda p, x: jax.grad(lambda x: apply({"params": p}, x).sum())(x)

    served, decoded = loss(serve(model.apply)), loss(model.apply)
    np.testing.assert_allclose(
        jax.jit(served)(packed, images),
        jax.jit(decoded)(decode_params(packed), images),
        rtol=1e-4,
        atol=1e-6,
    )
    kept = memory(lambda p, x: decoded(decode_params(p), x), packed, images)
    assert memory(served, packed, images) < kept - (DEPTH - 2) * LAYER


@pytest.mark.parametrize("value", [0.0, -1.5, np.nan, np.inf, -np.inf, 1e-45])
def test_the_dependency_changes_no_bit(value):
    assert not jax.jit(_zero)(jnp.float32(value))
    params = {"kernel": weights("w")["w"]}
    packed = pack(params)
    x = jnp.full((2, 16), value)
    function = lambda params, x: (x @ params["kernel"], params["kernel"] + 0 * jnp.isnan(x[:1].T))  # noqa: E731
    served = jax.jit(serve(function))(packed, x)
    chex.assert_trees_all_equal(served, function(decode_params(packed), x))


def test_under_vmap_a_weight_is_decoded_once():
    packed = pack({"kernel": weights("w")["w"]})
    one = serve(lambda params, x: jnp.tanh(x @ params["kernel"]))
    batched = jax.vmap(one, in_axes=(None, 0))
    text = str(jax.make_jaxpr(batched)(packed, activations(5, 16)))
    assert "f32[16,16]" in text
    assert "[5,16,16]" not in text
    grads = jax.vmap(jax.grad(lambda x: one(packed, x).sum()))(activations(5, 16))
    kernel = decode_params(packed)["kernel"]
    expected = jax.vmap(jax.grad(lambda x: jnp.tanh(x @ kernel).sum()))(activations(5, 16))
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_packed_leaf_are_refused():
    with pytest.raises(ValueError, match="no leaf of the parameters is packed"):
        serve(lambda params, x: x)({"kernel": jnp.ones((16, 16))}, jnp.ones(16))


def test_another_model_is_named_by_its_framework():
    packed = pack(nn.Dense(16).init(jax.random.key(0), jnp.ones((1, 16)))["params"])
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        serve(nn.Dense(8).apply)({"params": packed}, jnp.ones((1, 16)))
    with pytest.raises(ScopeParamNotFoundError, match="scale"):
        serve(nn.LayerNorm().apply)({"params": packed}, jnp.ones((1, 16)))
