"""One jit-compiled training step and evaluation, for compressed and for float models alike.

A float model is trained by the plan that compresses nothing: there is one code path.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, Key

from ssvq_jax.plan import Plan
from ssvq_jax.training.freezing import FreezeState
from ssvq_jax.tree import PyTree, Variables, split

Batch = Mapping[str, Any]


@runtime_checkable
class Forward(Protocol):
    """A model as a function.

    Called with parameters, other collections (batch statistics), images and, in training only, a
    key; returns logits ``[b, classes]`` and the collections, updated if a key was given.
    """

    def __call__(
        self, params: PyTree, model_state: PyTree, images: Array, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b classes"], PyTree]:
        """Runs the model."""
        ...


def linen_forward(module: nn.Module) -> Forward:
    """Wraps a linen module: passes ``train`` where its call takes it, updates its collections.

    Args:
        module: called with images, and with ``train=`` if its signature has that.

    Returns:
        The module as a function.
    """
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def forward(
        params: PyTree, model_state: PyTree, images: Array, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b classes"], PyTree]:
        train: dict[str, Any] = {"train": key is not None} if takes_train else {}
        variables = {"params": params, **model_state}
        if key is None:
            return jnp.asarray(module.apply(variables, images, **train)), model_state
        logits, updated = module.apply(
            variables, images, **train, rngs={"dropout": key}, mutable=list(model_state)
        )
        return logits, updated

    return forward


class CompressionState(TrainState):
    """Flax's training state (``params`` holds what is learned) and what goes beside it.

    Attributes:
        fixed: the collection ``vq_state``.
        model_state: the model's own collections, e.g. batch statistics; empty if it has none.
        key: typed PRNG key of the run.
    """

    params: PyTree = struct.field(pytree_node=True)  # flax says FrozenDict; any tree will do
    fixed: PyTree
    model_state: PyTree
    key: Key[Array, ""]

    @property
    def variables(self) -> dict[str, Any]:
        """The three collections of the plan."""
        return {**self.params, **self.fixed}


def make_state(
    forward: Forward,
    variables: Variables,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    model_state: PyTree | None = None,
) -> CompressionState:
    """Begins a run.

    Args:
        forward: the model.
        variables: what `Plan.init` returned.
        tx: the optimizer.
        key: typed PRNG key, for dropout.
        model_state: the model's other collections.

    Returns:
        A state of its own: training donates its buffers, so the arrays given here are copied.
    """
    learned, fixed = jax.tree.map(jnp.copy, split(variables))
    return CompressionState.create(
        apply_fn=forward,
        params=learned,
        tx=tx,
        fixed=fixed,
        model_state=jax.tree.map(jnp.copy, model_state or {}),
        key=jnp.copy(key),
    )


TrainStep = Callable[[CompressionState, Batch], tuple[CompressionState, dict[str, Array]]]


def make_train_step(plan: Plan) -> TrainStep:
    """Compiles decode, forward, backward and update into one step.

    Args:
        plan: the plan of the state's variables.

    Returns:
        A function of a state, whose buffers it takes over (they are donated), and a batch
        ``{"image": [b, h, w, c], "label": int32 [b]}``; it returns the next state and scalars:
        loss, accuracy, and with sign latents the shares ``flipped`` (at least once) and ``frozen``.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: CompressionState, batch: Batch) -> tuple[CompressionState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)

        def loss_fn(learned: Variables) -> tuple[Array, tuple[Array, PyTree]]:
            params = plan.decode({**learned, **state.fixed})
            logits, model_state = state.apply_fn(params, state.model_state, batch["image"], key)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.mean(losses), (logits, model_state)

        (loss, (logits, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        state = state.apply_gradients(grads=grads).replace(model_state=model_state)
        accuracy = jnp.mean((jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32))
        return state, {"loss": loss, "accuracy": accuracy, **sign_shares(state.opt_state)}

    return step


def sign_shares(opt_state: optax.OptState) -> dict[str, Array]:
    """Shares of signs that have ``flipped`` at least once, and that are ``frozen``."""
    if not isinstance(opt_state, FreezeState) or not opt_state.frozen:
        return {}
    total = sum(mask.size for mask in opt_state.frozen.values())
    flipped = sum(jnp.sum(f >= 0) for f in opt_state.frequency.values())
    frozen = sum(jnp.sum(mask) for mask in opt_state.frozen.values())
    return {"flipped": jnp.asarray(flipped) / total, "frozen": jnp.asarray(frozen) / total}


class Evaluation(NamedTuple):
    """Quality on a data set.

    Attributes:
        accuracy: share of examples whose largest logit is the label's.
        standard_error: of that share, sqrt(p(1 - p)/n).
        loss: mean cross-entropy, nats.
        examples: n.
    """

    accuracy: float
    standard_error: float
    loss: float
    examples: int


def make_evaluate(forward: Forward) -> Callable[[PyTree, PyTree, Iterable[Batch]], Evaluation]:
    """Compiles evaluation.

    Args:
        forward: the model.

    Returns:
        A function of parameters, model state and batches with a ``mask`` ``[b]`` that is 0 for
        padded examples.
    """

    @jax.jit
    def sums(params: PyTree, model_state: PyTree, batch: Batch) -> Float[Array, "3"]:
        logits, _ = forward(params, model_state, batch["image"], None)
        right = jnp.argmax(logits, -1) == batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        mask = jnp.asarray(batch["mask"], jnp.float32)
        return jnp.stack([jnp.sum(mask, where=right), jnp.sum(mask * loss), jnp.sum(mask)])

    def evaluate(params: PyTree, model_state: PyTree, batches: Iterable[Batch]) -> Evaluation:
        totals = sum((jnp.asarray(sums(params, model_state, b)) for b in batches), jnp.zeros(3))
        right, loss, count = (float(x) for x in totals)
        if not count:
            raise ValueError("evaluation got no examples: the data split is empty")
        accuracy = right / count
        error = (accuracy * (1 - accuracy) / count) ** 0.5
        return Evaluation(accuracy, error, loss / count, int(count))

    return evaluate
