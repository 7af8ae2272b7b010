"""Runs tests/eight_devices in one process that has eight CPU devices; JAX cannot add them later."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("eight_devices")


def test_eight_devices():
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, sorted(FOLDER.glob("*.py")))],
        env=environment | {"JAX_NUM_CPU_DEVICES": "8"}, cwd=FOLDER.parents[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
