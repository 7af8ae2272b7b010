"""Everything that is wrong, in one error."""

from collections.abc import Sequence

_MOST = 20  # problems that a message names


def raise_together(problems: Sequence[str]) -> None:
    """Raises one ValueError that names every problem; returns if there is none.

    Args:
        problems: one sentence each, which names a leaf and says what to change.

    Raises:
        ValueError: with the sentence itself if there is one, else with a line for each.

    Example:
        >>> raise_together(["leaf 'a' is empty", "leaf 'b' is empty"])
        Traceback (most recent call last):
        ValueError: 2 problems:
        - leaf 'a' is empty
        - leaf 'b' is empty
    """
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        lines = [f"{len(problems)} problems:", *(f"- {problem}" for problem in problems[:_MOST])]
        if len(problems) > _MOST:
            lines.append(f"- and {len(problems) - _MOST} more")
        raise ValueError("\n".join(lines))
