"""The folder of a run: what it was asked for, what it measured, where it is saved."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# How a run is carried out, or where its data lie, may change between two sittings.
_MAY_CHANGE = frozenset(
    {"out", "resume", "save_seconds", "data_dir", "workers", "devices", "shard_state", "remat"}
)
_OURS = ("config.json", "metrics.jsonl", "results.json", "checkpoints")


class RunFolder:
    """Holds ``config.json``, ``metrics.jsonl``, ``results.json``, pictures, ``checkpoints/``.

    Args:
        path: the folder; made if it does not exist.
        config: what the run was asked for, as JSON values, the command's name among them.
        resume: go on with what is there; otherwise a former run in the folder is deleted.

    Raises:
        ValueError: if what is there was asked for something else; it says what differs.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path = path
        self.config = json.loads(json.dumps(config))
        if path.exists() and not path.is_dir():
            raise ValueError(f"out={path} is a file: give a folder")
        if not resume:
            for name in _OURS:
                part = path / name
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        found = read_config(path)
        if found is not None:
            _compare(path, found, self.config)
        elif (path / "checkpoints").exists():
            raise ValueError(
                f"{path} has checkpoints, but no config.json to tell of what: give another --out, "
                "or start over with --no-resume"
            )
        path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", self.config)

    @property
    def metrics(self) -> Any:
        """The file of records."""
        from ssvq_jax.training.metrics import MetricsFile

        return MetricsFile(self.path / "metrics.jsonl")

    def checkpoints(self, name: str, seconds: float) -> Any:
        """The checkpoints of one of the folder's runs."""
        from ssvq_jax.training.checkpoint import Checkpoints

        return Checkpoints(self.path / "checkpoints" / name, seconds=seconds)

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes a JSON file, whole or not at all."""
        from ssvq_jax.training.metrics import replace_text

        replace_text(self.path / name, json.dumps(data, indent=1) + "\n")


def read_config(path: Path) -> dict[str, Any] | None:
    """What the run in a folder was asked for; None if there is no run.

    Raises:
        ValueError: if the file cannot be read.
    """
    file = path / "config.json"
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): start over with --no-resume") from None
    if not isinstance(config, dict) or "command" not in config:
        raise ValueError(f"{file} is not of a run of ssvq: give another folder")
    return config


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    there, here = _flat(found), _flat(wanted)
    differences = [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} now"
        for name in sorted({*there, *here})
        if name.split(".")[0] not in _MAY_CHANGE and there.get(name) != here.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} holds a run of another configuration ({'; '.join(differences)}): give another "
            "--out, the same options to go on with it, or --no-resume to delete it and start over"
        )


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    """Joins the keys of nested dictionaries by dots."""
    if not isinstance(data, Mapping):
        return {name: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat
