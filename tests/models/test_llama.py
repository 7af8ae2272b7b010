"""Llama against itself: scan, cache and generation change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import TINY, assert_close, forward, random_variables, tokens_of

from ssvq_jax.models.generate import empty_cache, extend, generate
from ssvq_jax.models.import_llama import llama_shapes, stack_layers, unstack_layers
from ssvq_jax.models.llama import Llama
from ssvq_jax.models.variables import paths_of


def test_leaf_paths():
    config = dataclasses.replace(TINY, tied=False)
    layer = {f"attn/{name}/kernel" for name in "qkvo"}
    layer |= {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    layer |= {"attn_norm/scale", "mlp_norm/scale"}
    rest = {"params/embed/embedding", "params/norm/scale", "params/lm_head/kernel"}
    single = {f"params/layers_{i}/{path}" for i in range(3) for path in layer}
    assert set(paths_of(llama_shapes(config))) == rest | single
    stacked = paths_of(llama_shapes(config, scan=True))
    assert set(stacked) == rest | {f"params/layers/{path}" for path in layer}
    assert stacked["params/layers/attn/k/kernel"].shape == (3, 48, 16)


def test_scan_and_remat_change_nothing():
    variables = random_variables(TINY)
    stacked = stack_layers(variables)
    for found, wanted in zip(
        jax.tree.leaves(unstack_layers(stacked)), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    tokens = tokens_of(2, 12)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(model, variables):
        return jax.grad(loss, argnums=1, has_aux=True)(model, variables)

    def loss(model, variables):
        logits = model.apply(variables, tokens)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1)), logits

    wanted, wanted_logits = loss_and_gradient(Llama(TINY), variables)
    for scan in (False, True):
        for remat in (False, True):
            model = Llama(TINY, scan=scan, remat=remat)
            given = stacked if scan else variables
            found, logits = loss_and_gradient(model, given)
            assert_close(logits, wanted_logits, 1e-6)
            found = unstack_layers(found) if scan else found
            jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, wanted)


@pytest.mark.parametrize("scan", [False, True])
def test_cache_gives_the_logits_of_the_full_forward(scan):
    model = Llama(TINY, scan=scan)
    variables = random_variables(TINY, scan=scan)
    tokens = tokens_of(2, 12)
    full = forward(model, variables, tokens)
    cache = empty_cache(model, 2, 15)
    step = jax.jit(extend, static_argnums=0)
    parts = []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        logits, cache = step(model, variables["params"], cache, tokens[:, start:stop])
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), full, 2e-6)
    assert int(cache["length"]) == 12


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_generation_takes_the_likeliest_token(scan):
    model = Llama(TINY, scan=scan)
    variables = random_variables(TINY, scan=scan)
    tokens = tokens_of(2, 6)
    found = generate(model, variables["params"], tokens, 6)
    text = jnp.pad(tokens, ((0, 0), (0, 6)))  # what stands after a token does not change its logits
    for i in range(6, 12):
        best = jnp.argmax(forward(model, variables, text)[:, i - 1], axis=-1)
        text = text.at[:, i].set(best)
    np.testing.assert_array_equal(found, text[:, 6:])

    # Sequences that met the end repeat it, the others do not change.
    end = int(found[0, 2])
    ended = np.asarray(generate(model, variables["params"], tokens, 6, end=end))
    for row, free in zip(ended, np.asarray(found), strict=True):
        stop = np.flatnonzero(free == end)
        first = stop[0] if len(stop) else len(free)
        np.testing.assert_array_equal(row[:first], free[:first])
        assert (row[first:] == end).all()


def test_temperature_draws_from_the_softmax():
    model = Llama(dataclasses.replace(TINY, vocab=5))
    variables = random_variables(model.config)
    prompt = jnp.array([[1, 2, 3]])
    draws = 4000
    draw = functools.partial(
        generate, model, variables["params"], jnp.tile(prompt, (draws, 1)), 1, temperature=1.5
    )
    found = draw(key=jax.random.key(5))[:, 0]
    probabilities = jax.nn.softmax(forward(model, variables, prompt)[0, -1] / 1.5)
    shares = np.bincount(found, minlength=5) / draws
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(shares - probabilities) <= 5 * deviation + 1e-6).all()
    np.testing.assert_array_equal(found, draw(key=jax.random.key(5))[:, 0])
    assert (found != draw(key=jax.random.key(6))[:, 0]).any()


def test_generation_refuses():
    model, params = Llama(TINY), random_variables(TINY)["params"]
    with pytest.raises(ValueError, match="4 tokens and 61 steps are more than .* context of 64"):
        generate(model, params, tokens_of(1, 4), 61)
    with pytest.raises(ValueError, match="4 tokens and 0 steps"):
        generate(model, params, tokens_of(1, 4), 0)
    with pytest.raises(ValueError, match=r"temperature=0.5: give 0, or more and a key"):
        generate(model, params, tokens_of(1, 4), 1, temperature=0.5)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16(scan):
    variables = random_variables(TINY, scan=scan)
    tokens = tokens_of(2, 12)
    wanted = np.asarray(forward(Llama(TINY, scan=scan), variables, tokens))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        model = Llama(TINY, jnp.bfloat16, scan=scan)
        logits = forward(model, variables, tokens)
        cache = empty_cache(model, 2, 12)
        step = jax.jit(extend, static_argnums=0)
        cached, _ = step(model, variables["params"], cache, tokens)
    assert logits.dtype == jnp.float32
    for found in (logits, cached):
        assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0: give at least 1"),
        ({"heads": 5}, "heads=5 does not divide width=48"),
        ({"kv_heads": 4}, "kv_heads=4 does not divide heads=6"),
        ({"rope_factors": (1.0,)}, "rope_factors has 1 numbers: give 4"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
