"""Windows of a plane of tokens: cut out, joined, and which of their tokens belong together."""

import numpy as np
from jaxtyping import Array, Bool, Float, Int


def cut_windows(plane: Float[Array, "b h w c"], window: int) -> Float[Array, "b n t c"]:
    """Cuts a plane, which windows cover without rest, into windows, row by row."""
    batch, height, width, features = plane.shape
    rows, columns = height // window, width // window
    cut = plane.reshape(batch, rows, window, columns, window, features)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, window**2, features)


def join_windows(
    windows: Float[Array, "b n t c"], window: int, rows: int, columns: int
) -> Float[Array, "b h w c"]:
    """Inverts `cut_windows`, for so many rows and columns of windows."""
    batch, _, _, features = windows.shape
    cut = windows.reshape(batch, rows, columns, window, window, features)
    joined = cut.transpose(0, 1, 3, 2, 4, 5)
    return joined.reshape(batch, rows * window, columns * window, features)


def relative_positions(window: int) -> Int[np.ndarray, "t t"]:
    """Numbers the differences of positions between a window's tokens, rows first.

    Example:
        >>> relative_positions(2)
        array([[4, 3, 1, 0],
               [5, 4, 2, 1],
               [7, 6, 4, 3],
               [8, 7, 5, 4]])
    """
    rows, columns = (x.reshape(-1) for x in np.mgrid[:window, :window])
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right


def same_region(
    rows: int, columns: int, window: int, shifts: tuple[int, ...]
) -> Bool[np.ndarray, "n t t"]:
    """Says which of a window's tokens were neighbours before the plane was rolled.

    Args:
        rows: number of windows from top to bottom.
        columns: number of windows from left to right.
        window: height and width of a window.
        shifts: by how much rows and columns were rolled.

    Returns:
        For each window, row by row, pairs of tokens.

    Example:
        >>> same_region(1, 2, 2, (0, 1)).sum((1, 2))
        array([16,  8])
    """
    parts = []
    for count, shift in zip((rows, columns), shifts, strict=True):
        # What was rolled round from the start now lies at the end.
        parts.append(np.arange(count * window) >= count * window - shift)
    regions = 2 * parts[0][:, None] + parts[1][None, :]
    regions = regions.reshape(rows, window, columns, window).transpose(0, 2, 1, 3)
    regions = regions.reshape(rows * columns, window * window)
    return regions[:, :, None] == regions[:, None, :]
