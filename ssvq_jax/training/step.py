"""One jit-compiled training step and evaluation, for compressed and for float models alike.

A float model is trained by the plan that compresses nothing: there is one code path.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, Key

from ssvq_jax.path_patterns import compile_pattern, matches
from ssvq_jax.plan import Plan
from ssvq_jax.training.average import check_decay, start_average, update_average
from ssvq_jax.training.freezing import freeze_state
from ssvq_jax.training.layout import Layout
from ssvq_jax.training.objective import (
    INTERMEDIATES,
    Objective,
    Outputs,
    Teacher,
    features_of,
)
from ssvq_jax.training.optimizer import updates_made
from ssvq_jax.training.remat import remat_calls
from ssvq_jax.tree import PyTree, Variables, split

Batch = Mapping[str, Any]


@runtime_checkable
class Forward(Protocol):
    """A model as a function.

    Called with parameters, other collections (batch statistics), images and, in training only, a
    key; returns logits ``[b, classes]`` and the collections, updated if a key was given. The images
    of a language model are tokens ``[b, t]``, its logits ``[b, t, vocab]``.
    """

    def __call__(
        self, params: PyTree, model_state: PyTree, images: Array, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b *places classes"], PyTree]:
        """Runs the model."""
        ...


def linen_forward(
    module: nn.Module, *, remat: type[nn.Module] | None = None, features: str | None = None
) -> Forward:
    r"""Wraps a linen module: passes ``train`` where its call takes it, updates its collections.

    Args:
        module: called with images, and with ``train=`` if its signature has that.
        remat: class of the model's blocks, e.g. `ssvq_jax.models.vit.Block`. For the backward pass
            each block then keeps its input and the results of its matrix products, and computes the
            rest again: less memory, more time, the same gradients.
        features: regular expression of the paths of inner modules, e.g. ``blocks_\d+``. Their
            outputs are then in the collection ``intermediates`` that the function returns, for
            `ssvq_jax.training.objective.features_of`. Modules under ``nn.scan`` have none.

    Returns:
        The module as a function.

    Raises:
        ValueError: if ``features`` is no regular expression.
    """
    try:
        compile_pattern(features or "")
    except ValueError as error:
        raise ValueError(f"features: {error}") from None
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def wanted(inner: nn.Module, method: str) -> bool:
        path = "/".join(inner.path)
        return method == "__call__" and path != "" and matches(features or "", path)

    capture = wanted if features else False
    captured = [INTERMEDIATES] if features else []

    def forward(
        params: PyTree, model_state: PyTree, images: Array, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b *places classes"], PyTree]:
        train: dict[str, Any] = {"train": key is not None} if takes_train else {}
        variables = {"params": params, **model_state}
        apply = functools.partial(
            module.apply, variables, images, **train, capture_intermediates=capture
        )
        if key is None:
            logits, found = apply(mutable=captured)
            return jnp.asarray(logits), {**model_state, **found}
        with contextlib.nullcontext() if remat is None else remat_calls(remat):
            return apply(rngs={"dropout": key}, mutable=[*model_state, *captured])

    return forward


class CompressionState(TrainState):
    """Flax's training state (``params`` holds what is learned) and what goes beside it.

    Attributes:
        fixed: the collection ``vq_state``.
        model_state: the model's own collections, e.g. batch statistics; empty if it has none.
        key: typed PRNG key of the run.
        average: moving averages of what is learned and of the model's own collections, if the run
            keeps them; see `ssvq_jax.training.average`.

    Trees of shapes and of shardings take this form too, so that no field is an array by type.
    """

    step: PyTree
    params: PyTree = struct.field(pytree_node=True)  # flax says FrozenDict; any tree will do
    fixed: PyTree
    model_state: PyTree
    key: PyTree
    average: PyTree = None

    @property
    def variables(self) -> dict[str, Any]:
        """The three collections of the plan."""
        return {**self.params, **self.fixed}

    @property
    def averaged(self) -> "CompressionState":
        """The state with its averages in place of what is learned; itself if it keeps none."""
        if self.average is None:
            return self
        params, model_state = self.average.read((self.params, self.model_state))
        return self.replace(params=params, model_state=model_state)


def make_state(
    forward: Forward,
    variables: Variables,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    model_state: PyTree | None = None,
    *,
    average: bool = False,
) -> CompressionState:
    """Begins a run.

    Args:
        forward: the model.
        variables: what `Plan.init` returned.
        tx: the optimizer.
        key: typed PRNG key, for dropout.
        model_state: the model's other collections.
        average: keep moving averages, for a step with an ``average_decay``.

    Returns:
        A state of its own: training donates its buffers, so the arrays given here are copied.
    """
    learned, fixed = jax.tree.map(jnp.copy, split(variables))
    model_state = jax.tree.map(jnp.copy, model_state or {})
    state = CompressionState.create(
        apply_fn=forward,
        params=learned,
        tx=tx,
        fixed=fixed,
        model_state=model_state,
        key=jnp.copy(key),
        average=start_average(learned, model_state) if average else None,
    )
    return state.replace(step=jnp.zeros([], jnp.int32))  # flax begins with a Python number


TrainStep = Callable[[CompressionState, Batch], tuple[CompressionState, dict[str, Array]]]


def make_train_step(
    plan: Plan,
    *,
    layout: Layout | None = None,
    remat: bool = False,
    objective: Objective | None = None,
    teacher: Teacher | None = None,
    average_decay: float = 0.0,
) -> Any:
    """Compiles decode, forward, backward and update into one step.

    Args:
        plan: the plan of the state's variables.
        layout: the devices; None for the default one. The state must come from `Layout.place`, and
            keeps its sharding; batches may be NumPy arrays, whose parts go straight to their
            devices. Sums and batch statistics run over the whole batch.
        remat: decode the weights again for the backward pass instead of keeping them and their
            parts, about 8 bytes a compressed weight. The activations are the model's: see
            `linen_forward`.
        objective: what is minimised; by default the cross-entropy.
        teacher: the model that the objective learns from.
        average_decay: of the state's moving averages, if it keeps them.

    Returns:
        A `TrainStep`: a function of a state, whose buffers it takes over (they are donated), and a
        batch ``{"image": [b, h, w, c], "label": int32 [b]}``, with ``other_label`` and ``share`` if
        its images are mixed; it returns the next state and scalars: loss, accuracy (of mixed images
        the expected one), the parts of the loss where there is a teacher, and with sign latents
        those of `sign_shares`. Without a teacher it is a jitted function
        that can be lowered.

    Raises:
        ValueError: if the objective has numbers out of range, or lacks its teacher; if
            ``average_decay`` is out of range, or the state keeps averages where it is 0, or none
            where it is not (when the step is first called).
    """
    aim = objective or Objective()
    aim.check(teacher)
    check_decay(average_decay)

    def step(
        known: tuple[PyTree, PyTree] | None, state: CompressionState, batch: Batch
    ) -> tuple[CompressionState, dict[str, Array]]:
        if (state.average is None) != (average_decay == 0):
            kept = "no averages" if state.average is None else "averages"
            raise ValueError(
                f"average_decay={average_decay}, and the state keeps {kept}: give make_state "
                f"average={average_decay > 0}"
            )
        key = jax.random.fold_in(state.key, state.step)
        example = None
        if teacher is not None and known is not None:
            logits, collections = teacher.forward(*known, batch["image"], None)
            example = Outputs(logits, features_of(collections))

        def decode(learned: Variables) -> PyTree:
            params = plan.decode({**learned, **state.fixed})
            if layout is None:
                return params
            return jax.lax.with_sharding_constraint(params, layout.replicated)

        def loss_fn(learned: Variables) -> tuple[Array, tuple[Array, PyTree, dict[str, Array]]]:
            params = (jax.checkpoint(decode) if remat else decode)(learned)
            logits, found = state.apply_fn(params, state.model_state, batch["image"], key)
            loss, parts = aim(Outputs(logits, features_of(found)), batch, example)
            model_state = {name: found[name] for name in state.model_state}
            return loss, (logits, model_state, parts)

        (loss, (logits, model_state, parts)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        state = state.apply_gradients(grads=grads).replace(model_state=model_state)
        if state.average is not None:
            frozen = freeze_state(state.opt_state)
            average = update_average(
                state.average,
                state.params,
                model_state,
                {} if frozen is None else frozen.frozen,
                *updates_made(state.opt_state, state.step),
                average_decay,
            )
            state = state.replace(average=average)
        if layout is not None:
            state = jax.lax.with_sharding_constraint(state, layout.state(state))
        scalars = {"loss": loss, "accuracy": _accuracy(logits, batch), **parts}
        return state, {**scalars, **sign_shares(state.opt_state)}

    def alone(state: CompressionState, batch: Batch) -> tuple[CompressionState, dict[str, Array]]:
        return step(None, state, batch)

    if teacher is None:
        if layout is None:
            return jax.jit(alone, donate_argnums=0)
        return jax.jit(alone, donate_argnums=0, in_shardings=(None, layout.batch))
    # Given in every call, since what a function closes over would be compiled into the program.
    known = (teacher.params, teacher.model_state)
    if layout is None:
        return functools.partial(jax.jit(step, donate_argnums=1), known)
    places = (layout.replicated, None, layout.batch)
    known = jax.device_put(known, layout.replicated)
    return functools.partial(jax.jit(step, donate_argnums=1, in_shardings=places), known)


def _accuracy(logits: Float[Array, "b *places classes"], batch: Batch) -> Float[Array, ""]:
    predicted = jnp.argmax(logits, -1)
    right = (predicted == batch["label"]).astype(jnp.float32)
    if "other_label" in batch:
        share = jnp.reshape(batch["share"], (-1,) + (1,) * (right.ndim - 1))
        right = share * right + (1 - share) * (predicted == batch["other_label"])
    return jnp.mean(right)


def sign_shares(opt_state: optax.OptState) -> dict[str, Array]:
    """How the signs are: shares that have ``flipped`` at least once and that are ``frozen``.

    ``oscillation`` is the mean of the signs' averaged oscillation frequencies: the share of signs
    that went back on their last flip, an update.

    Args:
        opt_state: state of an optimizer that has `freeze_signs` at most once, however nested.

    Returns:
        The three scalars; empty without `freeze_signs` or sign latents.
    """
    found = freeze_state(opt_state)
    if found is None or not found.frozen:
        return {}
    total = sum(mask.size for mask in found.frozen.values())
    flipped = sum(jnp.sum(f >= 0) for f in found.frequency.values())
    frozen = sum(jnp.sum(mask) for mask in found.frozen.values())
    oscillation = sum(jnp.sum(jnp.maximum(f, 0.0)) for f in found.frequency.values())
    sums = {"flipped": flipped, "frozen": frozen, "oscillation": oscillation}
    return {name: jnp.asarray(value) / total for name, value in sums.items()}
