"""The optimizer of a fine-tuning run: a learning rate a group, clipping, sign freezing."""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from ssvq_jax.plan import Plan
from ssvq_jax.training.freezing import FreezeTo, cosine_threshold, freeze_signs


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
    """AdamW with a learning rate a group, cosine decay, and clipping of the global norm.

    Attributes:
        dense: learning rate of uncompressed leaves.
        codebook: learning rate of codebooks.
        sign: learning rate of sign latents; relative to the weights' scale it sets how many flip.
        scale: learning rate of scales and steps, relative to each of them.
        latent: learning rate of the float weights behind uniform quantization.
        weight_decay: of dense leaves and latent weights; codebooks and signs have none.
        warmup_share: share of the run in which rates rise linearly.
        clip_norm: largest global gradient norm.
        freeze: sign freezing, or None to let all signs flip to the end.
    """

    dense: float = 1e-4
    codebook: float = 1e-3
    sign: float = 1e-3
    scale: float = 1e-3
    latent: float = 1e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    clip_norm: float = 1.0
    freeze: FreezeConfig | None = dataclasses.field(default_factory=FreezeConfig)


def make_optimizer(plan: Plan, steps: int, config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the optimizer for what a plan calls learned.

    Args:
        plan: names the groups.
        steps: length of the run in updates.
        config: the settings.

    Returns:
        One transformation. Without freezing it still observes the signs, so that runs with and
        without can be compared; the state is empty where a plan has no sign latents.
    """
    adam, adamw = optax.adam, optax.adamw
    groups: dict[Hashable, optax.GradientTransformation] = {
        "dense": adamw(_schedule(config.dense, steps, config), weight_decay=config.weight_decay),
        "codebook": adam(_schedule(config.codebook, steps, config)),
        "sign": adam(_schedule(config.sign, steps, config)),
        "scale": optax.chain(adam(_schedule(config.scale, steps, config)), _relative()),
        "latent": adamw(_schedule(config.latent, steps, config), weight_decay=config.weight_decay),
    }
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.partition(groups, plan.labels)
    )
    freeze = config.freeze
    if freeze is None:
        return freeze_signs(inner, every=steps, threshold=float("inf"), freeze_to="current")
    return freeze_signs(
        inner,
        every=freeze.every,
        threshold=cosine_threshold(freeze.start, freeze.end, steps),
        momentum=freeze.momentum,
        warmup=round(freeze.warmup_share * steps),
        freeze_to=freeze.freeze_to,
        vote_window=freeze.vote_window,
    )


def _relative() -> optax.GradientTransformation:
    """Makes updates relative to each parameter.

    An 8-bit step is a hundred times smaller than a channel scale, and channels differ as much: an
    absolute rate that suits one drives another below zero.
    """

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda update, param: update * jnp.abs(param), updates, params)

    return optax.stateless(scale)


def _schedule(peak: float, steps: int, config: OptimizerConfig) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, round(config.warmup_share * steps), steps)
