from pathlib import Path


def test_on_eight_devices(on_eight_devices):
    on_eight_devices(Path(__file__).with_name("eight_devices.py"))
