"""Packed files decoded onto eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from random_models import randomly_packed

from ssvq_jax import Rule, SignSplit, Uniform, Vector, load, save


@pytest.fixture(scope="module")
def packed():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w": jax.random.normal(keys[0], (16, 32)),
        "u": jax.random.normal(keys[1], (16, 8)),
        "a": jax.random.normal(keys[2], (8, 16)),
        "b": jax.random.normal(keys[3], (16, 8)),
        "dense": jnp.arange(24.0),
        "stack": jax.random.normal(keys[4], (8, 8, 8)),
    }
    rules = [
        ("w", SignSplit(codewords=4, dim=8)),
        ("u", Uniform(bits=3)),
        Rule("a|b", Vector(codewords=5, dim=4), share="ab"),
        Rule("stack", Vector(codewords=3, dim=4), stacked=1),
        ("dense", None),
    ]
    return randomly_packed(params, rules, np.random.default_rng(0))


@pytest.fixture
def file(packed, tmp_path):
    save(tmp_path / "x", packed)
    return tmp_path / "x"


def mesh():
    return Mesh(np.array(jax.devices()), ("x",))


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


def check(file, packed, load_sharding, shardings):
    with load(file, sharding=load_sharding) as opened:
        decoded = opened.decode()
        one_by_one = {path: opened.leaf(path) for path in decoded}
    for leaves in (decoded, one_by_one):
        for name, leaf in packed.decode().items():
            assert leaves[name].sharding.is_equivalent_to(shardings[name], leaf.ndim)
            assert leaves[name].dtype == leaf.dtype
            assert np.array_equal(leaves[name], leaf)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x")])
def test_one_sharding_for_all_leaves(file, packed, spec):
    sharding = NamedSharding(mesh(), spec)
    check(file, packed, sharding, dict.fromkeys(packed.decode(), sharding))


def test_a_tree_of_shardings(file, packed):
    cut = NamedSharding(mesh(), PartitionSpec("x"))
    shardings = {
        "w": NamedSharding(mesh(), PartitionSpec(None, "x")),
        "u": SingleDeviceSharding(jax.devices()[3]),
        "a": cut, "b": NamedSharding(mesh(), PartitionSpec()), "dense": cut, "stack": cut,
    }  # fmt: skip
    check(file, packed, shardings, shardings)


def test_no_device_holds_more_than_its_part(file):
    with load(file, sharding=NamedSharding(mesh(), PartitionSpec("x"))) as opened:
        leaf = opened.leaf("w")
    assert [shard.data.shape for shard in leaf.addressable_shards] == [(2, 32)] * 8


def test_without_a_sharding_leaves_go_to_the_default_device(file, packed):
    device = SingleDeviceSharding(jax.devices()[0])
    check(file, packed, None, dict.fromkeys(packed.decode(), device))


def test_shardings_of_another_tree_are_refused(file):
    sharding = NamedSharding(mesh(), PartitionSpec())
    with (
        pytest.raises(ValueError, match="leaf 'a' is only in the file"),
        load(file, sharding={"w": sharding}) as opened,
    ):
        opened.decode()
