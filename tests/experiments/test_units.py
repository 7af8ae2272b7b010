"""Units of experiments: each is run once, and a stop costs one."""

import json
import math

import pytest
from units import Options, Results, Unit, check_choice, conduct, work


def unit(name, found, settings=None, rows=None):
    def run():
        if rows is not None:
            rows.append(name)
        if isinstance(found, BaseException):
            raise found
        return {"value": found}

    return Unit(name, settings or {"name": name, "rates": (1.0, 2.0)}, run)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "found.json", tmp_path / "units")


def test_units_are_run_once_and_rows_come_in_their_order(results, capsys):
    ran = []
    units = [unit("b", 1, rows=ran), unit("a", 2, rows=ran)]
    found = work(units, results, Options())
    assert [row["value"] for row in found] == [1, 2]
    assert work(units, results, Options()) == found
    assert ran == ["b", "a"]
    assert "2 of 2 units are done" in capsys.readouterr().out
    assert {"settings", "seconds", "commit", "versions"} < set(found[0])


def test_a_stop_costs_one_unit(results):
    units = [unit("a", 1), unit("b", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        work(units, results, Options())
    assert [row["unit"] for row in results.rows()] == ["a"]


def test_other_settings_are_another_unit(results):
    work([unit("a", 1, {"steps": 10})], results, Options())
    assert results.find(unit("a", 1, {"steps": 20})) is None
    (row,) = work([unit("a", 5, {"steps": 20})], results, Options())
    assert row["value"] == 5
    assert len(results.rows()) == 1


def test_parts_share_the_units_and_lose_none(results):
    units = [unit(str(i), i) for i in range(5)]
    first = work(units, results, Options(part="1/2"))
    assert [row["unit"] for row in first] == ["0", "2", "4"]
    # Written by the other process meanwhile, but not yet in the common file.
    results.file.write_text('{"rows": []}')
    assert [row["value"] for row in work(units, results, Options(part="2/2"))] == [0, 1, 2, 3, 4]
    assert [row["unit"] for row in json.loads(results.file.read_text())["rows"]] == list("01234")


def test_no_unit_begins_after_the_hours(results, capsys):
    assert work([unit("a", 1), unit("b", 2)], results, Options(hours=-1.0)) == []
    assert "2 units are left" in capsys.readouterr().out
    assert Options().hours == math.inf


def test_rows_of_a_file_that_was_cloned_count_as_done(results):
    work([unit("a", 1)], results, Options())
    for file in results.folder.iterdir():
        file.unlink()
    assert results.find(unit("a", 1)) is not None


def test_the_latest_row_of_a_unit_counts(results):
    work([unit("a", 1, {"steps": 10})], results, Options())
    older = results.file.read_text()
    work([unit("a", 2, {"steps": 20})], results, Options())
    results.file.write_text(older)  # another process, which had read it before
    assert results.find(unit("a", 1, {"steps": 10})) is None
    work([unit("b", 3)], results, Options())
    assert [row["value"] for row in results.rows()] == [2, 3]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_is_none(results, part):
    with pytest.raises(SystemExit, match="give e.g. 1/2"):
        work([], results, Options(part=part))


def test_an_experiment_shows_all_rows_of_its_file(results, capsys):
    def tables(rows):
        return {"sum": f"sum {sum(row['value'] for row in rows)}"}

    drawn = []
    for name, value in (("a", 1), ("b", 2)):
        conduct(
            "some",
            lambda _, name=name, value=value: [unit(name, value)],
            tables,
            lambda rows, folder: drawn.append((len(rows), folder)),
            Options(out=results.file),
        )
    assert "sum 3" in capsys.readouterr().out
    assert drawn == [(1, results.file.parent), (2, results.file.parent)]
    conduct(
        "some", _not_called, tables, lambda *_: None, Options(out=results.file, only_report=True)
    )
    assert "sum 3" in capsys.readouterr().out


def _not_called(options):
    raise AssertionError("--only-report runs nothing")


def test_an_experiment_without_rows_shows_nothing(results, capsys):
    options = Options(out=results.file, only_report=True)
    conduct("some", _not_called, _not_called, lambda *_: None, options)
    assert "no rows yet" in capsys.readouterr().out


def test_rows_that_a_stop_kept_out_of_the_file_come_back(results):
    work([unit("a", 1), unit("b", 2)], results, Options())
    results.file.write_text('{"rows": []}')
    work([unit("a", 1), unit("b", 2)], results, Options())
    assert [row["value"] for row in results.rows()] == [1, 2]


def test_a_quick_run_runs_again(results):
    ran = []
    for _ in range(2):
        work([unit("a", 1, rows=ran)], results, Options(quick=True))
    assert ran == ["a", "a"]


def test_names_that_there_are_not():
    check_choice("models", ("a", "b"), ("a", "b", "c"))
    with pytest.raises(SystemExit, match=r"models=\['d'\]: choose of a, b"):
        check_choice("models", ("a", "d"), ("a", "b"))
