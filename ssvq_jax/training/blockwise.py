"""Block-wise fine-tuning: one block after the other learns what the float model has there.

Gradients, the optimizer's state and activations are those of one block. What a plan calls learned
learns (codebooks, scales, signs, dense leaves of the block), by the training step and the optimizer
of whole models. AQLM (arXiv 2401.06118, section 3.4) does this for each block after its encoding,
and so does CRVQ (arXiv 2412.09282). Ours: all blocks are encoded before; a block gets what the
compressed blocks before it put out and learns what the *float* model has behind it, so that it
makes good their errors, too; and every place (token, pixel) counts relative to its own length.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from ssvq_jax.plan import Plan
from ssvq_jax.progress import bar_over
from ssvq_jax.training.block import blocks_of, join
from ssvq_jax.training.objective import INTERMEDIATES, Objective, Teacher, wide
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
        before: mean of ``|y - t|² / |t|²`` over all places of the examples that are trained on, y
            being the compressed block's output and t the float model's.
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
        ValueError: if there is no path, or one has no leaves; if leaves of several blocks are
            encoded together; if outputs are not of the inputs' shape or are not finite; or for
            settings out of range.

    Example:
        >>> import ssvq_jax as ssvq
        >>> params = {f"layers_{i}": {"w": jax.random.normal(jax.random.key(i), (8, 8))}
        ...           for i in range(2)}
        >>> plan = ssvq.make_plan(params, [(".*", ssvq.Vector(codewords=8, dim=2))])
        >>> variables = plan.init(jax.random.key(0), params)
        >>> inputs = jax.random.normal(jax.random.key(1), (32, 8))
        >>> with jax.numpy_dtype_promotion("standard"):
        ...     variables, reports = finetune_blocks(
        ...         lambda params, x: x @ params["w"], plan, variables, params, inputs,
        ...         ["layers_0", "layers_1"], steps=8, optimizer=OptimizerConfig(codebook=0.03),
        ...         batch_size=32)
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
    ours, theirs = np.asarray(hidden), np.asarray(hidden)
    learned, reports = [], []
    for part in bar_over(parts, "blocks") if progress else parts:
        targets = _outputs(output, part.params(params), theirs, batch_size)
        own = part.take(variables)
        train, tx, decode = trainer(part.plan)
        found = _outputs(output, decode(own), ours, batch_size)
        _check(part.name, ours, targets, found)
        before = _mean_error(found, targets, batch_size)
        state = make_state(forward, own, tx, jax.random.key(seed))
        for batch in _batches(np.stack([ours, targets], axis=1), batch_size, steps, seed):
            state, _ = train(state, batch)
        tuned = _outputs(output, decode(state.variables), ours, batch_size)
        after = _mean_error(tuned, targets, batch_size)
        if not np.isfinite(after):
            warnings.warn(
                f"block '{part.name}' is left as it was, since its error is {after} after "
                "fine-tuning: use lower learning rates or a smaller clip_norm",
                stacklevel=2,
            )
        if after < before:
            own, found = state.variables, tuned
        learned.append({name: own[name] for name in ("params", "vq")})
        reports.append(BlockReport(part.name, before, min(before, after)))
        ours, theirs = found, targets
    return join(parts, variables, learned), reports


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
    feature = {"block": {"__call__": (wide(output) * _one_over_length(wide(targets)),)}}
    return jnp.zeros((len(output), 1)), {**model_state, INTERMEDIATES: feature}


def _one_over_length(targets: Array) -> Array:
    square = jnp.sum(jnp.square(targets), axis=-1, keepdims=True)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 1.0)


@jax.jit
def _error(output: Array, targets: Array) -> Float[Array, ""]:
    """Mean of the relative squared errors of all places."""
    output, targets = wide(output), wide(targets)
    return jnp.mean(jnp.sum(jnp.square((output - targets) * _one_over_length(targets)), axis=-1))


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
    order = np.arange(0)
    for i in range(steps):
        if i % epoch == 0:
            order = np.random.default_rng([seed, i // epoch]).permutation(len(pairs))
        first = i % epoch * size
        yield {"image": pairs[order[first : first + size]], "label": labels}


def _outputs(
    output: Callable[..., Array], params: PyTree, inputs: np.ndarray, size: int
) -> np.ndarray:
    """A block's outputs, on the host: not all examples' are on the device at once."""
    return np.concatenate([np.asarray(output(params, x)) for x in _cut(inputs, size)])


def _check(name: str, inputs: np.ndarray, targets: np.ndarray, found: np.ndarray) -> None:
    for who, given in (("", targets), ("compressed ", found)):
        if given.shape != inputs.shape or not np.all(np.isfinite(given)):
            raise ValueError(
                f"the {who}block '{name}' gives shape {list(given.shape)} for inputs of shape "
                f"{list(inputs.shape)}, or numbers that are not finite: give a function of "
                "parameters and inputs whose outputs are the next block's inputs"
            )


def _mean_error(found: np.ndarray, targets: np.ndarray, size: int) -> float:
    parts = zip(_cut(found, size), _cut(targets, size), strict=True)
    return float(np.sum([float(_error(y, t)) * len(y) for y, t in parts]) / len(found))


def _cut(examples: np.ndarray, size: int) -> list[np.ndarray]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]
