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
        distill: d, in [0, 1].
        temperature: T, above 0.
        feature_weight: w, at least 0.
    """

    label_smoothing: int | float = 0.0
    distill: int | float = 0.0
    temperature: int | float = 1.0
    feature_weight: int | float = 0.0

    def check(self, teacher: Teacher | None) -> None:
        """Raises ValueError for numbers out of range, or where a teacher is missing or unused."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: give at least 0, below 1")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill={self.distill}: give a share between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give a number above 0")
        if not 0 <= self.feature_weight < math.inf:
            raise ValueError(f"feature_weight={self.feature_weight}: give at least 0")
        if self.distill == 1 and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing}: with a distill of 1 no label counts; "
                "leave it out"
            )
        learns = self.distill > 0 or self.feature_weight > 0
        if learns and teacher is None:
            raise ValueError("distillation needs a teacher: give the model to learn from")
        if teacher is not None and not learns:
            raise ValueError(
                "there is a teacher, but nothing is learned from it: give a distill or "
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
        logits, parts = outputs.logits, {}
        loss = jnp.zeros(())
        if self.distill < 1:  # or else labels are not read: there may be none
            parts["label_loss"] = label_loss(logits, batch, self.label_smoothing)
            loss = (1 - self.distill) * parts["label_loss"]
        if teacher is None:
            return loss, {}
        if self.distill > 0:
            parts["teacher_loss"] = teacher_loss(logits, teacher.logits, self.temperature)
            loss += self.distill * parts["teacher_loss"]
        if self.feature_weight > 0:
            parts["feature_loss"] = feature_loss(outputs.features, teacher.features)
            loss += self.feature_weight * parts["feature_loss"]
        return loss, parts


def label_loss(
    logits: Float[Array, "b *places classes"], batch: Mapping[str, Any], smoothing: int | float
) -> Float[Array, ""]:
    """Mean cross-entropy, nats, with the labels of a batch; see `Objective`.

    Args:
        logits: of any float dtype; computed with in float32 at least.
        batch: as for `Objective`.
        smoothing: share of the labels' probability that is spread over all classes.

    Example:
        >>> logits, label = jnp.zeros((1, 4)), jnp.array([2])
        >>> round(float(jnp.exp(label_loss(logits, {"label": label}, 0.1))), 4)
        4.0
    """
    logits = wide(logits)
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
    """T² · KL(teacher || model), the mean over the batch; see `Objective`.

    Args:
        logits: of the model, of any float dtype; computed with in float32 at least.
        teacher: the teacher's.
        temperature: T.

    Example:
        >>> logits = jnp.log(jnp.array([[0.9, 0.1]]))
        >>> round(float(teacher_loss(logits, jnp.zeros((1, 2)), 1.0)), 4)  # ln 0.5 - ln 0.3
        0.5108
    """
    ours, theirs = (jax.nn.log_softmax(wide(x) / temperature) for x in (logits, teacher))
    return temperature**2 * jnp.mean(optax.losses.kl_divergence_with_log_targets(ours, theirs))


def feature_loss(
    features: Mapping[str, Float[Array, "..."]], teacher: Mapping[str, Float[Array, "..."]]
) -> Float[Array, ""]:
    """Mean over the features of |f - t|² / |t|².

    Args:
        features: f, of the model, by path.
        teacher: t, of the same paths and shapes; of one that is 0 everywhere, |f|² is taken.

    Raises:
        ValueError: without features, or for other ones than the teacher's.

    Example:
        >>> ours, theirs = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([0.0, 4.0])}
        >>> float(feature_loss(ours, theirs))
        0.5625
    """
    check_features(features, teacher)

    def distance(path: str) -> Array:
        ours, theirs = (wide(x[path]) for x in (features, teacher))
        size = jnp.sum(theirs**2)
        return jnp.sum((ours - theirs) ** 2) / jnp.where(size > 0, size, 1.0)

    return jnp.mean(jnp.stack([distance(path) for path in sorted(features)]))


def check_features(features: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Checks that features can be compared; shapes will do.

    Raises:
        ValueError: without features, or for other ones than the teacher's.
    """
    if not features:
        raise ValueError(
            "features: the pattern matches no inner module's path, e.g. 'blocks_0/mlp' (modules "
            "under a scan have none): see the paths of the parameters, and give such a pattern"
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
        The arrays, numbered where a module gives several; of one that is called several times (as
        one that is computed again, see `ssvq_jax.training.remat`) those of the last call. What
        modules sow themselves is left out.

    Example:
        >>> called = {"__call__": (jnp.ones(2),), "sown": (jnp.ones(3),)}
        >>> features_of({"intermediates": {"blocks_0": called}})
        {'blocks_0': Array([1., 1.], dtype=float32)}
    """
    found: dict[str, Any] = {}
    intermediates: dict[Any, Any] = flatten_dict(dict(collections.get(INTERMEDIATES, {})))
    for (*path, name), calls in intermediates.items():
        leaves = jax.tree.leaves(calls[-1]) if name == "__call__" else []
        for i, leaf in enumerate(leaves):
            found["/".join(path) + (f"/{i}" if len(leaves) > 1 else "")] = leaf
    return found


def wide(x: Array) -> Array:
    """In float32 at least: 16 bits are a hundredth off in logarithms, or cannot hold squares."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
