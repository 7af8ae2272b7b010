import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax import LeafSpec, split
from ssvq_jax.tree import fill, leaf_specs, leaves_by_path, punch


def test_paths_of_dicts_sequences_and_attributes():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        kernel: float

    tree = {"layers": [Layer(1.0), Layer(2.0)], 3: (4.0,)}
    assert leaves_by_path({"layers": tree["layers"]}) == {
        "layers/0/kernel": 1.0,
        "layers/1/kernel": 2.0,
    }
    assert leaves_by_path({3: (4.0,)}) == {"3/0": 4.0}


def test_two_leaves_with_one_path_are_an_error():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        leaves_by_path({"a/b": 1.0, "a": {"b": 2.0}})


def test_punch_and_fill_are_inverse_and_keep_the_users_own_nones():
    tree = {"a": {"kernel": 1.0, "bias": None}, "b": [2.0, 3.0]}
    holed = punch(tree, {"a/kernel", "b/1"})
    assert holed == {"a": {"kernel": None, "bias": None}, "b": [2.0, None]}
    assert fill(holed, {"a/kernel": 1.0, "b/1": 3.0}) == tree


def test_integer_leaf_is_named():
    with pytest.raises(ValueError, match=r"leaf 'count' has dtype int32.*nnx\.Param"):
        leaf_specs({"count": jnp.zeros((), jnp.int32), "w": jnp.zeros(3)})


def test_leaf_that_is_no_array_is_named():
    model = eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"leaf 'activation' is a .*equinox\.partition"):
        leaf_specs(model)


def test_spec_of_a_stacked_leaf():
    spec = LeafSpec("w", (2, 3, 8, 4), jnp.bfloat16, stacked=2)
    assert (spec.size, spec.slices, spec.slice_spec().shape) == (192, 6, (8, 4))
    with pytest.raises(ValueError, match="leaf 'w' of shape .*stacked=3"):
        LeafSpec("w", (2, 2), jnp.float32, stacked=3)


def test_split_names_what_is_missing():
    with pytest.raises(ValueError, match=r"lack the collections \['vq_state'\]"):
        split({"params": {}, "vq": {}})


def test_another_byte_order_is_refused_by_name():
    with pytest.raises(ValueError, match=r"leaf 'w' has dtype >f2, whose byte order .* convert"):
        leaf_specs({"w": np.zeros(3, ">f2")})
