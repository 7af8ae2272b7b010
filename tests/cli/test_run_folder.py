import json

import pytest

from ssvq_jax.cli.run_folder import RunFolder, read_config
from ssvq_jax.training.metrics import MetricsFile

CONFIG = {"command": "train", "steps": 10, "out": "a", "optimizer": {"dense": 0.1}, "names": (1, 2)}


def test_the_same_configuration_goes_on(tmp_path):
    RunFolder(tmp_path / "run", CONFIG)
    again = RunFolder(tmp_path / "run", {**CONFIG, "out": "b", "resume": True, "workers": 3})
    assert again.config["names"] == [1, 2]
    assert read_config(tmp_path / "run")["out"] == "b"


def test_another_configuration_is_refused_and_says_what_differs(tmp_path):
    RunFolder(tmp_path, CONFIG)
    other = {**CONFIG, "steps": 20, "optimizer": {"dense": 0.2}, "new": 1}
    with pytest.raises(ValueError, match="another configuration") as error:
        RunFolder(tmp_path, other)
    text = str(error.value)
    for part in ("steps: 10 there, 20 now", "optimizer.dense: 0.1 there, 0.2 now", "new: None"):
        assert part in text
    assert read_config(tmp_path)["steps"] == 10  # nothing was touched


def test_starting_over_deletes_the_former_run_and_nothing_else(tmp_path):
    RunFolder(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "model" / "3").mkdir(parents=True)
    for name in ("metrics.jsonl", "results.json", "mine.txt"):
        (tmp_path / name).write_text("{}")
    RunFolder(tmp_path, {**CONFIG, "steps": 20}, resume=False)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "mine.txt"]


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: give a folder"):
        RunFolder(tmp_path / "file", CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        RunFolder(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not of a run of ssvq"):
        RunFolder(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has checkpoints, but no config.json"):
        RunFolder(tmp_path, CONFIG)


def test_records_cut_off_by_an_interrupt_are_dropped(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    for run in "ab":
        for step in (10, 20):
            metrics.append({"run": run, "step": step})
    with metrics.path.open("a") as file:
        file.write('{"run": "b", "st')
    assert [r["step"] for r in metrics.resume("b", 10)] == [10]
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert lines == [
        {"run": "a", "step": 10}, {"run": "a", "step": 20}, {"run": "b", "step": 10},
    ]  # fmt: skip
