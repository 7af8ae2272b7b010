import json
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import serialization
from safetensors.numpy import save_file

from ssvq_jax.models import LoadedModel, fit_weights, load_model, load_tensors, load_weights
from ssvq_jax.models.variables import paths_of

SOURCE = """
import flax.linen as nn
import jax
import jax.numpy as jnp

class Net(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x.mean((1, 2)))
        return nn.Dense(self.classes, name="head")(x)

def net(classes=3):
    return Net(classes)

def trained():
    return Net(), {"params": {"head": {"kernel": jnp.ones((2, 3))}}}

def number():
    return 7

class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((0, 1, 2)))[None]

def mixed():
    return Mixed()

class OnlyTrains(nn.Module):
    how: str = ""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(3)(x.mean((1, 2)))
        if train and self.how == "shape":
            return x[:, :2]
        if train and self.how == "rows":
            return x.mean(0, keepdims=True)
        if train and self.how == "exception":
            raise RuntimeError("no luck")
        if train and self.how == "exit":
            raise SystemExit(0)
        return x

def stops():
    raise SystemExit(0)

def broken():
    raise RuntimeError("no weights here\\nmore text")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working folder."""
    (tmp_path / "my_model.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_a_users_function_gives_a_module(module):
    model = load_model("my_model:net", classes=5)
    variables = model.init(jax.random.key(0), (4, 4, 2))
    assert variables["params"]["head"]["kernel"].shape == (2, 5)
    assert set(variables) == {"params", "batch_stats"}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, model.shapes((4, 4, 2)))
    assert model.image_size is None
    trained = load_model("my_model:trained")
    assert trained.variables["params"]["head"]["kernel"].shape == (2, 3)


def test_registry_models_know_their_image_size():
    assert load_model("deit_digits").image_size == 28
    shapes = load_model("deit_digits", classes=3, scan=True).shapes((28, 28, 1))["params"]
    assert shapes["head"]["kernel"].shape == (48, 3)
    assert shapes["blocks"]["mlp"]["fc1"]["kernel"].shape[0] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_huge", "model 'deit_huge' is unknown: choose one of .* or give your own as"),
        ("no_such_module:net", "'no_such_module' cannot be imported .*No module named"),
        ("my_model:nett", r"has no function 'nett'; it has \['net', 'trained', 'number'"),
        ("my_model:number", "gave a int: return a flax.linen Module"),
        ("my_model:broken", r"the function failed \(RuntimeError: no weights here\)"),
    ],
)
def test_a_model_that_is_not_there(module, name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_images_that_a_model_does_not_take():
    model = LoadedModel("sevens", nn.Sequential([lambda x: x.reshape(len(x), 7)]))
    with pytest.raises(ValueError, match=r"'sevens' cannot be called with images \[b, 8, 8, 1\]"):
        model.shapes((8, 8, 1))


def test_own_models_build_their_own_scan():
    with pytest.raises(ValueError, match="scan is for models of the registry"):
        load_model("my_model:net", scan=True)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x.mean((1, 2)))


MODEL = LoadedModel("head", Head())
TREE = {"params": {"head": {"bias": np.arange(3.0, dtype=np.float32),
                            "kernel": np.ones((2, 3), np.float32)}}}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_weights_come_from_orbax_and_flax_files(tmp_path):
    (tmp_path / "flax.msgpack").write_bytes(serialization.to_bytes(TREE))
    (tmp_path / "bare.msgpack").write_bytes(serialization.to_bytes(TREE["params"]))
    ocp.save(str(tmp_path / "v1"), TREE)
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "v0", {**TREE, "opt_state": [jnp.zeros(2)]})
    for name in ("flax.msgpack", "bare.msgpack", "v1", "v0"):
        found = load_weights(tmp_path / name)
        assert set(found) == {"params"}
        chex.assert_trees_all_equal(fit_weights(MODEL, found, MODEL.shapes((4, 4, 2)), name), TREE)


def test_weights_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no weights at .*nothing"):
        load_weights(tmp_path / "nothing")
    (tmp_path / "text").write_bytes(b"\xc1not msgpack")
    with pytest.raises(ValueError, match="text cannot be read .*: give a run's folder"):
        load_weights(tmp_path / "text")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(4)}, r"w: leaf 'params/head/bias' of model 'head' is \[4\] there, and"),
        ({"extra": np.zeros(1)}, "w has 1 leaves that model 'head' has not, e.g. 'params/head/ext"),
    ],
)
def test_weights_of_another_model(change, message):
    tree = {"params": {"head": {**TREE["params"]["head"], **change}}}
    with pytest.raises(ValueError, match=message):
        fit_weights(MODEL, tree, MODEL.shapes((4, 4, 2)), "w")


def test_missing_weights():
    with pytest.raises(ValueError, match="w has no leaf 'params/head/bias' of model 'head'"):
        fit_weights(MODEL, {"params": {"head": {}}}, MODEL.shapes((4, 4, 2)), "w")


def test_a_model_that_mixes_its_images_is_refused(module):
    with pytest.raises(ValueError, match=r"'my_model:mixed' returns float32\[1, 3\] for 2 images"):
        load_model("my_model:mixed").outputs((4, 4, 2))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", "returns 2 logits in training and 3 in evaluation"),
        ("rows", r"returns float32\[1, 3\] for 2 images in training"),
        ("exception", r"cannot be called .* in training \(RuntimeError: no luck\)"),
        ("exit", r"cannot be called .* in training \(SystemExit: 0\)"),
    ],
)
def test_faults_of_training_mode_are_found_before(module, how, message):
    load_model("my_model:net")
    made = sys.modules["my_model"].OnlyTrains(how)
    model = LoadedModel("mine", made)
    assert model.outputs((4, 4, 2)) == 3
    with pytest.raises(ValueError, match=f"model 'mine' {message}"):
        model.check_training((4, 4, 2))
    LoadedModel("mine", sys.modules["my_model"].OnlyTrains()).check_training((4, 4, 2))


