"""Progressive freezing of signs, as one optax transformation round the whole optimizer.

A sign flip moves its weight by twice the codeword, so signs that sit near zero oscillate. Each
sign's oscillation frequency is averaged over the updates; every so often, those above a threshold
are frozen for good at the sign that the majority of the observed updates had.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ssvq_jax.quantizers.base import check_integer
from ssvq_jax.tree import fill, leaf_path, leaves_by_path, punch

Number = float | Float[Array, ""]
FreezeTo = Literal["vote", "average", "current"]
LATENT = "sign_latent"
_NEVER_FLIPPED = -1.0


class FreezeState(NamedTuple):
    """State of `freeze_signs`. Dictionaries hold an array of each sign latent's shape, by path.

    Attributes:
        step: updates made.
        frequency: float32 average of the oscillations; -1 before the first flip.
        opinion: what decides a frozen sign: int32 votes (positive minus negative observations) for
            "vote", float32 average of the signs for "average", nothing for "current".
        frozen: the freeze mask.
        inner: state of the inner transformation.
    """

    step: Int[Array, ""]
    frequency: dict[str, Float[Array, "..."]]
    opinion: dict[str, Int[Array, "..."] | Float[Array, "..."]]
    frozen: dict[str, Bool[Array, "..."]]
    inner: optax.OptState


def freeze_signs(
    inner: optax.GradientTransformation,
    *,
    every: int,
    threshold: Number | optax.Schedule,
    momentum: Number = 0.01,
    warmup: int = 0,
    freeze_to: FreezeTo = "vote",
    vote_window: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Freezes oscillating signs progressively; leaves other than ``sign_latent`` are untouched.

    Per update t and sign: o = 1 if the sign flips and has flipped before (of a binary variable,
    every flip after the first goes back on the last one), else 0; f <- m*o + (1 - m)*f. When t is
    a multiple of ``every`` and later than ``warmup``, signs with f > threshold(t) are frozen: their
    update is exactly 0 or -2p, so the latent's sign is the one decided on in any float type (a
    latent of zero gets a tiny value of that sign). From then on their gradients are zeroed before
    the inner transformation sees them, so that they weigh in no norm, and their updates are zero.

    Put gradient accumulation (``optax.MultiSteps``) outside, so that ``every`` counts real updates.
    The state takes 9 bytes a latent weight on top of the inner one's (5 for "current").

    Source: arXiv 2503.08668 (interval, decaying threshold, majority vote); the frequency of Nagel
    et al., "Overcoming oscillations in quantization-aware training", arXiv 2203.11086, equations
    4-5. Momentum and warm-up are not published for SSVQ; the defaults are ours.

    Args:
        inner: the whole optimizer, gradient clipping included.
        every: updates between two freezing steps.
        threshold: frequency above which signs freeze; a number or a schedule over updates.
            ``optax.inject_hyperparams`` may set it, and ``momentum``; whole numbers are static:
            ``static_args=("every", "warmup", "vote_window")``.
        momentum: m, the weight of a new observation.
        warmup: number of first updates at which nothing freezes; observation runs from the start.
        freeze_to: the sign at which to freeze: the majority "vote" of the signs after each update
            (a draw keeps the present sign), the sign of their "average" with momentum m, or the
            "current" one; the latter two are the paper's ablations.
        vote_window: let only so many updates before each freezing step vote, at most ``every``;
            None lets all updates since the start vote.

    Returns:
        A gradient transformation; its ``update`` needs ``params``.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> tx = freeze_signs(optax.sgd(1.0), every=1, threshold=0.05, momentum=0.1)
        >>> params = {"w": {"sign_latent": jnp.array([0.5, 0.5])}}
        >>> state = tx.init(params)
        >>> for step in range(4):  # the first sign goes back and forth, the second stays
        ...     grads = {"w": {"sign_latent": jnp.array([1.0, 0.0]) * (-1.0) ** step}}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> state.frozen["w/sign_latent"].tolist()
        [True, False]
    """
    _check(every, threshold, momentum, warmup, freeze_to, vote_window)
    inner = optax.with_extra_args_support(inner)
    schedule: Callable[[Any], Any] = threshold if callable(threshold) else lambda _: threshold

    def init(params: optax.Params) -> FreezeState:
        latents = _latents(params)
        return FreezeState(
            step=jnp.zeros([], jnp.int32),
            frequency={
                p: jnp.full(x.shape, _NEVER_FLIPPED, jnp.float32) for p, x in latents.items()
            },
            opinion={
                p: jnp.zeros(x.shape, jnp.int32) if freeze_to == "vote" else _sign(x)
                for p, x in latents.items()
                if freeze_to != "current"
            },
            frozen={p: jnp.zeros(x.shape, bool) for p, x in latents.items()},
            inner=inner.init(params),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, FreezeState]:
        if params is None:
            raise ValueError("freeze_signs needs params: call update(grads, state, params)")
        latents, frozen = _latents(params), state.frozen
        updates, inner_state = inner.update(_zero(updates, frozen), state.inner, params, **extra)
        moves = _latents(_zero(updates, frozen))
        moved = {path: _apply(latent, moves[path]) for path, latent in latents.items()}

        step = jnp.asarray(optax.safe_increment(state.step))
        frequency, opinion = {}, {}
        # Only the updates just before a freezing step vote, if there is a window.
        in_window = vote_window is None or (-step) % every < vote_window
        for path, latent in latents.items():
            frequency[path] = _observe(state.frequency[path], latent, moved[path], momentum)
            if freeze_to == "vote":
                vote = jnp.where(moved[path] < 0, -1, 1)
                opinion[path] = state.opinion[path] + jnp.where(in_window, vote, 0)
            elif freeze_to == "average":
                last = state.opinion[path]
                opinion[path] = momentum * _sign(moved[path]) + (1 - momentum) * last

        def freeze(args: tuple[Any, Any]) -> tuple[Any, Any]:
            moves, frozen = args
            limit = schedule(step)
            new_moves, new_frozen = {}, {}
            for path, latent in latents.items():
                negative = _decide(opinion.get(path), latent, moved[path])
                new = (frequency[path] > limit) & ~frozen[path]
                settle = _settle(latent, negative).astype(moves[path].dtype)
                new_moves[path] = jnp.where(new, settle, moves[path])
                new_frozen[path] = frozen[path] | new
            return new_moves, new_frozen

        due = (step % every == 0) & (step > warmup)
        moves, frozen = jax.lax.cond(due, freeze, lambda args: args, (moves, frozen))
        if vote_window is not None:  # a window begins after every interval, in the warm-up too
            over = step % every == 0
            opinion = {path: jnp.where(over, 0, votes) for path, votes in opinion.items()}
        updates = fill(punch(updates, moves), moves)
        return updates, FreezeState(step, frequency, opinion, frozen, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def cosine_threshold(start: Number, end: Number, steps: int) -> optax.Schedule:
    """Threshold that decays from ``start`` to ``end`` with a half cosine over ``steps`` updates.

    Source: arXiv 2503.08668; arXiv 2203.11086, section 4.3.

    Raises:
        ValueError: unless 0 <= end <= start and start > 0.

    Example:
        >>> threshold = cosine_threshold(start=0.1, end=0.02, steps=100)
        >>> [round(float(threshold(t)), 3) for t in (0, 50, 100, 200)]
        [0.1, 0.06, 0.02, 0.02]
    """
    known = not isinstance(start, Tracer) and not isinstance(end, Tracer)
    if known and (not 0 <= end <= start or start <= 0):
        raise ValueError(f"threshold from start={start} to end={end}: it must fall, and start > 0")
    check_integer("steps", steps, least=1)
    return optax.cosine_decay_schedule(start, steps, alpha=end / start)


def freeze_state(opt_state: optax.OptState) -> FreezeState | None:
    """Finds the state of `freeze_signs` in that of an optimizer.

    Args:
        opt_state: has it at most once, however nested.

    Returns:
        It, or None.

    Example:
        >>> tx = freeze_signs(optax.adam(1e-3), every=10, threshold=0.1)
        >>> found = freeze_state((tx.init({"w": {"sign_latent": jnp.ones(2)}}), None))
        >>> found.frozen
        {'w/sign_latent': Array([False, False], dtype=bool)}
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, FreezeState))
    return next((node for node in nodes if isinstance(node, FreezeState)), None)


def _check(
    every: int,
    threshold: Number | optax.Schedule,
    momentum: Number,
    warmup: int,
    freeze_to: str,
    vote_window: int | None,
) -> None:
    check_integer("every", every, least=1)
    check_integer("warmup", warmup, least=0)
    # optax.inject_hyperparams and vmap give numbers that are not known here.
    if not callable(threshold) and not isinstance(threshold, Tracer) and not threshold >= 0:
        raise ValueError(f"threshold={threshold}: a frequency is at least 0")
    if not isinstance(momentum, Tracer) and not 0 < momentum <= 1:
        raise ValueError(f"momentum={momentum}: it must be above 0 and at most 1")
    if freeze_to not in get_args(FreezeTo):
        raise ValueError(f"freeze_to={freeze_to!r}: choose one of {get_args(FreezeTo)}")
    if vote_window is not None and (freeze_to != "vote" or not 1 <= vote_window <= every):
        raise ValueError(
            f"vote_window={vote_window}: it needs freeze_to='vote' and 1 to every={every} updates"
        )


def _is_latent(path: str) -> bool:
    return path.rsplit("/", 1)[-1] == LATENT


def _latents(tree: Any) -> dict[str, Array]:
    return {path: leaf for path, leaf in leaves_by_path(tree).items() if _is_latent(path)}


def _zero(tree: Any, frozen: dict[str, Bool[Array, "..."]]) -> Any:
    """Zeroes the frozen entries of gradients or updates."""

    def zero(key_path: Any, leaf: Array) -> Array:
        mask = frozen.get(leaf_path(key_path))
        return leaf if mask is None else jnp.where(mask, jnp.zeros_like(leaf), leaf)

    return jax.tree_util.tree_map_with_path(zero, tree)


def _apply(latent: Float[Array, "*s"], move: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The latent after the update, rounded as it will be."""
    return jnp.asarray(optax.apply_updates(latent, move))


def _sign(latent: Float[Array, "..."]) -> Float[Array, "..."]:
    """+1 or -1 in float32; zero is positive."""
    return jnp.where(latent < 0, -1.0, 1.0).astype(jnp.float32)


def _observe(
    frequency: Float[Array, "*s"], before: Float[Array, "*s"], after: Float[Array, "*s"], m: Number
) -> Float[Array, "*s"]:
    """F <- m*o + (1 - m)*f; the first flip only starts the average, at 0."""
    flips = (before < 0) != (after < 0)
    average = m * flips.astype(frequency.dtype) + (1 - m) * frequency
    return jnp.where(frequency < 0, jnp.where(flips, 0.0, _NEVER_FLIPPED), average)


def _decide(
    opinion: Array | None, latent: Float[Array, "*s"], moved: Float[Array, "*s"]
) -> Bool[Array, "*s"]:
    """Whether each sign freezes negative."""
    if opinion is None:
        return moved < 0
    return jnp.where(opinion == 0, latent < 0, opinion < 0)


def _settle(latent: Float[Array, "*s"], negative: Bool[Array, "*s"]) -> Float[Array, "*s"]:
    """The update that gives a latent its frozen sign: 0, -2p, or a tiny value where p = 0."""
    tiny = jnp.asarray(jnp.finfo(latent.dtype).tiny, latent.dtype)
    from_zero = jnp.where(negative, -tiny, tiny)
    return jnp.where(
        latent == 0,
        from_zero,
        jnp.where((latent < 0) == negative, jnp.zeros_like(latent), -2 * latent),
    )
