"""Everything that is wrong, in one error."""

from collections.abc import Sequence

_MOST = 20  # problems that a message names


class ProblemsError(ValueError):
    """Several things that are wrong.

    Args:
        problems: one sentence each, which names a leaf and says what to change.

    Attributes:
        problems: the sentences.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"{len(problems)} problems:", *(f"- {problem}" for problem in problems[:_MOST])]
        if len(problems) > _MOST:
            lines.append(f"- and {len(problems) - _MOST} more")
        super().__init__("\n".join(lines) if len(problems) > 1 else problems[0])


def raise_together(problems: Sequence[str]) -> None:
    """Raises one error that names every problem; returns if there is none.

    Args:
        problems: one sentence each, which names a leaf and says what to change.

    Raises:
        ProblemsError: with the sentence itself if there is one, else with a line for each.

    Example:
        >>> raise_together(["leaf 'a' is empty", "leaf 'b' is empty"])
        Traceback (most recent call last):
        ssvq_jax.problems.ProblemsError: 2 problems:
        - leaf 'a' is empty
        - leaf 'b' is empty
    """
    if problems:
        raise ProblemsError(problems)
