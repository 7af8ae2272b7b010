"""Experiments in units: each ends with a row in a results file, and a stop costs one unit.

A unit is known by its name and its settings. What it found is written at once, into a file of its
own beside the run and into the experiment's results file, so that several processes can share the
units of one experiment.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tables import Rows, publish

from ssvq_jax.atomic import replace_text
from ssvq_jax.json_files import read_json
from ssvq_jax.report import provenance

Settings = TypeVar("Settings", bound="Options")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "results.md"
QUICK = ROOT / "runs" / "quick"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all experiments take.

    Attributes:
        data_dir: where TensorFlow Datasets' sets are; by default its own folder.
        seeds: each unit is run with each.
        part: "1/2" and "2/2" are halves of the units, for two processes side by side.
        hours: begin no unit after so many.
        quick: a few updates on the digits that come with the package, to see that it runs; the
            results go to runs/quick.
        only_report: write tables and pictures from the results that are there.
        out: results file; by default experiments/results/<experiment>.json.
    """

    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    part: str = "1/1"
    hours: float = math.inf
    quick: bool = False
    only_report: bool = False
    out: Path | None = None

    def results(self, name: str) -> "Results":
        """The results of an experiment, by its name."""
        if self.out is not None:
            return Results(self.out, self.out.with_suffix(".units"))
        if self.quick:
            return Results(QUICK / f"{name}.json", QUICK / "units" / name)
        return Results(RESULTS / f"{name}.json", ROOT / "runs" / "units" / name)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some minutes of work.

    Attributes:
        name: unique in the experiment.
        settings: all that decides the outcome, as plain data.
        run: does the work; gives the row's figures.
    """

    name: str
    settings: Mapping[str, Any]
    run: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows of an experiment.

    Attributes:
        file: ``{"rows": [...]}``, each row with its unit's name and settings.
        folder: a file for each unit that this checkout has run.
    """

    file: Path
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the file, by unit."""
        return read_json(self.file)["rows"] if self.file.exists() else []

    @property
    def of_page(self) -> bool:
        """Whether these are the results that docs/results.md shows."""
        return self.file.resolve().parent == RESULTS

    def merge(self) -> None:
        """Writes rows that a stop or another process has kept out of the file."""
        rows = self._all()
        if rows and list(rows.values()) != self.rows():
            self._write(rows)

    def find(self, unit: Unit) -> dict[str, Any] | None:
        """The row of a unit, if it was run with these settings."""
        row = self._all().get(unit.name)
        return row if row is not None and row["settings"] == _plain(unit.settings) else None

    def add(self, unit: Unit, row: Mapping[str, Any]) -> None:
        """Writes a unit's row, with all rows that other processes have written meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        written = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = {"unit": unit.name, **row, "settings": _plain(unit.settings), "written": written}
        replace_text(self._own(unit.name), json.dumps(told))
        self._write(self._all())

    def _write(self, rows: Mapping[str, Any]) -> None:
        text = ",\n".join(" " + json.dumps(row) for row in rows.values())
        replace_text(self.file, f'{{"rows": [\n{text}\n]}}\n')

    def _all(self) -> dict[str, dict[str, Any]]:
        """The latest row of every unit, by the units' names in order."""
        found: dict[str, dict[str, Any]] = {}
        own = [read_json(file) for file in self.folder.glob("*.json")]
        for row in sorted([*self.rows(), *own], key=lambda row: row["written"]):
            found[row["unit"]] = row
        return dict(sorted(found.items()))

    def _own(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_').replace('/', '_')}.json"


def work(units: Sequence[Unit], results: Results, options: Options) -> list[dict[str, Any]]:
    """Runs the units that have no row yet.

    Returns:
        The rows of all given units that have one by now, in their order.

    Raises:
        SystemExit: for a part that is none.
    """
    index, count = _part(options.part)
    began = time.perf_counter()
    mine = [unit for i, unit in enumerate(units) if i % count == index]
    results.merge()
    waiting = [unit for unit in mine if options.quick or results.find(unit) is None]
    print(f"{len(mine) - len(waiting)} of {len(mine)} units are done", flush=True)
    for i, unit in enumerate(waiting):
        spent = time.perf_counter() - began
        if spent > 3600 * options.hours:
            print(f"{len(waiting) - i} units are left: the same command goes on", flush=True)
            break
        left = f", about {spent / i * (len(waiting) - i) / 60:.0f} min left" if i else ""
        print(f"unit {i + 1} of {len(waiting)}: {unit.name}{left}", flush=True)
        start = time.perf_counter()
        row = unit.run()
        seconds = round(time.perf_counter() - start, 1)
        results.add(unit, {**row, "seconds": seconds, **provenance()})
    return [row for row in map(results.find, units) if row is not None]


def conduct(
    name: str,
    units: Callable[[Settings], Sequence[Unit]],
    tables: Callable[[Rows], Mapping[str, str]],
    plot: Callable[[Rows, Path], None],
    options: Settings,
) -> None:
    """Runs an experiment and shows all rows of its results file.

    Args:
        name: of the experiment.
        units: its units.
        tables: gives texts by their markers, for the page if the results are those of RESULTS.
        plot: draws into a folder, the page's or that of the results file.
        options: its settings.
    """
    results = options.results(name)
    if not options.only_report:
        work(units(options), results, options)
    rows = results.rows()
    if not rows:
        print(f"{results.file} has no rows yet: there is nothing to show")
        return
    page = PAGE if results.of_page else None
    publish(tables(rows), page)
    folder = results.file.parent if page is None else page.parent
    plot(rows, folder)
    print(f"results are in {results.file}, pictures in {folder}")


def check_choice(name: str, given: Sequence[Any], known: Iterable[Any]) -> None:
    """Raises SystemExit if an option names what there is not."""
    unknown = [value for value in given if value not in known]
    if unknown:
        raise SystemExit(f"{name}={unknown}: choose of {', '.join(map(str, known))}")


def _part(text: str) -> tuple[int, int]:
    """Reads "2/3" as (1, 3)."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise SystemExit(f"part={text!r}: give e.g. 1/2 for the first half of the units")
    return int(first) - 1, int(second)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))
