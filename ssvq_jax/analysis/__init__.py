"""What compression does to a model before any fine-tuning, leaf by leaf."""

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
    "LeafReport",
    "Sensitivity",
    "SignStatistics",
    "WeightError",
    "code_statistics",
    "leaf_reports",
    "loss_sensitivities",
    "sign_statistics",
    "weight_error",
]
