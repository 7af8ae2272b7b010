"""How well a language model predicts a text: perplexity over a stream of token windows."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from ssvq_jax.tree import PyTree

LanguageForward = Callable[[PyTree, Array], Array]
"""Parameters and tokens ``[b, t]`` to logits ``[b, t, vocab]`` of the tokens after each."""


class Perplexity(NamedTuple):
    """What an evaluation found.

    Attributes:
        loss: mean cross-entropy of a token given those before it in its window, nats.
        perplexity: its exponential.
        accuracy: share of tokens that had the largest logit.
        tokens: number of predicted tokens, ``t - 1`` a window.
    """

    loss: float
    perplexity: float
    accuracy: float
    tokens: int


class Reading(NamedTuple):
    """What a model made of a text.

    Attributes:
        quality: how well it predicted the tokens.
        first: the token with the largest logit at each place, ``[n, t - 1]`` of n windows.
    """

    quality: Perplexity
    first: Int32[np.ndarray, "n places"]

    def agreement(self, other: "Reading") -> float:
        """Share of places where both models hold the same token for the likeliest.

        Raises:
            ValueError: if these are readings of different windows.
        """
        if self.first.shape != other.first.shape:
            raise ValueError(
                f"readings of {list(self.first.shape)} and {list(other.first.shape)} places: "
                "compare readings of the same windows"
            )
        return float(np.mean(self.first == other.first))


def make_perplexity(
    forward: LanguageForward, *, batch: int = 1
) -> Callable[[PyTree, Iterable[Int32[np.ndarray, " t"]]], Perplexity]:
    """Compiles the evaluation; as `make_reading`, for the quality alone.

    Example:
        >>> uniform = lambda params, tokens: jnp.zeros((*tokens.shape, 8))
        >>> make_perplexity(uniform)({}, [np.array([3, 1, 5], np.int32)])
        Perplexity(loss=2.079..., perplexity=8.0..., accuracy=0.0, tokens=2)
    """
    read = make_reading(forward, batch=batch)

    def evaluate(params: PyTree, windows: Iterable[Int32[np.ndarray, " t"]]) -> Perplexity:
        return read(params, windows).quality

    return evaluate


def make_reading(
    forward: LanguageForward, *, batch: int = 1
) -> Callable[[PyTree, Iterable[Int32[np.ndarray, " t"]]], Reading]:
    """Compiles the evaluation.

    Args:
        forward: the model, called with the first ``t - 1`` tokens of windows.
        batch: windows at a time; memory is that of ``batch * t * vocab`` logits, float32.

    Returns:
        A function of parameters and windows, all of one length. It raises ValueError without
        windows, for windows of different lengths, and for those of less than 2 tokens.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: give at least 1")

    @jax.jit
    def sums(
        params: PyTree, windows: Int[Array, "b t"], mask: Float[Array, " b"]
    ) -> tuple[Float[Array, "2"], Int[Array, "b places"]]:
        logits = forward(params, windows[:, :-1]).astype(jnp.float32)
        targets = windows[:, 1:]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        right = (first == targets).astype(jnp.float32)
        # Filled-up windows may hold NaN, which times 0 would stay.
        totals = jnp.where(mask[:, None] > 0, jnp.stack([loss.sum(1), right.sum(1)]).T, 0.0)
        return totals.sum(axis=0), first

    def read(params: PyTree, windows: Iterable[Int32[np.ndarray, " t"]]) -> Reading:
        loss, right, count, length = 0.0, 0.0, 0, None
        firsts: list[Int32[np.ndarray, "n places"]] = []
        for group in _groups(windows, batch):
            length = length or len(group[0])
            if length < 2 or any(len(window) != length for window in group):
                raise ValueError(
                    f"windows of {sorted({length, *map(len, group)})} tokens: give windows of one "
                    "length, at least 2"
                )
            filled = np.zeros((batch, length), np.int32)
            filled[: len(group)] = np.stack(group)
            mask = np.arange(batch) < len(group)
            found, first = sums(params, jnp.asarray(filled), jnp.asarray(mask, jnp.float32))
            firsts.append(np.asarray(first)[: len(group)])
            loss, right = loss + float(found[0]), right + float(found[1])
            count += len(group) * (length - 1)
        if not count:
            raise ValueError("the evaluation got no windows: the text is shorter than one")
        mean = loss / count
        try:
            perplexity = math.exp(mean)
        except OverflowError:
            perplexity = math.inf
        quality = Perplexity(mean, perplexity, right / count, count)
        return Reading(quality, np.concatenate(firsts))

    return read


def _groups(
    windows: Iterable[Int32[np.ndarray, " t"]], size: int
) -> Iterable[list[Int32[np.ndarray, " t"]]]:
    windows = iter(windows)
    while group := list(itertools.islice(windows, size)):
        yield group
