"""What a text says of a language model's weights, for ``ssvq compress``."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.language import Language
from ssvq_jax.cli.language_text import Windows, open_windows

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.calibration import LeafFeedback, Moments
    from ssvq_jax.cli.compress import CompressCommand
    from ssvq_jax.models.tokenizer import Tokenizer
    from ssvq_jax.plan import Plan
    from ssvq_jax.quantizers import Calibration
    from ssvq_jax.tree import Variables


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """The text that a compression is calibrated by.

    Attributes:
        windows: of it.
        feedback: whether the errors of weights are made good by those encoded after them.
    """

    windows: Windows
    feedback: bool

    @property
    def told(self) -> dict[str, Any]:
        """What a run's configuration says of it."""
        found = {f"calibration_{key}": value for key, value in self.windows.told.items()}
        return {**found, "feedback": self.feedback}

    def observe(self, language: Language, plan: "Plan") -> "Moments":
        """Reads the second moments of what every compressed weight is multiplied with.

        Raises:
            ValueError: if they would not fit into the memory that is left.
        """
        from ssvq_jax.calibration import input_moments, moments_bytes

        batches = [window[None, :-1] for window in self.windows.tokens]
        params = language.weights.params
        needed = 2 * sum(moments_bytes(language.forward, params, plan, batches[0]).values())
        left = _free_bytes()
        if left is not None and needed > left:
            raise ValueError(
                f"calibrating takes about {needed / 1e9:.1f} GB for the moments of the layers' "
                f"inputs, and {left / 1e9:.1f} GB are free: free some, compress fewer leaves, or "
                "leave --calibration-text out"
            )
        return input_moments(language.forward, params, plan, batches, optional=True, progress=True)


def open_calibration(
    command: "CompressCommand", language: Language, tokenizer: "Tokenizer", plan: "Plan"
) -> CalibrationText | None:
    """Opens the calibration text of a command; None if it has none.

    Raises:
        ValueError: for a text that is missing or too short, feedback without one, or feedback with
            a method that encodes weights as a whole only.
    """
    if not command.calibration_text:
        if command.feedback:
            raise ValueError("--feedback needs a text: give --calibration-text, too")
        return None
    if command.feedback:
        for entry in plan.entries:
            entry.quantizer.slice_parts(entry.spec.slice_spec())
    text = dataclasses.replace(command, text=command.calibration_text)
    return CalibrationText(open_windows(text, language, tokenizer), command.feedback)


def calibration_of(plan: "Plan", moments: "Moments") -> "dict[str, Calibration]":
    """Moments, and from them the importance of every element."""
    from ssvq_jax.calibration import calibrations, importance_of_inputs

    specs = {leaf.path: leaf for leaf in plan.leaves}
    importance = {
        path: importance_of_inputs(found, specs[path]) for path, found in moments.inputs.items()
    }
    return calibrations(moments.inputs, importance)


def feed_errors_back(
    language: Language, plan: "Plan", variables: "Variables", moments: "Moments"
) -> "tuple[Variables, dict[str, Any]]":
    """Encodes anew under the moments; gives what that did to the layers' outputs."""
    from ssvq_jax.calibration import feed_back

    variables, report = feed_back(
        plan, variables, language.weights.params, moments.inputs, largest_first=True
    )
    return variables, _summary(report)


def _summary(report: "Mapping[str, LeafFeedback]") -> dict[str, Any]:
    leaves = report.values()
    return {
        "damping_most": max(leaf.damping for leaf in leaves),
        "output_error_before": math.fsum(leaf.before for leaf in leaves) / len(leaves),
        "output_error_after": math.fsum(leaf.after for leaf in leaves) / len(leaves),
    }


def _free_bytes() -> int | None:
    """Memory that can be had without swapping, where the system says."""
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
