"""Block-wise fine-tuning: one block after the other learns what the float model has there.

Only one block is trained at a time, so that memory and time are those of a block. Codes stay, and
codebooks, scales, signs and dense leaves of the block learn, by the training step and the optimizer
of whole models. AQLM (arXiv 2401.06118, section 3.4) and CRVQ (arXiv 2412.09282) do this between
encoding and end-to-end fine-tuning. A block is given what the compressed blocks before it put out,
and learns what the *float* model has behind it, so that it makes good their errors, too.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from ssvq_jax.plan import Plan
from ssvq_jax.progress import bar_over
from ssvq_jax.training.block import blocks_of
from ssvq_jax.training.objective import INTERMEDIATES, Objective, Teacher
from ssvq_jax.training.optimizer import OptimizerConfig, make_optimizer
from ssvq_jax.training.step import Forward, TrainStep, make_state, make_train_step
from ssvq_jax.tree import PyTree, Variables

BlockFunction = Callable[[PyTree, Float[Array, "b *places c"]], Float[Array, "b *places c"]]
_TEACHER = Objective(distill=1.0, feature_weight=1.0)  # there are no labels


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """What fine-tuning did to a block.

    Attributes:
        path: of the block, ``layers_3``, or of the stack with its place there, ``layers[3]``.
        before: mean of ``|y - t|² / |t|²`` over all places, y being the compressed block's output
            and t the float model's.
        after: the same after fine-tuning; not above ``before``.
    """

    path: str
    before: float
    after: float


def finetune_blocks(
    block: BlockFunction,
    plan: Plan,
    variables: Variables,
    params: PyTree,
    hidden: Float[Array, "n *places c"],
    paths: str | Sequence[str],
    *,
    steps: int,
    optimizer: OptimizerConfig,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], list[BlockReport]]:
    """Fine-tunes what is learned in a model's blocks, one block after the other.

    What is minimised is the mean of ``|y - t|² / |t|²`` over all places (tokens, pixels): the norm
    that follows sees each place by itself, and without this some large ones would be all that
    counts. A block that did not get better is left as it was.

    Args:
        block: computes a block's outputs from its own parameters and its inputs; blocks follow one
            another, and their outputs have the shape of their inputs.
        plan: of the whole model.
        variables: its encoding, from `Plan.init`.
        params: the float parameters, nested mappings.
        hidden: inputs of the first block, ``n`` examples.
        paths: the blocks' places in the parameters, in their order: ``["layers_0", "layers_1"]``;
            or the place of blocks that are stacked on the leading axis of each leaf: ``"layers"``.
        steps: batches that each block is trained on.
        optimizer: learning rates; schedules and freezing are those of each block.
        batch_size: examples a batch.
        seed: of their order.
        progress: show a progress bar over the blocks.

    Returns:
        The variables, and a report a block.

    Raises:
        ValueError: if a path is no block of the plan, or holds nothing that is compressed; if
            leaves of several blocks are encoded together; if outputs are not of the inputs' shape
            or are not finite; or for settings out of range.

    Example:
        >>> import ssvq_jax as ssvq
        >>> params = {f"layers_{i}": {"w": jax.random.normal(jax.random.key(i), (8, 8))}
        ...           for i in range(2)}
        >>> plan = ssvq.make_plan(params, [(".*", ssvq.Vector(codewords=8, dim=2))])
        >>> variables = plan.init(jax.random.key(0), params)
        >>> inputs = jax.random.normal(jax.random.key(1), (32, 8))
        >>> variables, reports = finetune_blocks(
        ...     lambda params, x: x @ params["w"], plan, variables, params, inputs,
        ...     ["layers_0", "layers_1"], steps=8, optimizer=OptimizerConfig(codebook=0.03),
        ...     batch_size=32)
        >>> all(report.after < report.before for report in reports)
        True
    """
    if steps < 1 or not 1 <= batch_size <= len(hidden):
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}: give at least 1 step, and batches of 1 to "
            f"{len(hidden)} examples, which there are"
        )
    parts = blocks_of(plan, params, paths)
    forward = _forward(block)
    trainer = functools.cache(functools.partial(_trainer, steps, optimizer))
    output = jax.jit(block)
    error = jax.jit(lambda params, x: _error(block(params, x[:, 0]), x[:, 1]))
    ours, theirs, reports = hidden, hidden, []
    for part in bar_over(parts, "blocks") if progress else parts:
        targets = _outputs(output, part.params(params), theirs, batch_size, part.name)
        pairs = np.stack([ours, targets], axis=1)
        own = part.take(variables)
        train, tx, decode = trainer(part.plan)
        before = _mean_error(error, decode(own), pairs, batch_size)
        state = make_state(forward, own, tx, jax.random.key(seed))
        for batch in _batches(pairs, batch_size, steps, seed):
            state, _ = train(state, batch)
        after = _mean_error(error, decode(state.variables), pairs, batch_size)
        if not np.isfinite(after):
            raise ValueError(
                f"block '{part.name}': its error is {after} after fine-tuning: use lower learning "
                "rates or a smaller clip_norm"
            )
        if after < before:
            own = state.variables
            variables = part.put(variables, own)
        reports.append(BlockReport(part.name, before, min(before, after)))
        ours, theirs = _outputs(output, decode(own), ours, batch_size, part.name), targets
    return {name: variables[name] for name in ("params", "vq", "vq_state")}, reports


def _forward(block: BlockFunction) -> Forward:
    """The block as a model without classes; its images are inputs and targets, ``[b, 2, ...]``."""

    def forward(
        params: PyTree, model_state: PyTree, images: Array, key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "b *places classes"], PyTree]:
        del key
        return _told(block(params, images[:, 0]), images[:, 1], model_state)

    return forward


def _targets(
    params: PyTree, model_state: PyTree, images: Array, key: Key[Array, ""] | None
) -> tuple[Float[Array, "b *places classes"], PyTree]:
    """The float model: its outputs are known."""
    del params, key
    return _told(images[:, 1], images[:, 1], model_state)


def _told(output: Array, targets: Array, model_state: PyTree) -> tuple[Array, PyTree]:
    """An output relative to the targets' length at each place, as a feature; and no logits."""
    feature = {"block": {"__call__": (output * _one_over_length(targets),)}}
    return jnp.zeros((len(output), 1)), {**model_state, INTERMEDIATES: feature}