def test_a_model_that_exits_is_an_error(module):
    with pytest.raises(ValueError, match=r"'my_model:stops': the function failed \(SystemExit"):
        load_model("my_model:stops")
    (module / "script.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(ValueError, match=r"'script' cannot be imported .*SystemExit"):
        load_model("script:net")


def test_shapes_of_huge_images_take_no_memory(module):
    model = load_model("my_model:net")
    assert model.outputs((100_000, 100_000, 2)) == 3
    assert model.init(jax.random.key(0), (100_000, 100_000, 2))["params"]["head"]["bias"].shape == (
        3,
    )


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_training_states_of_orbax_are_read_whatever_lies_beside(tmp_path):
    extra = {"step": 3, "name": "run", "rate": 0.5, "none": None, "opt": [jnp.zeros(2)]}
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", TREE | extra)
        checkpointer.save(tmp_path / "nested", {"model": TREE, "step": 3})
        checkpointer.save(tmp_path / "bare", TREE["params"] | {"step": 3})
        checkpointer.save(tmp_path / "deep", {"a": {"b": TREE | extra}, "c": {"d": {"e": TREE}}})
        checkpointer.save(tmp_path / "variables", {"state": {"params": TREE}, "step": 3})
    ocp.save(str(tmp_path / "v1"), TREE | {"step": 3})
    for name, options in (
        ("plain", v0.CheckpointManagerOptions()),
        ("prefixed", v0.CheckpointManagerOptions(step_prefix="ckpt")),
    ):
        with v0.CheckpointManager(tmp_path / name, options=options) as manager:
            manager.save(5, args=v0.args.StandardSave(TREE | {"step": 3}))
    for name in (
        "tree", "nested", "bare", "deep", "variables", "v1", "plain", "plain/5", "plain/5/default",
        "prefixed", "prefixed/ckpt_5", "prefixed/ckpt_5/default",
    ):  # fmt: skip
        chex.assert_trees_all_equal(load_weights(tmp_path / name), TREE)


def test_odd_leaves_of_orbax_keep_their_places(tmp_path):
    params = {
        "blocks": [np.ones(2, np.float32), None, "text", {"w": np.zeros(3, np.float32)}],
        "scale": np.float32(1.5),
        "rate": 2.5,
        "count": 3,
        "none": None,
        "empty": {},
    }
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "all", {"params": params, "batch_stats": {"n": 7}})
        checkpointer.save(tmp_path / "params", params)
    found = paths_of(load_weights(tmp_path / "all"))
    assert {path: np.asarray(leaf).tolist() for path, leaf in found.items()} == {
        "batch_stats/n": 7,
        "params/blocks/0": [1, 1],
        "params/blocks/3/w": [0, 0, 0],
        "params/count": 3,
        "params/rate": 2.5,
        "params/scale": 1.5,
    }
    assert found["params/scale"].dtype == np.float32
    assert sorted(paths_of(load_weights(tmp_path / "params"))) == [
        "params/blocks/0", "params/blocks/3/w", "params/rate", "params/scale",
    ]  # fmt: skip


def test_parts_with_parameters_are_named(tmp_path):
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "two", {"state": TREE, "ema": TREE, "step": 3})
    with pytest.raises(ValueError, match="parameters in several parts, ema, state: save the one"):
        load_weights(tmp_path / "two")


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_several_checkpoints_are_named(tmp_path):
    with v0.CheckpointManager(tmp_path / "run") as manager:
        for step in (5, 6):
            manager.save(step, args=v0.args.StandardSave(TREE))
    with pytest.raises(ValueError, match="checkpoints of the steps 5, 6: give one of these"):
        load_weights(tmp_path / "run")
    with v0.CheckpointManager(tmp_path / "items", item_names=("a", "b")) as manager:
        items = v0.args.Composite(a=v0.args.StandardSave(TREE), b=v0.args.StandardSave(TREE))
        manager.save(1, args=items)
    with pytest.raises(ValueError, match="has trees a, b: give one of these folders"):
        load_weights(tmp_path / "items")


def test_shards_and_float8(tmp_path):
    one, two = np.arange(4, dtype=np.float32), np.ones(2, ml_dtypes.float8_e4m3fn)
    save_file({"x": one}, tmp_path / "model-1.safetensors")
    save_file({"y": two, "z": one}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"x": "model-1.safetensors", "y": "model-2.safetensors", "z": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    for path in (index, tmp_path):
        found = load_tensors(path)
        assert sorted(found) == ["x", "y", "z"]
        assert found["y"].dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(found["z"], one)
    index.unlink()
    with pytest.raises(ValueError, match="without an index .model-1.safetensors, model-2"):
        load_tensors(tmp_path)
    for data, message in (
        ({"weight_map": {"x": "../secret.safetensors"}}, "files in the same folder"),
        ({"weight_map": {"x": ""}}, "names the shard '': shards are .safetensors files"),
        ({"weight_map": {"x": ".."}}, "names the shard '..': shards are"),
        ({"weight_map": {"x": "model.safetensors.index.json"}}, "names the shard 'model"),
        ({"weight_map": {"w": "model-1.safetensors"}}, "lists 1 missing tensors, e.g. 'w'"),
        ({"weight_map": 3}, "is no index of shards"),
        ([], "is no index of shards"),
    ):
        index.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            load_tensors(index)


def test_files_without_weights(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="empty.safetensors holds no tensors"):
        load_tensors(tmp_path / "empty.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="it is a JSON file, which holds no weights"):
        load_weights(tmp_path / "config.json")
