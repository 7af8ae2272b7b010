"""Layouts. The device count is fixed when JAX starts, so eight devices need a process of their own.

The checks are in eight_devices.py.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from ssvq_jax.training.layout import local_layout

CHECKS = pathlib.Path(__file__).with_name("eight_devices.py")


def test_eight_devices():
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)],
        env=environment, cwd=CHECKS.parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "devices=0: it must be a whole number, at least 1"),
        (2.0, "devices=2.0: it must be a whole number"),
        (10_000, r"devices=10000: there are \d+ local devices \(cpu\): pass devices=\d+ or fewer"),
    ],
)
def test_bad_device_counts_are_named(devices, message):
    with pytest.raises(ValueError, match=message):
        local_layout(devices)
