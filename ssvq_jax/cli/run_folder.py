"""The folder of a run: what it was asked for, what it measured, where it is saved."""

import contextlib
import json
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssvq_jax.json_files import read_json
from ssvq_jax.sealed import CHECKSUM, seal, unseal

# How a run is carried out, or where its data lie, may change when a run goes on.
_MAY_CHANGE = frozenset(
    {"out", "resume", "save_seconds", "data_dir", "workers", "devices", "shard_state", "remat"}
)
_OURS = (
    *("config.json", "results.json", "metrics.jsonl", "checkpoints", "*plan.json", "eval-*.json"),
    *("accuracy.png", "signs.png", "tradeoff.png", "leaves.png", "analysis.png"),
    *("model.safetensors", "packed", "tokenizer.json", "tokenizer_config.json"),
)


class RunFolder:
    """Holds ``config.json``, ``metrics.jsonl``, ``results.json``, pictures, ``checkpoints/``.

    The folder is locked while the object lives, so that no two processes write to it.

    Args:
        path: the folder; made if it does not exist.
        config: what the run was asked for, as JSON values, the command's name among them.
        resume: go on with what is there; otherwise a former run in the folder is deleted.

    Raises:
        ValueError: if what is there was asked for something else (it says what differs), is no
            run, or is in use; if ``path`` cannot be a folder.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path = path
        self.config = json.loads(json.dumps(config))
        found = read_config(path) if resume else _replaced(path)
        if found is None and (path / "checkpoints").exists():
            raise ValueError(
                f"{path} has checkpoints, but no config.json to tell of what: give another --out"
            )
        if found is not None and resume and _begun(path):
            _compare(path, found, self.config)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={path} cannot be a folder ({error}): give another") from error
        weakref.finalize(self, os.close, _lock(path))
        if not resume and found is not None:
            _delete(path)
        self.write("config.json", seal(self.config))

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
        from ssvq_jax.atomic import replace_text

        replace_text(self.path / name, json.dumps(data, indent=1) + "\n")


def read_config(path: Path) -> dict[str, Any] | None:
    """What the run in a folder was asked for; None if there is no run.

    Raises:
        ValueError: if the file cannot be read, is not of a run, or is not as it was written.
    """
    file = path / "config.json"
    if not file.exists():
        return None
    try:
        data = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, or give another --out") from None
    if not isinstance(data, dict) or "command" not in data:
        raise ValueError(f"{file} is not of a run of ssvq: give another folder")
    try:
        return unseal(data, str(file))
    except ValueError as error:
        packed = path / "model.safetensors"
        hint = f"; a run of version 0.1 can be opened by {packed}" if packed.exists() else ""
        raise ValueError(
            f"{error}: give another --out, or --no-resume to start over{hint}"
        ) from None


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run; its ``config.json`` may be damaged all the same."""
    if not (path / "config.json").exists():
        return any((path / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    try:
        data = read_json(path / "config.json")
    except ValueError:
        return True
    return isinstance(data, dict) and ("command" in data or CHECKSUM in data)


def _replaced(path: Path) -> dict[str, Any] | None:
    """The configuration of a run that is about to be deleted; it may be of another version."""
    try:
        return read_config(path)
    except ValueError:
        with contextlib.suppress(ValueError):
            data = read_json(path / "config.json")
            if isinstance(data, dict) and "command" in data:
                return data
        raise


def _begun(path: Path) -> bool:
    """Whether a run came so far as to leave something."""
    return any((path / name).exists() for name in ("metrics.jsonl", "results.json")) or any(
        step.name.isdigit() for step in path.glob("checkpoints/*/*")
    )


def _lock(path: Path) -> int:
    """Locks a folder for this process, until the file it returns is closed."""
    file = os.open(path / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(
            f"{path} is in use by another process: wait for it, or give another --out"
        ) from None
    except (ImportError, OSError):  # a system or file system without locks does without
        pass
    return file


def _delete(path: Path) -> None:
    for pattern in _OURS:
        for part in path.glob(pattern):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    from ssvq_jax.training.identity import differences

    if found["command"] != wanted["command"]:
        different = [f"a run of ssvq {found['command']}"]
    else:
        different = differences(_identity(found), _identity(wanted))
    if different:
        raise ValueError(
            f"{path} holds a run of another configuration ({'; '.join(different)}): give another "
            "--out, the same options to go on with it, or --no-resume to delete it and start over"
        )


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on; of weights, what they are and not where."""
    kept = {name: value for name, value in config.items() if name not in _MAY_CHANGE}
    for name in ("weights", "teacher"):
        if isinstance(kept.get(name), Mapping):
            kept[name] = kept[name].get("crc32")
    return kept
