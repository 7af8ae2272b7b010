"""What data say about weights: moments of their inputs, importance of their elements."""

from ssvq_jax.calibration.fisher import calibrations, fisher_diagonal, importance_of_inputs
from ssvq_jax.calibration.moments import Moments, input_moments, moments_bytes, moments_in_groups
from ssvq_jax.calibration.observe import Observed, Sums, observe
from ssvq_jax.calibration.sums_file import SumsSoFar, load_sums, save_sums

__all__ = [
    "Moments",
    "Observed",
    "Sums",
    "SumsSoFar",
    "calibrations",
    "fisher_diagonal",
    "importance_of_inputs",
    "input_moments",
    "load_sums",
    "moments_bytes",
    "moments_in_groups",
    "observe",
    "save_sums",
]
