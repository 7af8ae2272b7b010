"""How much memory there is."""

from pathlib import Path


def free_bytes() -> int | None:
    """Memory that can be had without swapping, where the system says (Linux); else None."""
    told = Path("/proc/meminfo")
    if not told.exists():
        return None
    lines = (line.split() for line in told.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
