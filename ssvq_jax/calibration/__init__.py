"""What data say about weights, and weights encoded for the outputs they give on data."""

from ssvq_jax.calibration.feedback import LeafFeedback, feed_back
from ssvq_jax.calibration.fisher import (
    calibrations,
    fisher_diagonal,
    importance_of_inputs,
    input_calibrations,
)
from ssvq_jax.calibration.moments import Moments, input_moments, moments_bytes, moments_in_groups
from ssvq_jax.calibration.observe import Observed, Sums, observe
from ssvq_jax.calibration.sums_file import SumsSoFar, load_sums, save_sums

__all__ = [
    "LeafFeedback",
    "Moments",
    "Observed",
    "Sums",
    "SumsSoFar",
    "calibrations",
    "feed_back",
    "fisher_diagonal",
    "importance_of_inputs",
    "input_calibrations",
    "input_moments",
    "load_sums",
    "moments_bytes",
    "moments_in_groups",
    "observe",
    "save_sums",
]
