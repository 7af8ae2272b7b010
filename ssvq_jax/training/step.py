"""One jit-compiled training step and evaluation, for compressed and for float models alike.

A float model is trained by the plan that compresses nothing: there is one code path.
"""

import contextlib
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
from ssvq_jax.training.layout import Layout
from ssvq_jax.training.remat import remat_calls
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


def linen_forward(module: nn.Module, *, remat: type[nn.Module] | None = None) -> Forward:
    """Wraps a linen module: passes ``train`` where its call takes it, updates its collections.

    Args:
        module: called with images, and with ``train=`` if its signature has that.
        remat: class of the model's blocks, e.g. `ssvq_jax.models.vit.Block`. For the backward pass
            each block then keeps its input and the results of its matrix products, and computes the
            rest again: less memory, more time, the same gradients.

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
        rngs, mutable = {"dropout": key}, list(model_state)
        with contextlib.nullcontext() if remat is None else remat_calls(remat):
            return module.apply(variables, images, **train, rngs=rngs, mutable=mutable)

    return forward


class CompressionState(TrainState):
    """Flax's training state (``params`` holds what is learned) and what goes beside it.

    Attributes:
        fixed: the collection ``vq_state``.
        model_state: the model's own collections, e.g. batch statistics; empty if it has none.
        key: typed PRNG key of the run.

    Trees of shapes and of shardings take this form too, so that no field is an array by type.
    """

    step: PyTree
    params: PyTree = struct.field(pytree_node=True)  # flax says FrozenDict; any tree will do
    fixed: PyTree
    model_state: PyTree
    key: PyTree

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
    state = CompressionState.create(
        apply_fn=forward,
        params=learned,
        tx=tx,
        fixed=fixed,
        model_state=jax.tree.map(jnp.copy, model_state or {}),
        key=jnp.copy(key),
    )
    return state.replace(step=jnp.zeros([], jnp.int32))  # flax begins with a Python number


TrainStep = Callable[[CompressionState, Batch], tuple[CompressionState, dict[str, Array]]]


def make_train_step(
    plan: Plan, *, layout: Layout | None = None, remat: bool = False
) -> jax.stages.Wrapped:
    """Compiles decode, forward, backward and update into one step.

    Args:
        plan: the plan of the state's variables.
        layout: the devices; None for the default one. The state must come from `Layout.place`, and
            keeps its sharding; batches may be NumPy arrays, whose parts go straight to their
            devices. Sums and batch statistics run over the whole batch.
        remat: decode the weights again for the backward pass instead of keeping them and their
            parts, about 8 bytes a compressed weight. The activations are the model's: see
            `linen_forward`.

    Returns:
        A jitted `TrainStep`: a function of a state, whose buffers it takes over (they are donated),
        and a batch ``{"image": [b, h, w, c], "label": int32 [b]}``; it returns the next state and
        scalars: loss, accuracy, and with sign latents the shares ``flipped`` (at least once) and
        ``frozen``.
    """

    def step(state: CompressionState, batch: Batch) -> tuple[CompressionState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)

        def decode(learned: Variables) -> PyTree:
            params = plan.decode({**learned, **state.fixed})
            if layout is None:
                return params
            return jax.lax.with_sharding_constraint(params, layout.replicated)

        def loss_fn(learned: Variables) -> tuple[Array, tuple[Array, PyTree]]:
            params = (jax.checkpoint(decode) if remat else decode)(learned)
            logits, model_state = state.apply_fn(params, state.model_state, batch["image"], key)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.mean(losses), (logits, model_state)

        (loss, (logits, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        state = state.apply_gradients(grads=grads).replace(model_state=model_state)
        if layout is not None:
            state = jax.lax.with_sharding_constraint(state, layout.state(state))
        accuracy = jnp.mean((jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32))
        return state, {"loss": loss, "accuracy": accuracy, **sign_shares(state.opt_state)}

    if layout is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, in_shardings=(None, layout.batch))


def sign_shares(opt_state: optax.OptState) -> dict[str, Array]:
    """Shares of signs that have ``flipped`` at least once, and that are ``frozen``.

    Args:
        opt_state: state of an optimizer that has `freeze_signs` at most once, however nested.

    Returns:
        The two scalars; empty without `freeze_signs` or sign latents.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, FreezeState))
    for node in nodes:
        if isinstance(node, FreezeState) and node.frozen:
            total = sum(mask.size for mask in node.frozen.values())
            flipped = sum(jnp.sum(f >= 0) for f in node.frequency.values())
            frozen = sum(jnp.sum(mask) for mask in node.frozen.values())
            return {"flipped": jnp.asarray(flipped) / total, "frozen": jnp.asarray(frozen) / total}
    return {}


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
