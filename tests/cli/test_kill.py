"""Kills the quickstart with SIGKILL at three moments and resumes it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

ARGUMENTS = [
    "quickstart", "--float-steps", "120", "--steps", "60", "--save-seconds", "0",
    "--methods", "vq-26x-shared", "ssvq-26x-shared",
]  # fmt: skip
RUNS = ("float", "vq-26x", "ssvq-26x")
PROGRAM = "import sys; from ssvq_jax.cli.main import main; main(sys.argv[1:])"


@pytest.fixture
def start(data_dir):
    """Starts a quickstart in a process of its own."""

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, *ARGUMENTS, "--data-dir", str(data_dir)]
        with (out.parent / f"{out.name}.log").open("a") as log:
            return subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=log)

    return start


def wait_for(process, condition, seconds=180):
    """Polls until a condition holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run did not get so far"
        time.sleep(0.0005)


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def timeless(data):
    """A copy without times, folders, and checksums over them."""
    if isinstance(data, dict):
        return {
            key: timeless(value)
            for key, value in data.items()
            if not key.startswith("seconds") and key not in ("out", "steps_per_second", "checksum")
        }
    return data


def arrays(folder):
    """All arrays of a run's last checkpoint, as bytes."""
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return array.dtype.name, array.shape, array.tobytes()

    found = ocp.load_checkpointables(str(folder / str(step)))["state"]
    return step, {name: raw(leaf) for name, leaf in found.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_killed_quickstart_resumes_to_the_same_bits(start, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait() == 0, (tmp_path / "whole.log").read_text()[-2000:]

    moments = random.Random(os.getpid())  # another each time
    metrics = cut / "metrics.jsonl"

    def records():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def saving():
        return list(cut.glob("checkpoints/*/*orbax-checkpoint-tmp*"))

    process = start(cut)  # first: in the middle of the float run
    first = moments.randint(1, 11)
    wait_for(process, lambda: records() >= first)
    time.sleep(moments.random() * 0.05)
    kill(process)

    process = start(cut)  # second: during a save
    done = records()
    while True:
        wait_for(process, lambda: records() > done and saving())
        process.send_signal(signal.SIGSTOP)
        if saving():  # and not over at just this moment
            break
        process.send_signal(signal.SIGCONT)
    kill(process)
    assert saving()

    process = start(cut)  # third: in a compressed run
    third = moments.randint(13, 22)
    wait_for(process, lambda: records() >= third)
    time.sleep(moments.random() * 0.05)
    kill(process)
    assert not (cut / "results.json").exists() or len(
        json.loads((cut / "results.json").read_text())["methods"]
    ) < len(RUNS)

    assert start(cut).wait() == 0, (tmp_path / "cut.log").read_text()[-2000:]
    expected, found = (json.loads((x / "results.json").read_text()) for x in (whole, cut))
    assert timeless(found) == timeless(expected)
    for run in RUNS:
        assert arrays(cut / "checkpoints" / run) == arrays(whole / "checkpoints" / run)
    lines = [
        [timeless(json.loads(line)) for line in (x / "metrics.jsonl").read_text().splitlines()]
        for x in (whole, cut)
    ]
    assert sorted(map(str, lines[0])) == sorted(map(str, lines[1]))
    assert not saving()  # what was half-written is gone
