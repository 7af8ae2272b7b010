"""Tables, pictures, and where results come from."""

from ssvq_jax.report.analysis import plot_analysis, print_analysis
from ssvq_jax.report.plots import plot_accuracy, plot_signs, plot_tradeoff
from ssvq_jax.report.provenance import provenance
from ssvq_jax.report.tables import (
    print_bits,
    print_inspection,
    print_language,
    print_outcome,
    print_results,
    print_table,
)

__all__ = [
    "plot_accuracy",
    "plot_analysis",
    "plot_signs",
    "plot_tradeoff",
    "print_analysis",
    "print_bits",
    "print_inspection",
    "print_language",
    "print_outcome",
    "print_results",
    "print_table",
    "provenance",
]
