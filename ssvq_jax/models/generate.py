"""Text generation with a cache of keys and values, so that a step costs one token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ssvq_jax.models.llama import Llama


def empty_cache(model: Llama, batch: int, length: int) -> dict[str, Any]:
    """Allocates a cache: the collection ``cache`` of a `Llama`.

    Args:
        model: the model.
        batch: sequences.
        length: tokens that it has room for; what is written beyond is wrong, and nothing tells.

    Returns:
        ``length``, the tokens that are in it, and keys and values ``[b, length, kv_heads, d]`` of
        each layer in the model's dtype.

    Example:
        >>> from ssvq_jax.models.llama import CONFIGS
        >>> cache = empty_cache(Llama(CONFIGS["smollm2_135m"]), batch=1, length=100)
        >>> cache["layers_29"]["attn"]["keys"].shape
        (1, 100, 3, 64)
    """
    cfg = model.config
    shape = (batch, length, cfg.kv_heads, cfg.head_dim)
    names = ["layers"] if model.scan else [f"layers_{i}" for i in range(cfg.depth)]
    shape = (cfg.depth, *shape) if model.scan else shape
    zeros = lambda: jnp.zeros(shape, model.dtype)  # noqa: E731
    layers = {name: {"attn": {"keys": zeros(), "values": zeros()}} for name in names}
    return {"length": jnp.zeros((), jnp.int32), **layers}


def extend(
    model: Llama, params: Any, cache: Any, tokens: Int[Array, "b t"]
) -> tuple[Float[Array, "b t vocab"], Any]:
    """Reads tokens after those in the cache.

    Args:
        model: the model.
        params: its parameters.
        cache: from `empty_cache` or `extend`.
        tokens: what comes next.

    Returns:
        Logits, and the longer cache.
    """
    variables = {"params": params, "cache": cache}
    logits, changed = model.apply(variables, tokens, mutable=["cache"])
    return logits, changed["cache"]  # pyright: ignore[reportReturnType]


def generate(
    model: Llama,
    params: Any,
    prompt: Int[Array, "b t"],
    steps: int,
    *,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    end: int | None = None,
) -> Int[Array, "b steps"]:
    """Continues prompts; compiled once for a shape of prompts and a number of steps.

    Args:
        model: the model.
        params: its parameters.
        prompt: token numbers; prompts of one length.
        steps: tokens to add.
        temperature: 0 takes the likeliest token, ties the first; else tokens are drawn from
            ``softmax(logits / temperature)``.
        key: typed PRNG key, for a temperature above 0.
        end: token after which a sequence is over and repeats it; the loop ends when all are.

    Returns:
        The added tokens.

    Raises:
        ValueError: without prompt, steps or key, for a negative temperature, or if the model was
            not trained for so many tokens.
    """
    if prompt.shape[1] < 1 or steps < 1:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and {steps} steps: give at least one of each"
        )
    if prompt.shape[1] + steps > model.config.context:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and {steps} steps are more than the model's "
            f"context of {model.config.context}: give less"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature}: give 0, or more and a key")
    key = jax.random.key(0) if key is None else key
    sharpness = None if temperature == 0 else jnp.float32(1 / temperature)
    stop = jnp.int32(-1 if end is None else end)
    return _generate(model, params, prompt.astype(jnp.int32), steps, sharpness, key, stop)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(
    model: Llama,
    params: Any,
    prompt: Int[Array, "b t"],
    steps: int,
    sharpness: Float[Array, ""] | None,
    key: Key[Array, ""],
    end: Int[Array, ""],
) -> Int[Array, "b steps"]:
    batch, length = prompt.shape

    def choose(logits: Float[Array, "b t vocab"], step: Int[Array, ""]) -> Int[Array, " b"]:
        last = logits[:, -1]
        if sharpness is None:
            return jnp.argmax(last, axis=-1).astype(jnp.int32)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), last * sharpness)
        return drawn.astype(jnp.int32)

    def unfinished(state: Any) -> Array:
        added, step, _ = state
        return (step < steps) & jnp.any(added[:, step - 1] != end)

    def add(state: Any) -> Any:
        added, step, cache = state
        last = added[:, step - 1]
        logits, cache = extend(model, params, cache, last[:, None])
        new = jnp.where(last == end, end, choose(logits, step))
        return added.at[:, step].set(new), step + 1, cache

    cache = empty_cache(model, batch, length + steps)
    logits, cache = extend(model, params, cache, prompt)
    first = choose(logits, jnp.int32(0))
    # Whatever the loop leaves out stands after the end of its sequence.
    added = jnp.full((batch, steps), end).at[:, 0].set(first)
    added, _, _ = jax.lax.while_loop(unfinished, add, (added, jnp.int32(1), cache))
    return added
