"""What goes into a packed file comes out of it, and takes the bytes that the table counts."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forging import take_apart
from packed_models import Layer, pack, same, weight

import ssvq_jax
from ssvq_jax import LeafSpec, SignSplit, Uniform, load, save

Pair = collections.namedtuple("Pair", ["left", "right"])


TREES = {
    "dictionaries": {"a": {"w": weight()}, "b": weight(1)},
    "int keys, as in nnx": {"layers": {10: {"w": weight()}, 9: {"w": weight(1)}}},
    "text keys that are numbers": {"layers": {"10": {"w": weight()}, "9": {"w": weight(1)}}},
    "both": {"text": {"0": weight()}, "int": {0: weight(1)}},
    "list": [weight(), {"w": weight(1)}],
    "tuple": (weight(), [weight(1)], (weight(2),)),
    "bare leaf": weight(),
    "empty containers": {"a": {}, "b": [], "c": (), "w": weight()},
    "None": {"a": None, "w": weight(), "z": [None, None]},
    "slashes and dots": {"a/b": weight(), "a.b": weight(1), "/": weight(2), "c": {"d/": weight(3)}},
    "empty names": {"": {"": weight()}},
    "other alphabets": {"вес": weight(), "\N{SNOWMAN}\t\"\\": weight(1)},
    "names as in the file": {"nested": weight(), "codes": weight(1), "__metadata__": weight(2)},
    "deep": {"a": [({"b": [{0: (weight(),)}]},)]},
    "nothing": {},
    "only None": None,
}  # fmt: skip


@pytest.mark.parametrize("quantizer", [None, Uniform(bits=3)], ids=["dense", "compressed"])
@pytest.mark.parametrize("name", TREES)
def test_every_structure_comes_back(name, quantizer, tmp_path):
    params = TREES[name]
    packed = pack(params, [(".*", quantizer)] if jax.tree.leaves(params) else [])
    save(tmp_path / "x", packed)
    with load(tmp_path / "x") as file:
        assert same(file.read(), packed)
        assert same(file.decode(), packed.decode())
        assert jax.tree.map(jnp.shape, file.decode()) == jax.tree.map(jnp.shape, params)
        assert [leaf.path for leaf in file.plan.leaves] == list(
            ssvq_jax.tree.leaves_by_path(params)
        )


def test_shared_stacked_and_mixed_leaves_come_back(packed, file):
    with load(file) as opened:
        assert opened.plan == packed.plan
        assert same(opened.read(), packed)
        decoded = opened.decode()
        assert same(decoded, packed.decode())
        for path, leaf in ssvq_jax.tree.leaves_by_path(decoded).items():
            assert same(opened.leaf(path), leaf)
        assert opened.read().streams["stack"]["codebook"].shape == (3, 3, 4)
        assert opened.dense("norm").tobytes() == packed.params["norm"].tobytes()
        opened.verify()


@pytest.mark.parametrize("other", [Layer(weight(), jnp.ones(3)), Pair(weight(), [weight(1)])])
def test_other_nodes_come_back_in_the_structure_of_like(other, tmp_path):
    params = {"layer": other}
    packed = pack(params, [(".*(kernel|left)", Uniform(bits=3)), (".*", None)])
    save(tmp_path / "x", packed)
    with load(tmp_path / "x", like=jax.eval_shape(lambda: params)) as file:
        assert same(file.decode(), packed.decode())
        assert same(file.read(), packed)
    with load(tmp_path / "x") as file:
        kind = type(other).__name__
        for give_back in (file.decode, file.read):
            with pytest.raises(ValueError, match=rf"nodes of type .*\.{kind}: give .*like=params"):
                give_back()
        for path in ssvq_jax.tree.leaves_by_path(params):  # these need no structure
            assert file.leaf(path).shape == file.plan.matching_leaves(params)[path].shape
        file.verify()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": 1.0, "b": 1.0}, "leaf 'b' is only in like=: .* a tree of this model"),
        ({}, "leaf 'a' is only in the file: .* a tree of this model"),
    ],
)
def test_like_of_another_model_is_refused_when_opened(like, message, tmp_path):
    save(tmp_path / "x", pack({"a": weight()}, [(".*", None)]))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x", like=like)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"]
)
def test_every_dtype_of_dense_leaves_comes_back(dtype, tmp_path):
    leaves = {
        "many": weight().astype(dtype), "none": jnp.zeros((0, 3), dtype), "one": jnp.ones((), dtype)
    }  # fmt: skip
    packed = pack(leaves, [(".*", None)])
    save(tmp_path / "x", packed)
    with load(tmp_path / "x") as file:
        assert same(file.decode(), leaves)
        assert same(file.read(), packed)


def test_the_decoded_weight_has_the_dtype_of_the_leaf(tmp_path):
    leaves = {dtype: weight().astype(dtype) for dtype in ("float16", "bfloat16", "float32")}
    packed = pack(leaves, [(".*", Uniform(bits=3))])
    save(tmp_path / "x", packed)
    with load(tmp_path / "x") as file:
        assert same(file.decode(), packed.decode())
        assert jax.tree.map(lambda x: x.dtype.name, file.decode()) == {k: k for k in leaves}


def test_dense_leaves_are_stored_rounded_and_come_back_in_their_dtype(tmp_path):
    leaves = {"a": jnp.array([1.0, 1 / 3, -jnp.inf]), "b": jnp.ones(2, jnp.bfloat16)}
    packed = pack(leaves, [(".*", None)], dense_dtype="float16")
    save(tmp_path / "x", packed)
    with load(tmp_path / "x") as file:
        assert file.dense("a").dtype == np.float16
        assert file.bits() == file.plan.bits("float16") == packed.bits()
        assert file.file_bytes - file.header_bytes == 2 * (3 + 2)
        third = np.float32(np.float16(1 / 3))
        expected = {"a": jnp.array([1.0, third, -jnp.inf]), "b": jnp.ones(2, jnp.bfloat16)}
        assert same(file.decode(), expected)


def test_what_a_dense_dtype_cannot_hold_is_named():
    leaves = {"a": {"b": jnp.array([1.0, 65520.0, -1e38])}}
    with pytest.raises(ValueError, match=r"dense leaf 'a/b' has 2 values beyond .* of float16"):
        pack(leaves, [(".*", None)], dense_dtype="float16")
    assert np.isfinite(pack(leaves, [(".*", None)], dense_dtype="bfloat16").params["a"]["b"]).all()
    with pytest.raises(ValueError, match=r"dense_dtype='int8': choose one of"):
        pack(leaves, [(".*", None)], dense_dtype="int8")


def test_model_and_metrics_come_back(packed, tmp_path):
    model = {"name": "деит", "sizes": [1, 2.5, None, True], "nested": {"a": {"b": "\ud800"}}}
    metrics = {"top1": 0.1 + 0.2, "steps": 2**60, "empty": {}}
    save(tmp_path / "x", packed, model=model, metrics=metrics)
    with load(tmp_path / "x") as file:
        assert file.model == model
        assert file.metrics == metrics
    save(tmp_path / "y", packed)
    with load(tmp_path / "y") as file:
        assert (file.model, file.metrics) == ({}, {})


def test_state_comes_back(packed, tmp_path):
    state = {
        "batch_stats": {"norm": {"mean": jnp.ones(3), "var": jnp.zeros((2, 0))}},
        "counts": [jnp.int32(3), np.array([True, False]), jnp.array([1.5], jnp.bfloat16)],
        "blocks/0/kernel": np.uint8([1, 2]),  # as a compressed leaf is called
    }
    save(tmp_path / "x", packed, state=state)
    with load(tmp_path / "x") as file:
        assert same(file.state(), jax.tree.map(np.asarray, state))
        assert same(file.read(), packed)
        file.verify()
    save(tmp_path / "x", packed)
    with load(tmp_path / "x") as file:
        assert file.state() is None


@pytest.mark.parametrize("codec", ["plain", "entropy"])
def test_the_bytes_are_those_that_the_table_counts(packed, codec, tmp_path):
    save(tmp_path / "x", packed, codec=codec)
    raw = (tmp_path / "x").read_bytes()
    with load(tmp_path / "x") as file:
        assert file.file_bytes == len(raw)
        assert file.header_bytes == 8 + int.from_bytes(raw[:8], "little")
        assert len(raw) - file.header_bytes == file.bits().stored_bytes
        if codec == "plain":
            assert file.bits() == packed.bits() == packed.plan.bits()
        assert sum(map(len, take_apart(raw)[2].values())) == file.bits().stored_bytes


def test_the_table_by_hand(tmp_path):
    # 8x16 in sub-vectors of 4: 32 codes of 2 bits, 4x4 levels and their scale, 128 signs.
    params = {"w": weight(), "b": jnp.ones(3)}
    save(
        tmp_path / "x", pack(params, [("w", SignSplit(4, 4, iterations=2)), (".*", None)])
    )  # fmt: skip
    with load(tmp_path / "x") as file:
        rows = {row.name: row.bits for row in file.bits().rows}
        assert file.file_bytes - file.header_bytes == 8 + 16 + 2 + 16 + 12
    codes = {"codes": 64, "codebook": 128, "codebook_scale": 16, "signs": 128}
    assert rows == {"w": codes, "b": {"float32": 96}}


def test_other_readers_of_safetensors_can_read_it(file):
    from safetensors.numpy import load_file

    tensors = load_file(file)
    assert {name: x.tobytes() for name, x in tensors.items()} == take_apart(file.read_bytes())[2]


def test_leaf_spec_is_what_the_file_says(file):
    with load(file) as opened:
        assert opened.plan.leaves[-1] == LeafSpec("stack", (3, 8, 8), "float32", stacked=1)
