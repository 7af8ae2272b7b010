"""What compression does to a model, leaf by leaf: before fine-tuning, and to its gradients."""

from ssvq_jax.analysis.gradient_dominance import Dominance, gradient_dominance
from ssvq_jax.analysis.gradients import dense_gradients
from ssvq_jax.analysis.leaves import (
    CodeStatistics,
    LeafReport,
    SignStatistics,
    WeightError,
    code_statistics,
    leaf_reports,
    sign_statistics,
    weight_error,
)
from ssvq_jax.analysis.sensitivity import Sensitivity, loss_sensitivities

__all__ = [
    "CodeStatistics",
    "Dominance",
    "LeafReport",
    "Sensitivity",
    "SignStatistics",
    "WeightError",
    "code_statistics",
    "dense_gradients",
    "gradient_dominance",
    "leaf_reports",
    "loss_sensitivities",
    "sign_statistics",
    "weight_error",
]
