"""Where a result comes from: versions, commit, device."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ssvq_jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "tensorflow-datasets")


def provenance() -> dict[str, Any]:
    """Describes the code and machine of a run, for its results file.

    Returns:
        Package versions, the git commit of the package's sources (None outside a checkout; with
        "+changes" where files differ from it), Python version, and the JAX device kind.
    """
    import jax

    return {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(Path(__file__).parents[2]),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *command: str) -> str:
    found = subprocess.run(
        ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()
