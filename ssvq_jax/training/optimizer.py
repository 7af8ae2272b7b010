"""The optimizer of a fine-tuning run: a learning rate a group, clipping, sign freezing."""

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from ssvq_jax.plan import Plan
from ssvq_jax.quantizers.base import check_integer
from ssvq_jax.training.freezing import FreezeTo, cosine_threshold, freeze_signs

MomentDtype = Literal["float32", "bfloat16"]
Rule = Literal["adamw", "sgd"]
_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class FreezeConfig:
    """Sign freezing, in shares of the run so that it fits runs of any length.

    Attributes:
        every: updates between two freezing steps.
        start: frequency threshold at the first update.
        end: frequency threshold at the last update; it falls with a half cosine.
        momentum: weight of a new observation in the frequency average.
        warmup_share: share of the run in which nothing freezes.
        freeze_to: "vote", "average" or "current"; see `freeze_signs`.
        vote_window: updates before a freezing step that vote; None for all.
    """

    every: int = 50
    start: float = 0.1
    end: float = 0.02
    momentum: float = 0.01
    warmup_share: float = 0.25
    freeze_to: FreezeTo = "vote"
    vote_window: int | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """A learning rate a group, cosine decay, and clipping of the global norm.

    Codebooks, signs, scales and steps always have Adam.

    Attributes:
        rule: of dense leaves and latent weights: AdamW, or SGD with Nesterov's momentum, whose
            weight decay is added to the gradient (arXiv 1711.05101 compares the two).
        dense: learning rate of uncompressed leaves.
        codebook: learning rate of codebooks.
        sign: learning rate of sign latents; relative to the weights' scale it sets how many flip.
        scale: learning rate of scales and steps, relative to each of them.
        latent: learning rate of the float weights behind uniform quantization.
        weight_decay: of dense leaves and latent weights; codebooks and signs have none.
        warmup_share: share of the run in which rates rise linearly.
        clip_norm: largest global gradient norm; None clips nothing.
        freeze: sign freezing, or None to let all signs flip to the end.
        accumulate: batches whose mean gradient makes one update; takes 4 more bytes a parameter.
            Batch statistics still move with every batch.
        momentum: of SGD.
        moment_dtype: of Adam's first moment and SGD's momentum, averages that change by a tenth in
            every update, more than bfloat16's rounding (a 256th). The second moment is always
            float32: it changes by a thousandth, so in bfloat16 it stays where its largest gradient
            put it.
    """

    rule: Rule = "adamw"
    dense: float = 1e-4
    codebook: float = 1e-3
    sign: float = 1e-3
    scale: float = 1e-3
    latent: float = 1e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    clip_norm: float | None = 1.0
    freeze: FreezeConfig | None = dataclasses.field(default_factory=FreezeConfig)
    accumulate: int = 1
    momentum: float = _MOMENTUM
    moment_dtype: MomentDtype = "float32"

    def check(self) -> None:
        """Raises ValueError, naming the field, for values out of range."""
        for name in ("dense", "codebook", "sign", "scale", "latent", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: a rate must be finite and at least 0")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise ValueError(
                f"clip_norm={self.clip_norm}: it must be above 0, and finite (None clips nothing)"
            )
        shares = {"warmup_share": self.warmup_share}
        if self.freeze is not None:
            shares["freeze.warmup_share"] = self.freeze.warmup_share
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: a share of the run is between 0 and 1")
        check_integer("accumulate", self.accumulate, least=1)
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule={self.rule!r}: choose one of {get_args(Rule)}")
        if self.rule != "sgd" and self.momentum != _MOMENTUM:
            raise ValueError(f"momentum={self.momentum} is of rule='sgd': leave it out")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: give at least 0, below 1")
        if self.moment_dtype not in get_args(MomentDtype):
            raise ValueError(
                f"moment_dtype={self.moment_dtype!r}: choose one of {get_args(MomentDtype)}"
            )


