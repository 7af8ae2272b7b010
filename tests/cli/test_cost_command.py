import json
import re
import sys

import jax
import pytest
from matplotlib.image import imread

import ssvq_jax as ssvq
from ssvq_jax.cli.cost import bytes_per_s
from ssvq_jax.cli.main import main
from ssvq_jax.hardware import presets, save_accelerator
from ssvq_jax.models import create, param_shapes

OWN = """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(16, (3, 3), strides=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))

def net():
    return Net()
"""


@pytest.fixture(autouse=True)
def users_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def results(capsys, *arguments):
    main(["cost", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_json_of_the_default(capsys):
    found = results(
        capsys, "--model", "deit_tiny", "--recipe", "ssvq-21x", "--accelerator", "edge-ews-64",
        "--against", "int8",
    )  # fmt: skip
    assert found["macs"] == 1_253_683_200
    assert len(found["layers"]) == 74
    assert sum(row["repeats"] for row in found["distinct_layers"]) == 74
    assert found["accelerator"] == presets["edge-ews-64"].to_json()
    latency = found["baseline"]["latency_s"] / found["network"]["latency_s"]
    assert found["speed_up"] == pytest.approx(latency)
    assert 1 < found["speed_up"] < found["weight_bytes_ratio"] < 32 / 8 * 1.5
    assert found["network"]["bound"] in ("compute", "dram")
    shapes = param_shapes(create("deit_tiny"))
    plan = ssvq.make_plan(shapes, ssvq.load_recipe("ssvq-21x"))
    assert found["network"]["weight_dram_bytes"] == plan.bits().stored_bytes
    assert {"commit", "versions"} <= set(found)


def test_tables_and_pictures(tmp_path, capsys):
    main(["cost", "--model", "deit_digits", "--recipe", "uniform-8bit", "--sweep", "--out",
          str(tmp_path / "cost")])  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"blocks_0/mlp/fc1/kernel +\S +2 ", printed)
    assert "uniform-8bit against int8" in printed
    found = json.loads((tmp_path / "cost" / "cost.json").read_text())
    sweep = found["sweep"]
    assert [len(row) for row in sweep["speed_up"]] == [len(sweep["dram_bytes_per_s"])] * 5
    assert sweep["arrays"] == [[16, 16], [32, 32], [64, 64], [128, 128], [256, 256]]
    middle = sweep["dram_bytes_per_s"].index(found["accelerator"]["dram_bytes_per_s"])
    assert sweep["speed_up"][2][middle] == pytest.approx(found["speed_up"])
    for name in ("speed_up", "roofline", "energy"):
        assert imread(tmp_path / "cost" / f"{name}.png").std() > 0.01


def test_bandwidth_batch_and_another_recipe(capsys):
    model = ("--model", "deit_digits")
    slow = results(capsys, *model, "--bandwidth", "0.5GB/s", "--against", "vq-21x")
    assert slow["accelerator"]["dram_bytes_per_s"] == 5e8
    assert slow["against"] == "vq-21x"
    fast = results(capsys, *model, "--bandwidth", "64 B/cycle", "--against", "vq-21x")
    assert fast["accelerator"]["dram_bytes_per_s"] == 64e9
    assert fast["network"]["latency_s"] < slow["network"]["latency_s"]
    more = results(capsys, *model, "--batch", "4")
    assert more["macs"] == 4 * slow["macs"]
    assert more["network"]["latency_cycles"] > slow["network"]["compute_cycles"]


def test_an_own_model_on_an_own_accelerator(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_costly.py").write_text(OWN)
    rules = [{"pattern": "conv/kernel", "quantizer": {"method": "uniform", "bits": 4}},
             {"pattern": ".*", "quantizer": None}]  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 1, "rules": rules}))
    save_accelerator(presets["ethos-u65-512"], tmp_path / "mine.yaml")
    found = results(
        capsys, "--model", "own_costly:net", "--image-size", "32", "--recipe", "recipe.json",
        "--accelerator", "mine.yaml",
    )  # fmt: skip
    assert [row["name"] for row in found["layers"]] == ["conv/kernel", "head/kernel"]
    assert found["macs"] == 16 * 16 * 27 * 16 + 16 * 3
    assert found["layers"][0]["weight_dram_bytes"] == 27 * 16 / 2 + 16 * 2


