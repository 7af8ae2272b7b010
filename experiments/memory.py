"""Peak memory of a part of a process."""

import contextlib
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin_peak() -> None:
    """Lets the peak begin anew, where the system can (Linux); else it is that since the start."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="utf-8")


def peak_gigabytes() -> float:
    """The most memory that the process has held since `begin_peak`, in 10^9 bytes."""
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
