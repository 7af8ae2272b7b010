import json

import pytest

from ssvq_jax.cli.run_folder import RunFolder, read_config
from ssvq_jax.training.metrics import MetricsFile

CONFIG = {"command": "train", "steps": 10, "out": "a", "optimizer": {"dense": 0.1}, "names": (1, 2)}


def begin(path, config):
    """A run that has come to its first record."""
    RunFolder(path, config)
    MetricsFile(path / "metrics.jsonl").append({"run": "a", "step": 1})


def test_the_same_configuration_goes_on(tmp_path):
    begin(tmp_path / "run", CONFIG)
    again = RunFolder(tmp_path / "run", {**CONFIG, "out": "b", "resume": True, "workers": 3})
    assert again.config["names"] == [1, 2]
    assert read_config(tmp_path / "run")["out"] == "b"


def test_another_configuration_is_refused_and_says_what_differs(tmp_path):
    begin(tmp_path, CONFIG)
    other = {**CONFIG, "steps": 20, "optimizer": {"dense": 0.2}, "new": 1}
    with pytest.raises(ValueError, match="another configuration") as error:
        RunFolder(tmp_path, other)
    text = str(error.value)
    for part in ("steps: 10 there, 20 now", "optimizer.dense: 0.1 there, 0.2 now", "new: None"):
        assert part in text
    assert read_config(tmp_path)["steps"] == 10  # nothing was touched


def test_what_left_nothing_may_be_corrected(tmp_path):
    RunFolder(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "model").mkdir(parents=True)
    RunFolder(tmp_path, {**CONFIG, "steps": 20})
    assert read_config(tmp_path)["steps"] == 20
    (tmp_path / "checkpoints" / "model" / "10").mkdir()
    with pytest.raises(ValueError, match="steps: 20 there, 10 now"):
        RunFolder(tmp_path, CONFIG)


def test_weights_count_and_not_where_they_are(tmp_path):
    weights = {"from": "runs/a", "crc32": "01234567"}
    begin(tmp_path, {**CONFIG, "weights": weights})
    RunFolder(tmp_path, {**CONFIG, "weights": {**weights, "from": "/home/me/runs/a"}})
    with pytest.raises(ValueError, match="weights: '01234567' there, '89abcdef' now"):
        RunFolder(tmp_path, {**CONFIG, "weights": {**weights, "crc32": "89abcdef"}})


def test_another_command_is_told_in_a_word(tmp_path):
    begin(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"configuration \(a run of ssvq train\)"):
        RunFolder(tmp_path, {"command": "finetune", "steps": 3})


def test_two_runs_at_once_are_refused(tmp_path):
    first = RunFolder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="is in use by another process"):
        RunFolder(tmp_path, CONFIG)
    assert first.config["steps"] == 10
    del first
    RunFolder(tmp_path, CONFIG)


def test_starting_over_deletes_the_former_run_and_nothing_else(tmp_path):
    begin(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "model" / "3").mkdir(parents=True)
    for name in ("eval-test-best.json", "results.json", "ssvq.plan.json", "signs.png", "mine.txt"):
        (tmp_path / name).write_text("{}")
    RunFolder(tmp_path, {**CONFIG, "steps": 20}, resume=False)
    assert sorted(x.name for x in tmp_path.iterdir()) == [".lock", "config.json", "mine.txt"]


@pytest.mark.parametrize("resume", [True, False])
def test_folders_that_are_no_runs_are_left_alone(tmp_path, resume):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be a folder"):
            RunFolder(path, CONFIG, resume=resume)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has checkpoints, but no config.json"):
        RunFolder(tmp_path, CONFIG, resume=resume)
    (tmp_path / "config.json").write_text('{"my": "project"}')
    with pytest.raises(ValueError, match="is not of a run of ssvq"):
        RunFolder(tmp_path, CONFIG, resume=resume)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        RunFolder(tmp_path, CONFIG, resume=resume)
    assert (tmp_path / "checkpoints").exists()


def test_records_cut_off_by_an_interrupt_are_dropped(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    for run in "ab":
        for step in (10, 20):
            metrics.append({"run": run, "step": step})
    with metrics.path.open("a") as file:
        file.write('{"run": "b", "st')
    assert len(metrics.read()) == 4
    assert [r["step"] for r in metrics.resume("b", 10)] == [10]
    assert metrics.path.read_text().endswith("\n")
    assert metrics.read() == [
        {"run": "a", "step": 10}, {"run": "a", "step": 20}, {"run": "b", "step": 10},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        '5', '{}', '{"run": "b"', '[' * 5000, '{"run": "b", "step": 10}',
        '{"run": "a", "step": 21, "checksum": "00000000"}', '\u00e9',
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(tmp_path, line):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"run": "a", "step": 10})
    with metrics.path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    metrics.append({"run": "a", "step": 20})
    with pytest.raises(
        ValueError, match=r"line 2 of .*metrics.jsonl .* delete it to go on"
    ) as error:
        metrics.read()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_files_of_a_run_that_are_no_text(tmp_path, name):
    begin(tmp_path, CONFIG)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{name} is not text in UTF-8"):
        RunFolder(tmp_path, CONFIG).metrics.read()
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} cannot be read .it is a folder"):
        RunFolder(tmp_path, CONFIG).metrics.read()


@pytest.mark.parametrize(
    "change",
    [lambda x: x | {"steps": 11}, lambda x: {"command": "train"}, lambda x: x | {"steps": "ten"}],
)
def test_a_config_that_is_not_what_was_written_is_refused(tmp_path, change):
    begin(tmp_path, CONFIG)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=r"config.json .*(checksum|edited).*--no-resume"):
        RunFolder(tmp_path, CONFIG)
    RunFolder(tmp_path, CONFIG, resume=False)  # starts over
    assert read_config(tmp_path) == {**CONFIG, "names": [1, 2]}