def test_layers_written_by_hand(tmp_path, capsys):
    layers = [
        {"name": "fc1", "m": 197, "k": 192, "n": 768, "leaves": ["fc1/kernel"]},
        {"name": "experts", "m": 9, "k": 64, "n": 64, "count": 4, "leaves": ["experts"]},
        {"name": "scores", "m": 197, "k": 64, "n": 197, "count": 3},
    ]
    leaves = {"fc1/kernel": 192 * 768, "experts": 4 * 64 * 64, "bias": 768}
    rules = [{"pattern": "fc1/kernel|experts", "quantizer": {"method": "uniform", "bits": 4}},
             {"pattern": ".*", "quantizer": None}]  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 1, "rules": rules}))
    (tmp_path / "layers.json").write_text(json.dumps({"products": layers, "leaves": leaves}))
    given = ("--workload", str(tmp_path / "layers.json"), "--recipe", str(tmp_path / "recipe.json"))
    found = results(capsys, *given)
    stored = (192 * 768 + 4 * 64 * 64) / 2 + (768 + 64) * 2 + 768 * 4
    assert found["network"]["weight_dram_bytes"] == stored
    assert found["macs"] == 197 * 192 * 768 + 4 * 9 * 64 * 64 + 3 * 197 * 64 * 197
    with pytest.raises(SystemExit, match="--workload has its own sizes: leave --model and --batch"):
        main(["cost", *given, "--batch", "2"])
    (tmp_path / "layers.json").write_text('{"layers": []}')
    with pytest.raises(SystemExit, match="layers.json': workload: the keys .'products'. are miss"):
        main(["cost", *given])


def test_a_packed_file_counts_the_bytes_that_it_holds(tmp_path, capsys):
    model = create("deit_digits")
    shapes = param_shapes(model)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    params = structure.unflatten(arrays)
    plan = ssvq.make_plan(params, ssvq.load_recipe("uniform-8bit"))
    packed = plan.finalize(plan.init(jax.random.key(1), params))
    file = tmp_path / "coded.safetensors"
    told = {"model": "deit_digits", "image_shape": [28, 28, 1], "outputs": 10}
    ssvq.save(file, packed, codec="entropy", model=told)
    found = results(capsys, "--weights", str(file))
    with ssvq.load(file) as opened:
        stored = opened.bits().stored_bytes
    assert stored < plan.bits().stored_bytes
    assert found["network"]["weight_dram_bytes"] == pytest.approx(stored)
    assert found["network"]["decode_cycles"] > 0
    with pytest.raises(SystemExit, match="leaf .* has .* weights in the model and .* in the plan"):
        main(["cost", "--weights", str(file), "--model", "deit_cifar", "--image-size", "32"])
    with pytest.raises(SystemExit, match="--recipe and --weights: a packed file has its own plan"):
        main(["cost", "--weights", str(file), "--recipe", "vq-21x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model: give --model NAME, --model module:function, --weights"),
        (["--model", "deit_huge"], "model 'deit_huge' is unknown: choose one of"),
        (["--model", "deit_tiny", "--batch", "0"], "batch=0: give at least 1"),
        (["--model", "deit_tiny", "--bandwidth", "4"], "give a positive number with its unit"),
        (["--model", "deit_tiny", "--bandwidth", "0GB/s"], "bandwidth='0GB/s': give a positive"),
        (["--model", "deit_tiny", "--accelerator", "x"], "neither a file nor a preset: choose one"),
        (["--model", "deit_tiny", "--against", "int9"], "or one of ['float16', 'float32', 'int4'"),
        (["--model", "deit_tiny", "--recipe", "ssvq-21x-scanned"], "match no leaf"),
        (["--model", "deit_tiny", "--image-size", "-1"], "images of size -1"),
        (
            ["--model", "resnet18", "--image-size", "1000000000"],
            "with --batch 1 and images of 1000000000 x 1000000000 (--image-size): product 'conv1",
        ),
        (["--weights", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_errors_are_one_line_that_says_what_to_try(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["cost", *arguments])
    text = str(stop.value.code)
    assert text.startswith("ssvq: error: ")
    assert message in text
    assert "\n" not in text
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB/s", 4e9), ("500 MB/s", 5e8), ("1.5e9B/s", 1.5e9), ("2kB/s", 2e3), ("3B/cycle", 6e9)],
)
def test_bandwidths(text, expected):
    assert bytes_per_s(text, 2e9) == expected


@pytest.mark.parametrize("text", ["", "4", "GB/s", "-4GB/s", "4GB", "4Gb/s", "1.2.3GB/s", "infB/s"])
def test_bandwidths_without_unit_or_number(text):
    with pytest.raises(ValueError, match="as 4GB/s, 500MB/s or 4B/cycle"):
        bytes_per_s(text, 1e9)
