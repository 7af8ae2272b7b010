"""k-means over a mesh; the checks are in kmeans_on_eight_devices.py."""

import pathlib


def test_eight_devices(on_eight_devices):
    on_eight_devices(pathlib.Path(__file__).with_name("kmeans_on_eight_devices.py"))