def make_optimizer(plan: Plan, steps: int, config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the optimizer for what a plan calls learned.

    Args:
        plan: names the groups.
        steps: length of the run in batches; an update takes ``config.accumulate`` of them, and
            schedules and freezing count updates.
        config: the settings.

    Returns:
        One transformation. Without freezing it still observes the signs, so that runs with and
        without can be compared; the state is empty where a plan has no sign latents.

    Raises:
        ValueError: for settings out of range, or if ``config.accumulate`` does not divide steps.
    """
    config.check()
    check_integer("steps", steps, least=0)
    if steps % config.accumulate:
        lower = steps - steps % config.accumulate
        raise ValueError(
            f"accumulate={config.accumulate} does not divide steps={steps}, so the last batches "
            f"would make no update: give steps={lower + config.accumulate}, or another accumulate"
        )
    updates = max(steps // config.accumulate, 1)

    def adam(peak: float) -> optax.GradientTransformation:
        rate = _schedule(peak, updates, config)
        return _in_float32(optax.adam(rate, mu_dtype=config.moment_dtype))

    def decayed(peak: float) -> optax.GradientTransformation:
        """The rule of leaves that have weight decay."""
        rate, decay, dtype = (
            _schedule(peak, updates, config),
            config.weight_decay,
            config.moment_dtype,
        )
        if config.rule == "adamw":
            return _in_float32(optax.adamw(rate, weight_decay=decay, mu_dtype=dtype))
        sgd = optax.sgd(rate, config.momentum, nesterov=True, accumulator_dtype=dtype)
        return _in_float32(optax.chain(optax.add_decayed_weights(decay), sgd))

    groups: dict[Hashable, optax.GradientTransformation] = {
        "dense": decayed(config.dense),
        "codebook": adam(config.codebook),
        "sign": adam(config.sign),
        "scale": optax.chain(adam(config.scale), _relative()),
        "latent": decayed(config.latent),
    }
    inner = optax.partition(groups, plan.labels)
    if config.clip_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(config.clip_norm), inner)
    freeze = config.freeze
    if freeze is None:
        tx = freeze_signs(inner, every=updates, threshold=float("inf"), freeze_to="current")
    else:
        tx = freeze_signs(
            inner,
            every=freeze.every,
            threshold=cosine_threshold(freeze.start, freeze.end, updates),
            momentum=freeze.momentum,
            warmup=round(freeze.warmup_share * updates),
            freeze_to=freeze.freeze_to,
            vote_window=freeze.vote_window,
        )
    if config.accumulate == 1:
        return tx
    # Outside of freeze_signs, so that its interval, votes and flips are those of real updates.
    return optax.MultiSteps(tx, config.accumulate).gradient_transformation()


def updates_made(
    opt_state: optax.OptState, step: Int[Array, ""]
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """Counts updates, which are not steps where gradients are accumulated.

    Args:
        opt_state: state of an optimizer of `make_optimizer`, after a step.
        step: steps made.

    Returns:
        The number of updates, and whether the last step made one.
    """
    if isinstance(opt_state, optax.MultiStepsState):
        return jnp.asarray(opt_state.gradient_step), jnp.asarray(opt_state.mini_step == 0)
    return step, jnp.array(True)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes in float32, whatever the parameters are kept in.

    Optax keeps Adam's second moment in the parameters' dtype; ``mu_dtype`` is for the first alone.
    """

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(_float32(updates), state, _float32(params))

    return optax.GradientTransformation(init, update)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _relative() -> optax.GradientTransformation:
    """Makes updates relative to each parameter.

    An 8-bit step is a hundred times smaller than a channel scale, and channels differ as much: an
    absolute rate that suits one drives another below zero.
    """

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda update, param: update * jnp.abs(param), updates, params)

    return optax.stateless(scale)


def _schedule(peak: float, updates: int, config: OptimizerConfig) -> optax.Schedule:
    warmup = min(round(config.warmup_share * updates), updates - 1)  # a decay has to follow
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, updates)
