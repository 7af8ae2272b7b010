"""Packed files on the command line: of a quickstart, and of the tensors of any file."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssvq_jax import load
from ssvq_jax.cli.main import main
from ssvq_jax.models import create
from ssvq_jax.tree import leaves_by_path

# Runs an exported program where neither this package nor flax can be imported.
ALONE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ssvq_jax", "flax", "safetensors"):
            raise ImportError(name)

sys.meta_path.insert(0, Hidden())
import jax
import numpy as np

program, images, logits = sys.argv[1:]
exported = jax.export.deserialize(bytearray(open(program, "rb").read()))
np.save(logits, exported.call(np.load(images)))
assert not any(name.startswith("ssvq_jax") for name in sys.modules)
"""
RECIPE = {
    "format": 1,
    "rules": [
        {
            "pattern": ".*weight",
            "quantizer": {"method": "sign_split", "codewords": 4, "dim": 8, "axis": 0},
        },
        {"pattern": ".*", "quantizer": None},
    ],
}


@pytest.fixture(autouse=True)
def users_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def ssvq(capsys):
    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def fails(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def test_a_quickstart_s_packed_model_is_inspected_and_evaluated(
    quickstart, ssvq, data_dir, tmp_path
):
    file = quickstart / "packed" / "ssvq-26x.safetensors"
    results = json.loads((quickstart / "results.json").read_text())["methods"]["ssvq-26x"]
    assert results["file_bytes"] == file.stat().st_size
    printed = ssvq("inspect", file, "--out", tmp_path / "held.json")
    assert "not damaged" in printed
    assert "blocks_codebook" in printed
    held = json.loads((tmp_path / "held.json").read_text())
    stored = sum(sum(leaf["bits"].values()) for leaf in held["leaves"]) // 8
    assert stored == results["stored_bytes"] == held["file_bytes"] - held["header_bytes"]
    assert held["metrics"]["accuracy"] == results["accuracy_after"]
    ssvq("eval", "--weights", file, "--data-dir", data_dir, "--out", tmp_path / "judged")
    (judged,) = (tmp_path / "judged").glob("eval-*.json")
    judged = json.loads(judged.read_text())
    assert judged["after"]["accuracy"] == results["accuracy_after"]
    assert judged["after"]["loss"] == pytest.approx(results["loss_after"], rel=1e-6)
    assert judged["file_ratio"] == results["file_ratio"]


def test_an_exported_program_gives_the_logits_without_this_package(quickstart, ssvq, tmp_path):
    file = quickstart / "packed" / "ssvq-26x.safetensors"
    images = jax.random.normal(jax.random.key(3), (5, 28, 28, 1))
    np.save(tmp_path / "images.npy", images)
    ssvq("export", file, "--to", "stablehlo", "--out", tmp_path / "model.hlo")
    subprocess.run(
        [sys.executable, "-c", ALONE, "model.hlo", "images.npy", "logits.npy"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    with load(file) as packed:
        params = packed.decode()
    logits = jax.jit(lambda p, x: create("deit_digits").apply({"params": p}, x))(params, images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, rtol=1e-5, atol=1e-5)
    # Not the decoded weights: those alone would take 240 kB.
    assert (tmp_path / "model.hlo").stat().st_size < 4 * file.stat().st_size


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_plain_weights_have_the_names_of_the_model(quickstart, ssvq, tmp_path, kind):
    file, out = quickstart / "packed" / "ssvq-26x.safetensors", tmp_path / f"plain.{kind}"
    ssvq("export", file, "--to", kind, "--out", out)
    found = load_file(out) if kind == "safetensors" else np.load(out)
    with load(file) as packed:
        expected = leaves_by_path(packed.decode())
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf)


def test_the_float_model_is_compressed_and_packed_again(quickstart, ssvq, data_dir, tmp_path):
    weights = quickstart / "packed" / "float.safetensors"
    out, smaller = tmp_path / "small", tmp_path / "smaller.safetensors"
    ssvq("compress", "--weights", weights, "--recipe", "ssvq-26x-shared", "--data-dir", data_dir,
         "--out", out)  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    packed = out / "model.safetensors"
    assert results["file_bytes"] == packed.stat().st_size
    printed = ssvq("inspect", packed, "--reference", weights, "--out", tmp_path / "held.json")
    assert "error" in printed
    errors = {
        leaf["name"]: leaf["error"]
        for leaf in json.loads((tmp_path / "held.json").read_text())["leaves"]
    }
    leaves = {leaf["path"]: leaf["error"]["relative"] for leaf in results["leaves"]}
    assert errors["head/kernel"] == pytest.approx(leaves["head/kernel"], rel=1e-3)
    assert errors["head/bias"] == 0
    assert 0 < errors["blocks_codebook"] < 1
    ssvq("pack", "--weights", packed, "--dense-dtype", "float16", "--codec", "entropy",
         "--data-dir", data_dir, "--out", smaller)  # fmt: skip
    assert smaller.stat().st_size < packed.stat().st_size
    with load(smaller) as file:
        assert file.metrics["accuracy"] == pytest.approx(results["after"]["accuracy"], abs=0.01)
        assert file.dense("head/bias").dtype == np.float16
        assert file.leaf("head/bias").dtype == np.float32


@pytest.fixture
def tensors(tmp_path):
    rng = np.random.default_rng(0)
    found = {
        "blocks.0.attn.weight": rng.normal(size=(64, 64)).astype(np.float32),
        "blocks.0.attn.bias": rng.normal(size=64).astype(np.float32),
        "norm.num_batches_tracked": np.array(3, np.int64),
    }
    save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    return found


def test_tensors_of_any_file_keep_their_names(tensors, ssvq, tmp_path):
    weights, out = tmp_path / "model.safetensors", tmp_path / "out"
    printed = ssvq("compress", "--weights", weights, "--recipe", tmp_path / "recipe.json",
                   "--out", out)  # fmt: skip
    assert "blocks.0.attn.weight" in printed
    ssvq("pack", "--weights", out / "model.safetensors", "--dense-dtype", "bfloat16",
         "--out", tmp_path / "half.safetensors")  # fmt: skip
    ssvq("export", tmp_path / "half.safetensors", "--to", "safetensors",
         "--out", tmp_path / "plain.safetensors")  # fmt: skip
    found = load_file(tmp_path / "plain.safetensors")
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in tensors.items()
    }
    bias = jnp.asarray(tensors["blocks.0.attn.bias"]).astype("bfloat16").astype("float32")
    np.testing.assert_array_equal(found["blocks.0.attn.bias"], bias)
    np.testing.assert_array_equal(found["norm.num_batches_tracked"], 3)
    weight = tensors["blocks.0.attn.weight"]
    assert 0 < np.sum((found["blocks.0.attn.weight"] - weight) ** 2) < 0.5 * np.sum(weight**2)
    with load(out / "model.safetensors") as file:
        assert file.plan.entries[0].quantizer.axis == 0
    shown = ssvq("inspect", tmp_path / "half.safetensors", "--reference", weights)
    assert "and the model's state 8" in shown


def test_what_is_refused(tensors, quickstart, tmp_path):
    plain, packed = tmp_path / "model.safetensors", quickstart / "packed" / "ssvq-26x.safetensors"
    recipe = tmp_path / "recipe.json"
    out = tmp_path / "out"
    compress = "compress", "--weights", plain, "--recipe", recipe, "--out", out
    assert "--data is for a model: give --model too" in fails(*compress, "--data", "cifar10")
    assert "is packed already: use `ssvq pack`" in fails(
        "compress", "--weights", self_packed(tensors, tmp_path), "--out", out
    )
    assert "holds no packed model: plain weights can be compressed with" in fails("inspect", plain)
    assert f"{tmp_path} is a folder: give a .safetensors file" in fails("inspect", tmp_path)
    assert "No such file" in fails("inspect", tmp_path / "nothing")
    assert "has no leaf 'head/kernel' of shape" in fails("inspect", packed, "--reference", plain)
    (tmp_path / "home").mkdir()
    home = tmp_path / "home" / "model.safetensors"  # as its own output would be called
    home.write_bytes(plain.read_bytes())
    assert "is where the weights are: give another folder" in fails(
        "compress", "--weights", home, "--recipe", recipe, "--out", tmp_path / "home"
    )
    assert home.read_bytes() == plain.read_bytes()
    assert "--devices is for a model" in fails(*compress, "--devices", "3")
    assert "seed=-1: give 0 to" in fails(*compress, "--seed", "-1")
    assert "holds weights: give another file" in fails("inspect", packed, "--out", packed)
    assert f"out={tmp_path} is a folder" in fails("inspect", packed, "--out", tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(packed.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    assert "is damaged: its checksum does not fit" in fails("inspect", damaged)
    several = fails("eval", "--weights", quickstart)
    assert "holds several models: give one of its files" in several
    assert str(packed) in several
    export = "export", packed, "--to"
    assert "is the packed file: give another" in fails(*export, "npz", "--out", packed)
    assert "plain weights need none" in fails(
        *export, "npz", "--out", tmp_path / "x", "--model", "deit_tiny"
    )
    assert "error: platforms ['gpu']: choose of" in fails(
        *export, "stablehlo", "--out", tmp_path / "x", "--platforms", "gpu"
    )
    assert "is only in" in fails(
        *export, "stablehlo", "--out", tmp_path / "x", "--model", "deit_tiny"
    )
    other = self_packed(tensors, tmp_path, state={"w": np.ones(3)})
    assert "parameters and state both have ['w']" in fails(
        "export", other, "--to", "npz", "--out", tmp_path / "x"
    )
    assert "--which is for a model, and" in fails(
        "pack", "--weights", other, "--which", "best", "--out", tmp_path / "x"
    )
    assert not out.exists()
    assert not (tmp_path / "x").exists()


def test_names_with_brackets_are_shown_as_they_are(tensors, ssvq, tmp_path):
    names = {"model[encoder].weight": tensors["blocks.0.attn.weight"],
             "model[/x].weight": tensors["blocks.0.attn.weight"]}  # fmt: skip
    save_file(names, tmp_path / "names.safetensors")
    (tmp_path / "weights.json").write_text(json.dumps({"format": 1, "rules": RECIPE["rules"][:1]}))
    printed = ssvq("compress", "--weights", tmp_path / "names.safetensors",
                   "--recipe", tmp_path / "weights.json", "--out", tmp_path / "out")  # fmt: skip
    assert "model[encoder].weight" in printed
    assert "model[/x].weight" in ssvq("inspect", tmp_path / "out" / "model.safetensors")


def test_a_file_of_any_tree_is_packed_again(tensors, ssvq, tmp_path):
    """What the tree was does not matter, and what was told is kept."""
    kept = self_packed(tensors, tmp_path, metrics={"accuracy": 0.5}, model={"name": "own"})
    ssvq("pack", "--weights", kept, "--codec", "entropy", "--out", tmp_path / "again.safetensors")
    with load(kept) as first, load(tmp_path / "again.safetensors") as second:
        assert (second.model, second.metrics) == ({"name": "own"}, {"accuracy": 0.5})
        np.testing.assert_array_equal(first.leaf("w"), second.leaf("w"))


def self_packed(tensors, folder, **told):
    import ssvq_jax

    params = {"w": jnp.asarray(tensors["blocks.0.attn.weight"])}
    plan = ssvq_jax.make_plan(params, [("w", ssvq_jax.Uniform(bits=4))])
    packed = plan.finalize(plan.init(jax.random.key(0), params))
    ssvq_jax.save(folder / "packed.safetensors", packed, **told)
    return folder / "packed.safetensors"