def _one_over_length(targets: Array) -> Array:
    square = jnp.sum(jnp.square(targets), axis=-1, keepdims=True)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 1.0)


def _error(output: Array, targets: Array) -> Float[Array, " b"]:
    """Mean of the relative squared errors of an example's places."""
    error = jnp.sum(jnp.square((output - targets) * _one_over_length(targets)), axis=-1)
    return jnp.mean(error.reshape(len(error), -1), axis=1)


class _Trainer(NamedTuple):
    """What blocks of one plan share, so that it is compiled once."""

    step: TrainStep
    tx: optax.GradientTransformation
    decode: Callable[[Variables], PyTree]


def _trainer(steps: int, config: OptimizerConfig, plan: Plan) -> _Trainer:
    step = make_train_step(plan, objective=_TEACHER, teacher=Teacher(_targets, {}, {}))
    return _Trainer(step, make_optimizer(plan, steps, config), jax.jit(plan.decode))


def _batches(pairs: np.ndarray, size: int, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """So many batches of shuffled examples; each epoch is a new permutation."""
    labels, epoch = np.zeros(size, np.int32), len(pairs) // size
    for i in range(steps):
        order = np.random.default_rng([seed, i // epoch]).permutation(len(pairs))
        first = i % epoch * size
        yield {"image": pairs[order[first : first + size]], "label": labels}


def _outputs(
    output: Callable[..., Array], params: PyTree, inputs: Any, size: int, name: str
) -> np.ndarray:
    """A block's outputs, on the host: not all examples' are on the device at once."""
    found = np.concatenate(
        [np.asarray(output(params, x)) for x in _cut(np.asarray(inputs), size)], axis=0
    )
    if found.shape != inputs.shape or not np.all(np.isfinite(found)):
        raise ValueError(
            f"block '{name}' gives {found.dtype}{list(found.shape)} for inputs of shape "
            f"{list(inputs.shape)}, or numbers that are not finite: give a function of parameters "
            "and inputs whose outputs are the next block's inputs"
        )
    return found


def _mean_error(error: Callable[..., Array], params: PyTree, pairs: np.ndarray, size: int) -> float:
    return float(np.mean(np.concatenate([error(params, x) for x in _cut(pairs, size)])))


def _cut(examples: np.ndarray, size: int) -> list[np.ndarray]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]
