"""Records of runs as JSON lines, in step with the checkpoints."""

import contextlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssvq_jax.atomic import replace_text
from ssvq_jax.json_files import parse_json, read_text
from ssvq_jax.sealed import seal, unseal


class MetricsFile:
    """A file of JSON lines, each the record of a ``run`` at a ``step``; several runs may share it.

    Each line ends with a checksum of the record.

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def read(self, run: str | None = None) -> list[dict[str, Any]]:
        """Reads the records, of one run or of all; a last line that an interrupt cut off is not.

        Raises:
            ValueError: naming the line that is damaged.
        """
        if not self.path.exists():
            return []
        *lines, last = read_text(self.path).split("\n")
        records = [self._record(number, line) for number, line in enumerate(lines, 1)]
        with contextlib.suppress(ValueError):  # empty, cut off, or whole but for the end of line
            records.append(self._record(len(lines) + 1, last))
        return [record for record in records if run in (None, record.get("run"))]

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

        Raises:
            ValueError: naming the line that is damaged.
        """
        kept = [x for x in self.read() if x.get("run") != run or x["step"] <= step]
        self._write(kept)
        return [record for record in kept if record.get("run") == run]

    def count(self, run: str, step: int) -> int:
        """Number of a run's records up to a step."""
        return sum(record["step"] <= step for record in self.read(run))

    def check(self, run: str, step: int, expected: int) -> None:
        """Warns if records of a run have been lost: it goes on all the same.

        Args:
            run: its name.
            step: where it goes on.
            expected: what `count` gave when the checkpoint of that step was written.
        """
        lost = expected - self.count(run, step)
        if lost > 0:
            warnings.warn(
                f"{self.path} lacks {lost} of {expected} records of run '{run}' up to step {step}: "
                "tables and plots will lack them, too",
                stacklevel=2,
            )

    def _record(self, number: int, line: str) -> dict[str, Any]:
        what = f"line {number} of {self.path}"
        try:
            data = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{what} is damaged ({error}): delete it to go on without") from None
        try:
            return unseal(data, what)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to go on without") from None

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        if self.path.exists():
            replace_text(self.path, "".join(map(_line, records)))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(seal(record)) + "\n"
