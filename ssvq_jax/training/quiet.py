"""Failures of orbax in one line: its other tasks and threads say the same again, in tracebacks."""

import contextlib
import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_SECONDS = 0.1  # for the reads that are under way to end


@contextlib.contextmanager
def one_error(describe: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raises one exception in the place of another, and keeps all else from the error output.

    Orbax reads all leaves at once. When one cannot be read it ends its event loop; the other reads
    then fail in threads, where no exception can be raised, and asyncio logs every task that nobody
    waits for any more. If nothing is raised, nothing is kept back.

    Args:
        describe: makes the exception to raise of the one that was raised.

    Raises:
        Exception: what ``describe`` gives.
    """
    logger, show = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    kept: list[Any] = []
    failed: Exception | None = None
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = kept.append
    try:
        try:
            yield
        except Exception as error:
            failed = describe(error)
            _forget(error)
        if failed is not None:
            time.sleep(_SECONDS)
            gc.collect()  # tasks log when they are collected
            kept.clear()
    finally:
        logger.setLevel(level)
        sys.unraisablehook = show
        for failure in kept:
            show(failure)
    if failed is not None:
        raise failed


def _forget(error: BaseException | None) -> None:
    """Lets go of the tasks that the frames of an exception and its causes hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
