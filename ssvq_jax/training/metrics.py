"""Records of runs as JSON lines, in step with the checkpoints."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssvq_jax.atomic import replace_text


class MetricsFile:
    """A file of JSON lines, each the record of a ``run`` at a ``step``; several runs may share it.

    Args:
        path: the file; made by the first record.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     metrics = MetricsFile(Path(folder) / "metrics.jsonl")
        ...     for step in (10, 20, 30):
        ...         metrics.append({"run": "a", "step": step})
        ...     metrics.resume("a", 20)  # a checkpoint of step 20 goes on
        [{'run': 'a', 'step': 10}, {'run': 'a', 'step': 20}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record at the end."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self, run: str | None = None) -> list[dict[str, Any]]:
        """Reads the records, of one run or of all; a line cut off by an interrupt is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and run in (None, record.get("run")):
                records.append(record)
        return records

    def clean(self) -> list[dict[str, Any]]:
        """Takes a line that was cut off out of the file, and reads the others."""
        records = self.read()
        self._write(records)
        return records

    def resume(self, run: str, step: int) -> list[dict[str, Any]]:
        """Drops a run's records after a step, which the run will write again.

        Args:
            run: its name.
            step: where it goes on.

        Returns:
            The run's records up to that step.
        """
        kept = [x for x in self.read() if x.get("run") != run or x["step"] <= step]
        self._write(kept)
        return [record for record in kept if record.get("run") == run]

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
