import json
import os
import platform
import subprocess
import sys

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
    del environment["JAX_COMPILATION_CACHE_DIR"]  # the suite's
    expected = tmp_path / "cache/ssvq_jax/compiled" / platform.node()
    if own:
        expected = tmp_path / "own"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(expected)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert len(list(tmp_path.rglob("*-cache"))) == len(list(expected.glob("*-cache"))) > 0
