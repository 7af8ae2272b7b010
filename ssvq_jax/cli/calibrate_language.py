"""What a text says of a language model's weights, for ``ssvq compress``."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.language import Language
from ssvq_jax.cli.language_text import Windows, open_windows
from ssvq_jax.memory import free_bytes

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.calibration import LeafFeedback, Moments
    from ssvq_jax.cli.compress import CompressCommand
    from ssvq_jax.models.tokenizer import Tokenizer
    from ssvq_jax.plan import Plan
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

    def check(self, language: Language, plan: "Plan") -> None:
        """Raises ValueError if there is nothing to read, or it would not fit into the memory."""
        from ssvq_jax.calibration import moments_bytes

        params, batch = language.weights.params, self.windows.tokens[:1, :-1]
        found = moments_bytes(language.forward, params, plan, batch)
        if not found:
            raise ValueError(
                "--calibration-text: the recipe compresses no weight whose inputs can be read: "
                "leave it out"
            )
        needed = 2 * sum(found.values())
        left = free_bytes()
        if left is not None and needed > left:
            raise ValueError(
                f"calibrating takes about {needed / 1e9:.1f} GB for the moments of the layers' "
                f"inputs, and {left / 1e9:.1f} GB are free: free some, compress fewer leaves, or "
                "leave --calibration-text out"
            )

    def observe(self, language: Language, plan: "Plan") -> "Moments":
        """Reads the second moments of what every compressed weight is multiplied with."""
        from ssvq_jax.calibration import input_moments

        batches = [window[None, :-1] for window in self.windows.tokens]
        params = language.weights.params
        return input_moments(language.forward, params, plan, batches, optional=True, progress=True)


def open_calibration(
    command: "CompressCommand", language: Language, tokenizer: "Tokenizer", plan: "Plan"
) -> CalibrationText | None:
    """Opens the calibration text of a command; None if it has none.

    Raises:
        ValueError: for a text that is missing, too short or also judges, one that would take more
            memory than there is, feedback without one, or feedback with a method that encodes
            weights as a whole only.
    """
    if not command.calibration_text:
        if command.feedback:
            raise ValueError("--feedback needs a text: give --calibration-text, too")
        return None
    if command.feedback:
        for entry in plan.entries:
            entry.quantizer.slice_parts(entry.spec.slice_spec())
    shared = {file.resolve() for file in command.calibration_text} & {
        file.resolve() for file in command.text
    }
    if shared:
        raise ValueError(
            f"{shared.pop()} is in --calibration-text and in --text: judge by a text that had no "
            "part in the compression"
        )
    text = dataclasses.replace(command, text=command.calibration_text)
    found = CalibrationText(open_windows(text, language, tokenizer), command.feedback)
    found.check(language, plan)
    return found


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
