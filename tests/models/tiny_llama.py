"""A small Llama with random variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssvq_jax.models.import_llama import llama_shapes, stack_layers
from ssvq_jax.models.llama import LlamaConfig

TINY = LlamaConfig(vocab=61, width=48, depth=3, heads=6, kv_heads=2, hidden=40, context=64)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens):
    return model.apply(variables, tokens)


@functools.cache
def random_variables(config, *, scan=False):
    random = np.random.default_rng(1)
    noise = lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32)  # noqa: E731
    variables = jax.tree.map(noise, llama_shapes(config))
    return stack_layers(variables) if scan else variables


def tokens_of(*shape):
    return jnp.asarray(np.random.default_rng(2).integers(0, TINY.vocab, shape))


def assert_close(ours, theirs, most=1e-4):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() <= most
