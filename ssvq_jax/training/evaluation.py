"""How good a model is on a data set."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ssvq_jax.training.layout import Layout
from ssvq_jax.training.step import Batch, Forward
from ssvq_jax.tree import PyTree


class Evaluation(NamedTuple):
    """Quality on a data set.

    Attributes:
        accuracy: share of examples whose largest logit is the label's.
        standard_error: of that share, sqrt(p(1 - p)/n).
        loss: mean cross-entropy, nats.
        examples: n; of a language model, the tokens.
    """

    accuracy: float
    standard_error: float
    loss: float
    examples: int


def make_evaluate(
    forward: Forward, layout: Layout | None = None
) -> Callable[[PyTree, PyTree, Iterable[Batch]], Evaluation]:
    """Compiles evaluation.

    Args:
        forward: the model.
        layout: the devices, over which batches are cut; None for the default one.

    Returns:
        A function of parameters, model state and batches with a ``mask`` ``[b]`` that is 0 for
        padded examples. It raises ValueError without examples, or for batches that the devices do
        not divide.
    """

    def sums(params: PyTree, model_state: PyTree, batch: Batch) -> Float[Array, "3"]:
        logits, _ = forward(params, model_state, batch["image"], None)
        right = jnp.argmax(logits, -1) == batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        mask = jnp.asarray(batch["mask"], jnp.float32)
        mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (right.ndim - 1)), right.shape)
        return jnp.stack([jnp.sum(mask, where=right), jnp.sum(mask * loss), jnp.sum(mask)])

    if layout is None:
        compiled = jax.jit(sums)
    else:
        compiled = jax.jit(sums, in_shardings=(layout.replicated, layout.replicated, layout.batch))

    def evaluate(params: PyTree, model_state: PyTree, batches: Iterable[Batch]) -> Evaluation:
        if layout is not None:
            params, model_state = jax.device_put((params, model_state), layout.replicated)
        totals = jnp.zeros(3)
        for batch in batches:
            if layout is not None:
                layout.check_batch(len(batch["label"]))
            totals = totals + jnp.asarray(compiled(params, model_state, batch))
        right, loss, count = (float(x) for x in totals)
        if not count:
            raise ValueError("evaluation got no examples: the data split is empty")
        accuracy = right / count
        error = (accuracy * (1 - accuracy) / count) ** 0.5
        return Evaluation(accuracy, error, loss / count, int(count))

    return evaluate
