from pathlib import Path


def test_on_eight_devices(on_eight_devices):
    on_eight_devices(Path(__file__).with_name("serving_on_eight_devices.py"))
