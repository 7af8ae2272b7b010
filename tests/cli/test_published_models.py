"""Models of the field on the command line: listed, given weights, packed, judged by images."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ssvq_jax.cli.main import main
from ssvq_jax.models import create, variable_shapes
from ssvq_jax.models.variables import paths_of


@pytest.fixture(autouse=True)
def users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def tensors():
    """A state dict of MobileNetV2 in timm's names, which answers by the colour of the image."""
    draw = np.random.default_rng(0)
    found = {}
    for path, leaf in paths_of(variable_shapes(create("deit_digits"))).items():
        name = path.removeprefix("params/").replace("blocks_", "blocks.").replace("/", ".")
        name = name.replace("patch_embed.", "patch_embed.proj.")
        kind = name.rsplit(".", 1)[-1]
        x = draw.normal(0, 0.1, leaf.shape).astype(np.float32)
        if kind == "kernel":
            x = x.transpose((3, 2, 0, 1) if x.ndim == 4 else (1, 0))
        found[name.replace(".kernel", ".weight").replace(".scale", ".weight")] = x
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "timm.safetensors"
    save_file(tensors(), file)
    return file


@pytest.fixture
def images(tmp_path):
    draw = np.random.default_rng(1)
    for i in range(40):
        folder = tmp_path / "pictures" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (30, 40), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_models_are_listed(capsys):
    main(["models", "list", "deit_tiny", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["parameters"], row["macs"]) == (5_717_416, 1_253_683_200)
    assert row["input"] == "224 x 224 x 3"
    main(["models", "list", "efficientnet_lite0"])
    printed = capsys.readouterr().out
    assert "4,652,008" in printed
    assert "ssvq models fetch efficientnet_lite0" in printed
    assert "bicubic, middle 87.5%" in printed


def judged(capsys, *arguments):
    main(["eval", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_published_weights_are_packed_and_judged_by_images(weights, images, capsys, tmp_path):
    model = ("--model", "deit_digits", "--weights", weights)
    found = judged(capsys, *model, "--images", images)
    assert found["images"] == 40
    assert found["top1"] <= found["top5"] <= 1
    main(["compress", *map(str, model), "--recipe", "uniform-8bit", "--out", "runs/small"])
    packed = "runs/small/model.safetensors"
    small = judged(capsys.readouterr() and capsys, "--packed", packed, "--images", images)
    assert small["images"] == 40
    assert abs(small["top5"] - found["top5"]) < 0.2
    # Predictions without labels, and the same by a table.
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in images.rglob("*.png"):
        file.rename(flat / file.name)
    main(["eval", "--packed", packed, "--images", str(flat), "--out", "guesses"])
    rows = json.loads((tmp_path / "guesses/predictions.json").read_text())["predictions"]
    assert [row["label"] for row in rows] == [None] * 40
    assert all(len(set(row["classes"])) == 5 for row in rows)
    table = "".join(f"{row['file']},{row['classes'][0]}\n" for row in rows)
    (tmp_path / "labels.csv").write_text(table)
    same = judged(capsys.readouterr() and capsys, "--packed", packed, "--images", flat,
                  "--labels", tmp_path / "labels.csv")  # fmt: skip
    assert (same["top1"], same["top5"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "fetch"], "no name: give one of"),
        (["models", "fetch", "deit_tiny"], "no published weights for 'deit_tiny' can be fetched"),
        (["models", "list", "deit"], "model 'deit' is unknown: choose one of"),
        (
            ["eval", "--model", "efficientnet_lite0", "--images", "."],
            "ssvq models fetch efficientn",
        ),
        (["eval", "--model", "deit_digits", "--labels", "x.csv"], "is for --images"),
        (["eval", "--packed", "a", "--weights", "b"], "--packed and --weights are the same"),
        (["compress", "--model", "deit_digits", "--out", "x", "--batch-size", "3"], "give --data"),
        (
            ["compress", "--model", "deit_digits", "--out", "x", "--new-head"],
            "comes without weights",
        ),
    ],
)
def test_errors_are_one_line_that_says_what_to_try(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    text = str(stop.value.code)
    assert text.startswith("ssvq: error: ")
    assert message in text
    assert "\n" not in text


def test_weights_of_other_classes_name_the_option(weights, capsys):
    given = ["compress", "--model", "deit_digits", "--weights", str(weights), "--classes", "3",
             "--recipe", "uniform-8bit", "--out", "runs/x"]  # fmt: skip
    with pytest.raises(SystemExit, match="head.weight .* or begin with a new head .--new-head."):
        main(given)
    main([*given, "--new-head"])
    assert "3.8" in capsys.readouterr().out
