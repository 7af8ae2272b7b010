"""The page of results is what the result files say."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
EXPERIMENTS = (
    "compression_curve",
    "ablation_freezing",
    "gradient_dominance",
    "efficientnet_lite0",
    "language_curve",
    "language_finetuning",
    "language_activations",
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_are_those_of_the_rows(name):
    file = ROOT / "experiments" / "results" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{name} was not run yet")
    tables = importlib.import_module(name).tables(json.loads(file.read_text())["rows"])
    assert tables
    for marker, text in tables.items():
        wanted = f"<!-- {marker}: begin -->\n{text}\n<!-- {marker}: end -->"
        assert wanted in PAGE.read_text(), (
            f"the table '{marker}' is not that of {file.name}: run "
            f"python experiments/{name}.py --only-report"
        )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rows_say_where_they_are_from(name):
    file = ROOT / "experiments" / "results" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{name} was not run yet")
    for row in json.loads(file.read_text())["rows"]:
        assert {"unit", "settings", "seconds", "commit", "versions", "python"} <= set(row)
