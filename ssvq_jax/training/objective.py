"""What training minimises: cross-entropy, smoothed or of mixed labels, and distillation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from ssvq_jax.tree import PyTree

if TYPE_CHECKING:
    from ssvq_jax.training.step import Forward

INTERMEDIATES = "intermediates"


class Teacher(NamedTuple):
    """A model to learn from, e.g. the float model that is compressed.

    Attributes:
        forward: the model; called without a key, so in evaluation mode.
        params: its parameters.
        model_state: its other collections.
    """

    forward: "Forward"
    params: PyTree
    model_state: PyTree


class Outputs(NamedTuple):
    """What a model gives for a batch.

    Attributes:
        logits: ``[b, ..., classes]``.
        features: outputs of inner modules by path; see `features_of`.
    """

    logits: Float[Array, "b *places classes"]
    features: Mapping[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What training minimises.

        (1 - d) · cross-entropy + d · T² · KL(teacher || model) + w · feature distance

    Both distributions of the divergence are softmax(logits / T) (Hinton et al., arXiv 1503.02531,
    section 2). The feature distance is |f - t|² / |t|², the mean over the features f of the model
    and t of the teacher (FitNets, arXiv 1412.6550, equation 3, made free of the features' scale;
    models of one architecture need no regressor).

    Attributes:
        label_smoothing: share s of the label's probability that is spread over all classes, in
            [0, 1) (arXiv 1512.00567, section 7).
        distillation: d, in [0, 1].
        temperature: T, above 0.
        feature_weight: w, at least 0.
    """

    label_smoothing: int | float = 0.0
    distillation: int | float = 0.0
    temperature: int | float = 1.0
    feature_weight: int | float = 0.0

    def check(self, teacher: Teacher | None) -> None:
        """Raises ValueError for numbers out of range, or where a teacher is missing or unused."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: give at least 0, below 1")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation={self.distillation}: give a share between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give a number above 0")
        if not 0 <= self.feature_weight < math.inf:
            raise ValueError(f"feature_weight={self.feature_weight}: give at least 0")
        learns = self.distillation > 0 or self.feature_weight > 0
        if learns and teacher is None:
            raise ValueError("distillation needs a teacher: give the model to learn from")
        if teacher is not None and not learns:
            raise ValueError(
                "there is a teacher, but nothing is learned from it: give a distillation share or "
                "a feature_weight above 0"
            )

    def __call__(
        self, outputs: Outputs, batch: Mapping[str, Any], teacher: Outputs | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Evaluates it.

        Args:
            outputs: the model's.
            batch: ``label`` int ``[b, ...]``; and of mixed images ``other_label``, with ``share``
                ``[b]`` being the label's.
            teacher: the teacher's outputs for the same images.

        Returns:
            The loss; and with a teacher its parts, before they are weighted.

        Example:
            >>> outputs = Outputs(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), {})
            >>> loss, _ = Objective(label_smoothing=0.3)(outputs, {"label": jnp.array([0])})
            >>> round(float(jnp.exp(-loss)), 4)  # 0.5 ** 0.8 * 0.25 ** 0.2
            0.4353
        """
        logits = outputs.logits
        labels = label_loss(logits, batch, self.label_smoothing)
        if teacher is None:
            return labels, {}
        loss, parts = (1 - self.distillation) * labels, {"label_loss": labels}
        if self.distillation > 0:
            parts["teacher_loss"] = teacher_loss(logits, teacher.logits, self.temperature)
            loss += self.distillation * parts["teacher_loss"]
        if self.feature_weight > 0:
            parts["feature_loss"] = feature_loss(outputs.features, teacher.features)
            loss += self.feature_weight * parts["feature_loss"]
        return loss, parts


def label_loss(
    logits: Float[Array, "b *places classes"], batch: Mapping[str, Any], smoothing: int | float
) -> Float[Array, ""]:
    """Mean cross-entropy, nats, with the labels of a batch; see `Objective`."""
    label, other = batch["label"], batch.get("other_label")
    if not smoothing and other is None:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))
    classes = logits.shape[-1]
    targets = jax.nn.one_hot(label, classes)
    if other is not None:
        share = jnp.reshape(batch["share"], (-1,) + (1,) * (targets.ndim - 1))
        targets = share * targets + (1 - share) * jax.nn.one_hot(other, classes)
    smoothed = optax.smooth_labels(targets, smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, smoothed))


def teacher_loss(
    logits: Float[Array, "b *places classes"],
    teacher: Float[Array, "b *places classes"],
    temperature: int | float,
) -> Float[Array, ""]:
    """T² · KL(teacher || model), the mean over the batch; see `Objective`."""
    ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher))
    return temperature**2 * jnp.mean(optax.losses.kl_divergence_with_log_targets(ours, theirs))


def feature_loss(
    features: Mapping[str, Float[Array, "..."]], teacher: Mapping[str, Float[Array, "..."]]
) -> Float[Array, ""]:
    """Mean over the features of |f - t|² / |t|², in float32.

    Raises:
        ValueError: without features, or for other ones than the teacher's.
    """
    check_features(features, teacher)

    def distance(path: str) -> Array:
        ours, theirs = (x[path].astype(jnp.float32) for x in (features, teacher))
        return jnp.sum((ours - theirs) ** 2) / jnp.maximum(jnp.sum(theirs**2), 1e-12)

    return jnp.mean(jnp.stack([distance(path) for path in sorted(features)]))


def check_features(features: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Raises ValueError without features, or for other ones than the teacher's; takes shapes."""
    if not features:
        raise ValueError(
            "feature_weight: the model gives no features: make it by linen_forward(module, "
            "features=...), with a pattern that names modules"
        )
    ours, theirs = ({path: x.shape for path, x in tree.items()} for tree in (features, teacher))
    if ours != theirs:
        path = min(path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path))
        raise ValueError(
            f"feature '{path}' is {ours.get(path, 'missing')} of the model and "
            f"{theirs.get(path, 'missing')} of the teacher: give a pattern of modules whose "
            "outputs are alike"
        )


def features_of(collections: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
    """Outputs of modules that `linen_forward` was told to give, by path: ``blocks_0``.

    Args:
        collections: what the forward pass returned beside the logits.

    Returns:
        The arrays; what modules sow themselves is left out.
    """
    found: dict[str, Any] = {}
    for (*path, name), outputs in flatten_dict(dict(collections.get(INTERMEDIATES, {}))).items():
        leaves = jax.tree.leaves(outputs) if name == "__call__" else []
        for i, leaf in enumerate(leaves):
            found["/".join(path) + (f"/{i}" if len(leaves) > 1 else "")] = leaf
    return found
