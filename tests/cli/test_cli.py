import json
import os
import platform
import subprocess
import sys

import jax
import pytest

from ssvq_jax import Plan
from ssvq_jax.cli.main import main


def test_plan_prints_the_table_and_writes_the_plan(tmp_path, capsys):
    file = tmp_path / "folder" / "plan.json"
    main(["plan", "--model", "deit_tiny", "--recipe", "ssvq-21x", "--out", str(file)])
    printed = capsys.readouterr().out
    assert "blocks_11/mlp/fc2/kernel" in printed
    assert "sign_split k=16 d=8" in printed
    assert "whole model" in printed
    plan = Plan.from_json(json.loads(file.read_text()))
    assert f"{plan.bits().main.bits_per_weight:.4f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "deit_huge"], "model 'deit_huge' is unknown: choose one of"),
        (["plan", "--model", "deit_tiny", "--recipe", "x"], "neither a file nor a preset"),
        (["plan", "--model", "deit_tiny", "--classes", "-1"], "classes=-1: give at least 1"),
        (
            ["quickstart", "--methods", "vq-21x", "vq-21x-shared"],
            "two runs would be called 'vq-21x'",
        ),
        (["quickstart", "--methods", "ssvq-21x-scanned"], "match no leaf"),
        (["quickstart", "--steps", "0"], "steps=0: give at least 1"),
        (
            ["quickstart", "--methods", "vq-21x", "nonsense"],
            "recipe 'nonsense' is neither a file nor a preset: choose one of",
        ),
    ],
)
def test_errors_are_one_line_that_says_what_to_try(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    text = str(stop.value.code)
    assert text.startswith("ssvq: error: ")
    assert message in text
    assert "\n" not in text
    assert not any(tmp_path.iterdir())  # nothing half-done is left


@pytest.mark.parametrize("command", [[], ["quickstart"], ["plan"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: ssvq" in capsys.readouterr().out


def test_quickstart_writes_everything(tmp_path, capsys, data_dir):
    out = tmp_path / "run"
    arguments = ["--out", str(out), "--data-dir", str(data_dir), "--float-steps", "20"]
    arguments += ["--steps", "10", "--methods", "vq-26x-shared", "ssvq-26x-shared", "uniform-2bit"]
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam multiplies integers with floats
        main(["quickstart", *arguments])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == ["vq-26x", "ssvq-26x", "uniform-2bit"]
    assert results["float"]["examples"] == 1500
    for row in results["methods"].values():
        assert {
            "bits_per_weight", "compression_ratio", "file_ratio", "accuracy_before",
            "accuracy_after", "steps", "seconds",
        } <= set(row)  # fmt: skip
        assert f"{row['bits_per_weight']:.3f}" in printed
        assert row["compression_ratio"] == pytest.approx(32 / row["bits_per_weight"])
    methods = results["methods"]
    assert methods["ssvq-26x"]["bits_per_weight"] <= methods["vq-26x"]["bits_per_weight"]
    assert {"versions", "commit", "config", "seconds"} <= set(results)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {record["run"] for record in records} == {"float", *methods}
    for name in ("accuracy.png", "signs.png", "tradeoff.png", "ssvq-26x.plan.json"):
        assert (out / name).stat().st_size > 0


@pytest.mark.parametrize("own", [False, True])
def test_programs_stay_compiled_between_commands(tmp_path, own):
    program = """
import sys
import jax
from ssvq_jax.cli.main import main
sys.argv = ["ssvq", "plan", "--model", "deit_tiny", "--recipe", "ssvq-21x"]
main()
jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))
"""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    expected = tmp_path / "cache/ssvq_jax/compiled" / platform.node()
    if own:
        expected = tmp_path / "own"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(expected)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert len(list(tmp_path.rglob("*-cache"))) == len(list(expected.glob("*-cache"))) > 0
