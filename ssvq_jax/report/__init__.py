"""Tables, pictures, and where results come from."""

from ssvq_jax.report.plots import plot_accuracy, plot_signs, plot_tradeoff
from ssvq_jax.report.provenance import provenance
from ssvq_jax.report.tables import print_bits, print_results, print_table

__all__ = [
    "plot_accuracy",
    "plot_signs",
    "plot_tradeoff",
    "print_bits",
    "print_results",
    "print_table",
    "provenance",
]
