"""Bad device counts; the layouts themselves are tested in tests/eight_devices."""

import pytest

from ssvq_jax.training.layout import local_layout


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
