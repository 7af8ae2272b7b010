import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import serialization

from ssvq_jax.models import LoadedModel, fit_weights, load_model, load_weights

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
