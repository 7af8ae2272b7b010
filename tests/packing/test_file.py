"""The packed file: what goes in comes out, and what is not right is named."""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forging import forge, put_together, take_apart
from safetensors.numpy import save_file

import ssvq_jax
from ssvq_jax import (
    LeafSpec,
    PackedFileError,
    Rule,
    SignSplit,
    Uniform,
    Vector,
    load,
    make_plan,
    save,
)

Pair = collections.namedtuple("Pair", ["left", "right"])


@flax.struct.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array | None = None


def weight(seed=0, shape=(8, 16)):
    return jax.random.normal(jax.random.key(seed), shape)


def pack(params, rules, **options):
    plan = make_plan(params, rules)
    return plan.finalize(plan.init(jax.random.key(0), params), **options)


def same(ours, theirs):
    """Structure, shapes, dtypes and bits, NaN included."""

    def flat(tree):
        leaves, structure = jax.tree.flatten(tree)
        arrays = map(np.asarray, leaves)
        return structure, [(x.shape, x.dtype, x.tobytes()) for x in arrays]

    return flat(ours) == flat(theirs)


@pytest.fixture(scope="module")
def packed():
    """One leaf of every kind: own codebook, shared, stacked, uniform, and two dense dtypes."""
    params = {
        "blocks": [{"kernel": weight(1), "bias": jnp.arange(3.0)}, {"kernel": weight(2)}],
        "pair": {"a": weight(3), "b": weight(4, (16, 4))},
        "stack": weight(5, (3, 8, 8)),
        "head": weight(6),
        "norm": jnp.array([1.0, -0.0, jnp.nan], jnp.bfloat16),
    }
    rules = [
        (r"blocks/\d/kernel", SignSplit(codewords=4, dim=4, iterations=2)),
        Rule("pair/.", Vector(codewords=5, dim=4, iterations=2), share="pairs"),
        Rule("stack", Vector(3, 4, codebook_dtype="float16", iterations=2), stacked=1),
        ("head", Uniform(bits=3)),
        (".*", None),
    ]
    return pack(params, rules)


@pytest.fixture
def file(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, packed, model={"name": "tiny"}, metrics={"top1": 0.5})
    return path


# Round trips

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
            assert file.leaf(path).shape == file.plan._matching_leaves(params)[path].shape
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


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    "bad",
    [
        {"a": float("nan")}, {"a": np.float32("inf")}, {"a": {1, 2}}, {"a": np.ones(2)},
        {(1, 2): 3}, ["a"], "text", 3,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["model", "metrics"])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(packed, bad, name, file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"{name}: .* is no JSON value|{name} must be a mapping"):
        save(file, packed, **{name: bad})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


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


def test_state_that_cannot_come_back_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"the state has nodes of type .*\.Layer: give dict"):
        save(tmp_path / "x", packed, state={"a": Layer(jnp.ones(2))})
    with pytest.raises(ValueError, match="complex64, which the file cannot hold: use one of"):
        save(tmp_path / "x", packed, state={"a": np.complex64([1])})
    assert list(tmp_path.iterdir()) == []


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


# Leaf by leaf


def owners(opened):
    """A function an owner of bytes that reads what it owns."""
    dense = [leaf.path for leaf in opened.plan.leaves if leaf.path not in opened.plan.compressed]
    entries = {e.name: lambda e=e: opened.streams(e.name) for e in opened.plan.entries}
    return entries | {path: lambda path=path: opened.dense(path) for path in dense}


def test_every_byte_belongs_to_one_owner_that_alone_is_lost_with_it(packed, file):
    raw = bytearray(file.read_bytes())
    with load(file) as opened:
        begin, right = opened.header_bytes, {n: read() for n, read in owners(opened).items()}
    lost = collections.Counter()
    for position in range(begin, len(raw)):
        raw[position] ^= 1 << position % 8
        file.write_bytes(raw)
        raw[position] ^= 1 << position % 8
        with load(file) as opened:  # the header is right
            damaged = []
            for name, read in owners(opened).items():
                try:
                    assert same(read(), right[name])
                except PackedFileError as error:
                    damaged.append((name, str(error)))
            ((name, message),) = damaged
            assert message.startswith(f"{file}: '{name}' is damaged: its checksum does not fit")
            lost[name] += 1
            with pytest.raises(PackedFileError, match=f"'{name}' is damaged"):
                opened.verify()
    assert lost == {row.name: row.stored_bytes for row in packed.bits().rows} | {
        "pairs": sum(x.nbytes for x in packed.streams["pairs"].values())
    }


def test_the_damaged_leaf_is_named_with_its_tensor_and_the_others_load(packed, file):
    outer, header, tensors = take_apart(file.read_bytes())
    codes = bytearray(tensors["codes"])
    codes[-1] ^= 1  # the shared codes come last
    text = json.dumps(header)
    file.write_bytes(put_together(outer, text, tensors | {"codes": bytes(codes)}))
    with load(file) as opened:
        for path in ("pair/a", "pair/b"):
            with pytest.raises(PackedFileError, match="'pairs' is damaged: .* tensor 'codes' or"):
                opened.leaf(path)
        for whole in (opened.decode, opened.read, opened.verify):
            with pytest.raises(PackedFileError, match="'pairs' is damaged"):
                whole()
        for path in ("head", "stack", "blocks/0/kernel", "norm"):
            expected = ssvq_jax.tree.leaves_by_path(packed.decode())[path]
            assert same(opened.leaf(path), expected)


def test_a_leaf_reads_its_own_bytes_alone(file, monkeypatch):
    with load(file) as opened:
        read, asked = opened._stored.container.read, []

        def counted(start, size, what):
            asked.append(size)
            return read(start, size, what)

        monkeypatch.setattr(opened._stored.container, "read", counted)
        opened.leaf("head")
        assert sorted(asked) == [2 * 16, 8 * 16 * 3 // 8]  # steps, levels
        asked.clear()
        opened.leaf("norm")
        assert asked == [6]


def test_a_leaf_that_is_not_there_is_named(file):
    with load(file) as opened, pytest.raises(ValueError, match=r"no leaf 'x'; it has blocks/0/"):
        opened.leaf("x")


def test_sharding(on_eight_devices):
    on_eight_devices(Path(__file__).with_name("file_on_eight_devices.py"))


# Many readers, and files that change meanwhile


def test_threads_read_one_open_file(packed, file):
    expected = ssvq_jax.tree.leaves_by_path(packed.decode())
    wrong = []
    with load(file) as opened:

        def read(paths):
            wrong.extend(path for path in paths if not same(opened.leaf(path), expected[path]))

        paths = list(expected)
        threads = [threading.Thread(target=read, args=(paths[i:] * 5,)) for i in range(len(paths))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_readers_see_the_old_or_the_new_file_while_several_save(tmp_path):
    path = tmp_path / "x"
    versions = [pack({"w": jnp.full(20_000, float(i))}, [(".*", None)]) for i in range(3)]
    save(path, versions[0])
    failures, seen, done = [], [], threading.Event()

    def write(version):
        try:
            for _ in range(15):
                save(path, version)
        except BaseException as error:
            failures.append(error)

    def read():
        try:
            while not done.is_set():
                with load(path) as file:
                    seen.append(np.unique(file.read().params["w"]).tolist())
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(version,)) for version in versions]
    reader = threading.Thread(target=read)
    reader.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert all(values in ([0.0], [1.0], [2.0]) for values in seen)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_replaced_stays_open_as_it_was(packed, file):
    with load(file) as opened:
        save(file, pack({"other": weight()}, [(".*", None)]))
        assert same(opened.read(), packed)
    with load(file) as opened:
        assert [leaf.path for leaf in opened.plan.leaves] == ["other"]


def test_a_file_that_is_cut_off_while_it_is_read(file):
    with load(file) as opened:
        opened.leaf("head")
        os.truncate(file, opened.header_bytes + 1)
        for read in (opened.read, opened.verify):
            with pytest.raises(
                PackedFileError, match=r"tensor '\w+' of '.*' is cut off: .* changed"
            ):
                read()
        message = "tensor 'dense.bfloat16' of 'norm' is cut off: the file changed meanwhile"
        with pytest.raises(PackedFileError, match=message):
            opened.leaf("norm")


def test_a_file_that_is_overwritten_while_it_is_read(file):
    size = file.stat().st_size
    with load(file) as opened:
        opened.leaf("head")
        with file.open("r+b") as other:
            other.write(bytes(size))
        for path in ("head", "norm", "pair/b", "stack"):
            owner = "pairs" if path.startswith("pair") else path
            with pytest.raises(PackedFileError, match=f"'{owner}' is damaged: its checksum"):
                opened.leaf(path)


def test_a_closed_file_is_named(file):
    with load(file) as opened:
        pass
    with pytest.raises(PackedFileError, match=r"'head' cannot be read .*closed"):
        opened.leaf("head")


# Saving

KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.numpy
import ssvq_jax as ssvq
import ssvq_jax.packing.write

file, moment = sys.argv[1:]
with ssvq.load(file) as opened:
    packed = opened.read()

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(*given, **_):
    (new,) = (x for x in given if isinstance(x, Path))
    new.write_text("half a file")
    kill()

if moment == "half written":  # however it is written
    Path.write_bytes = safetensors.numpy.save_file = ssvq_jax.packing.write.save_file = half
if moment == "sync":
    os.fsync = kill
if moment == "rename":
    os.replace = os.rename = Path.replace = Path.rename = kill
if moment == "renamed":
    sync, calls = os.fsync, []
    os.fsync = lambda handle: kill() if calls else calls.append(sync(handle))
ssvq.save(file, packed, metrics={"version": "new"})
"""


def test_a_save_that_is_killed_leaves_the_old_file(packed, tmp_path):
    found, processes = {}, {}
    for moment in ("half written", "sync", "rename", "renamed"):
        (tmp_path / moment).mkdir()
        save(tmp_path / moment / "x", packed, metrics={"version": "old"})
        command = [sys.executable, "-c", KILLED, str(tmp_path / moment / "x"), moment]
        processes[moment] = subprocess.Popen(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE
        )
    for moment, process in processes.items():
        _, log = process.communicate()
        assert process.returncode == -signal.SIGKILL, (moment, log.decode())
        with load(tmp_path / moment / "x") as file:
            assert same(file.read(), packed)
            found[moment] = file.metrics["version"]
        save(tmp_path / moment / "x", packed)  # what was left does not matter
    assert found == {"half written": "old", "sync": "old", "rename": "old", "renamed": "new"}


def test_a_save_that_fails_leaves_the_old_file(packed, file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr("ssvq_jax.atomic._sync", lambda path: path.with_name("none").stat())
    with pytest.raises(OSError, match="none"):
        save(file, packed)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_saving_over_a_file_keeps_nothing_of_it(packed, file):
    save(file, pack({"w": jnp.ones(2)}, [(".*", None)]))
    with load(file) as opened:
        assert same(opened.decode(), {"w": jnp.ones(2)})
        assert (opened.model, opened.metrics) == ({}, {})


def test_a_file_has_the_permissions_of_any_new_file(packed, tmp_path):
    (tmp_path / "other").write_text("")
    save(tmp_path / "x", packed)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.usefixtures("as_installed")
def test_what_cannot_be_saved_is_named(packed, tmp_path):
    with pytest.raises(ValueError, match="codec='zip': choose one of"):
        save(tmp_path / "x", packed, codec="zip")
    with pytest.raises(ValueError, match=r"is a folder: give a file in it, e.g. .*/model.safe"):
        save(tmp_path, packed)
    with pytest.raises(OSError, match="nowhere"):
        save(tmp_path / "nowhere" / "x", packed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codebook_dtype", ["int8", "float16", "float32"])
def test_what_could_not_be_loaded_is_not_saved(codebook_dtype, tmp_path):
    params = {"w": weight(), "v": weight(1)}
    plan = make_plan(params, [(".*", Vector(4, 4, codebook_dtype=codebook_dtype, iterations=2))])
    variables = plan.init(jax.random.key(0), params)
    variables["vq"]["w"]["codebook"] = variables["vq"]["w"]["codebook"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="'w'.* codebook.* not finite"):
        save(tmp_path / "x", plan.finalize(variables))
    assert list(tmp_path.iterdir()) == []


# What is not a packed file, or not right


def refused(file, message, read=lambda file: None):
    """Opens and reads a file that must be refused."""
    with pytest.raises(PackedFileError, match=message) as caught, load(file) as opened:
        read(opened)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"1234567", "7 bytes are no safetensors file"),
        (b"This is a text.", "a header of .* in a file of 15: it is cut off, or no safetensors"),
        ((2**63).to_bytes(8, "little"), r"a header of 9,223,372,036,854,775,808 bytes in a file"),
        ((4).to_bytes(8, "little") + b"true", "the header is not that of a safetensors file"),
        ((4).to_bytes(8, "little") + b"\xff\xff{}", "the header is damaged"),
        ((999).to_bytes(8, "little") + b"[" * 999, "the header is damaged"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "the header is damaged"),
        ((2).to_bytes(8, "little") + b"{}", "holds no packed model: .* `ssvq compress --weights`"),
        (
            (23).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}'[:23],
            "the header is damaged",
        ),
        (
            (24).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}',
            "the header is not that of a safetensors file",
        ),
    ],
)
def test_what_is_no_packed_file(content, message, tmp_path):
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", message)


def test_plain_weights_are_named(tmp_path):
    save_file({"w": np.ones(3)}, tmp_path / "x")
    refused(tmp_path / "x", "is a safetensors file, but holds no packed model: .*--weights")


def test_a_folder_a_pipe_and_nothing_are_named(tmp_path):
    refused(tmp_path, "is a folder: give a .safetensors file")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no regular file")


def test_a_file_that_is_cut_off_or_continued(file):
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for size in (header - 1, header // 2, 9):
        file.write_bytes(raw[:size])
        refused(file, "a header of .* bytes in a file of .*: it is cut off")
    for content in (raw[:-1], raw[:header], raw + b"\0", raw + raw):
        file.write_bytes(content)
        refused(
            file, f"{len(content):,} bytes instead of {len(raw):,}: it is cut off, or has something"
        )


def test_every_changed_byte_of_the_header_is_noticed(packed, file):
    raw = bytearray(file.read_bytes())
    size = 8 + int.from_bytes(raw[:8], "little")
    kept, messages = [], []
    for position in range(size):
        raw[position] ^= 1
        file.write_bytes(raw)
        raw[position] ^= 1
        try:
            with load(file) as opened:
                assert same(opened.read(), packed)  # a space is as good as another
                kept.append(position)
        except PackedFileError as error:
            messages.append(str(error))
    assert kept == []
    assert all(message.startswith(str(file)) for message in messages)


def changed(file, change):
    """Writes the file with a changed header, all checksums and sizes renewed."""
    raw = file.read_bytes()
    _, header, tensors = take_apart(raw)
    change(header)
    file.write_bytes(forge(raw, header, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "format version 2, and this release reads version 1: inst"),
        (lambda h: h.pop("version"), "its header is no JSON of a packed model .*version"),
        (lambda h: h.pop("structure"), "its header does not hold together: 'structure'"),
        (lambda h: h["recipe"].update(format=9), "not a recipe"),
        (lambda h: h["recipe"]["rules"][3]["quantizer"].update(bits=9), "bits=9: .* 2 to 8"),
        (lambda h: h["recipe"]["rules"][3]["quantizer"].update(method="x"), "method 'x' is unk"),
        (lambda h: h["leaves"][0].__setitem__(2, 9), "its header does not hold together"),
        (lambda h: h["leaves"].append(h["leaves"][0]), "leaf 'blocks/0/bias' twice"),
        (lambda h: h["leaves"][1][1].__setitem__(1, -16), "has -16 where leaf 'blocks/0/kernel'"),
        (lambda h: h["leaves"][1].__setitem__(1, [8, 15]), "'blocks/0/kernel' .*dim=4 does not"),
        (lambda h: h["shares"].clear(), "no checksum of 'pairs'"),
        (lambda h: h.update(dtypes=["int8"] * 9), "names a dtype 'int8'"),
        (lambda h: h.update(dtypes=["complex64"] * 9), "names a dtype 'complex64'"),
        (lambda h: h.update(coded={"head": {"step": 1}}), "'head' has no field 'step' to be coded"),
        (lambda h: h.update(metrics=[1]), "model or metrics that are no mappings"),
    ],
)  # fmt: skip
def test_headers_that_do_not_hold_together(change, message, file):
    changed(file, change)
    refused(file, message)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"list": [0, 1]}, "has other leaves than the plan"),
        ({"list": [0, 0, 1, 2, 3, 4, 5, 6]}, "has other leaves than the plan"),
        ({"list": [*range(7), 8]}, "the structure of the tree has a part 8"),
        ({"set": [*range(8)]}, "the structure of the tree has a part"),
        ({"list": [*range(8)]}, "has other leaves than the plan"),
        ({"x": [[]]}, "the structure of the tree has a part"),
        ({"dict": [[0, 0], ["b", {"list": [*range(1, 8)]}]]}, "keys"),  # JAX cannot sort these
        (json.loads("[" * 300 + "]" * 300), "the structure of the tree has a part"),
        (json.loads('{"list":[' * 300 + "]}" * 300), "nested deeper than 200"),
    ],
)  # fmt: skip
def test_structures_of_other_trees(structure, message, file):
    changed(file, lambda header: header.update(structure=structure))
    refused(file, message, lambda opened: opened.decode())
    refused(file, message, lambda opened: opened.read())


def test_swapped_leaves_in_the_structure_are_noticed(tmp_path):
    """The checksums hold; the names in the structure are not those of the leaves."""
    params = {0: weight(), 1: weight(1)}
    save(tmp_path / "x", pack(params, [(".*", None)]))
    changed(tmp_path / "x", lambda h: h.update(structure={"dict": [[0, 1], [1, 0]]}))
    refused(tmp_path / "x", "has other leaves than the plan", lambda opened: opened.decode())


def test_swapped_tensors_are_named(file):
    outer, header, tensors = take_apart(file.read_bytes())
    # As the safetensors header has them: another name on the same bytes.
    ours, theirs = "codebook.int8", "signs"
    swapped = outer | {ours: outer[theirs], theirs: outer[ours]}
    file.write_bytes(put_together(swapped, json.dumps(header), tensors))
    refused(file, f"tensor '({ours}|{theirs})' is .*, and the plan makes it ")


def test_swapped_tensors_of_one_size_and_dtype_are_named(tmp_path):
    params = {"w": weight(0, (16, 16))}  # 2 bits for two weights, as many as their signs take
    save(tmp_path / "x", pack(params, [("w", SignSplit(4, 2, iterations=2))]))
    outer, header, tensors = take_apart((tmp_path / "x").read_bytes())
    assert len(tensors["codes"]) == len(tensors["signs"])
    swapped = outer | {"codes": outer["signs"], "signs": outer["codes"]}
    (tmp_path / "x").write_bytes(put_together(swapped, json.dumps(header), tensors))
    message = "'w' is damaged: its checksum does not fit tensor 'codes' or .*'signs'"
    refused(tmp_path / "x", message, lambda opened: opened.leaf("w"))


def test_swapped_leaves_of_one_shape_are_named(tmp_path):
    params = {"a": weight(), "b": weight(1)}
    save(tmp_path / "x", pack(params, [(".*", None)]))
    outer, header, tensors = take_apart((tmp_path / "x").read_bytes())
    whole = tensors["dense.float32"]
    half = len(whole) // 2
    (tmp_path / "x").write_bytes(
        put_together(outer, json.dumps(header), {"dense.float32": whole[half:] + whole[:half]})
    )
    refused(tmp_path / "x", "'a' is damaged: its checksum", lambda opened: opened.leaf("a"))
    rows = header["leaves"]
    rows[0][5], rows[1][5] = rows[1][5], rows[0][5]  # a checksum is of the name, too
    (tmp_path / "x").write_bytes(
        put_together(outer, json.dumps(header), {"dense.float32": whole[half:] + whole[:half]})
    )
    refused(tmp_path / "x", "'b' is damaged: its checksum", lambda opened: opened.leaf("b"))


@pytest.mark.parametrize(
    ("tensor", "content", "owner", "message"),
    [
        ("codes", b"\xff" * 8 + b"\xff" * 8 + b"\xff" * 99, "stack", "codes go up to 3, .* are 3"),
        ("codes", b"\xff" * 999, "pairs", "its codes go up to 7, and there are 5"),
        ("codebook_scale.bfloat16", b"\x80\x7f" * 9, "pairs", "its codebook_scale is not finite"),
        ("codebook.float16", b"\x00\x7e" * 99, "stack", "its codebook is not finite"),
        ("step.bfloat16", b"\xc0\xff" * 99, "head", "its step is not finite"),
        # Finite, and a weight that is not:
        ("codebook_scale.bfloat16", b"\x7f\x7f" * 9, "pairs", "larger than a float32"),
        ("step.bfloat16", b"\x7f\x7f" * 99, "head", "larger than a float32"),
    ],
)  # fmt: skip
def test_numbers_that_no_encoder_gives_are_named(tensor, content, owner, message, file):
    raw = file.read_bytes()
    _, header, tensors = take_apart(raw)
    assert tensor in tensors
    file.write_bytes(forge(raw, header, tensors | {tensor: content}))
    path = "pair/a" if owner == "pairs" else owner
    refused(file, f"'{owner}' is damaged: .*{message}", lambda opened: opened.leaf(path))


@pytest.mark.parametrize("row", range(8))
@pytest.mark.parametrize("shape", [[2**20, 2**20], [2**62, 2**62, 4], [10**3000] * 2, [1] * 99])
def test_headers_that_claim_terabytes_cost_no_memory(row, shape, file):
    changed(file, lambda header: header["leaves"][row].__setitem__(1, shape))
    tracemalloc.start()
    refused(file, "tensor|leaf", lambda opened: opened.read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * file.stat().st_size


@pytest.mark.parametrize("size", [2**33, 2**44, 2**62])
def test_coded_fields_that_claim_terabytes_cost_no_memory(size, tmp_path):
    """A value that is certain costs no bits: eight bytes could be any number of weights."""
    zeros = jnp.zeros(4096).at[0].set(1.0)
    packed = pack({"w": zeros}, [(".*", Uniform(bits=2, per_channel=False))])
    save(tmp_path / "x", packed, codec="entropy")
    changed(tmp_path / "x", lambda header: header["leaves"][0].__setitem__(1, [size]))
    tracemalloc.start()
    refused(tmp_path / "x", "'w'.*", lambda opened: opened.verify())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18  # nothing near what is claimed; other tests decide what is imported here


def test_a_codebook_that_blows_up_is_refused(tmp_path):
    """A kilobyte of one-bit codes of long codewords is a gigabyte of weights."""
    packed = pack({"w": weight(0, (8, 64))}, [(".*", Vector(2, 64, iterations=2))])
    save(tmp_path / "x", packed)

    def blow_up(header):
        header["recipe"]["rules"][0]["quantizer"].update(dim=2**15)
        header["leaves"][0][1] = [2**14, 2**15]

    changed(tmp_path / "x", blow_up)
    assert (tmp_path / "x").stat().st_size < 2**17
    refused(tmp_path / "x", "'w'", lambda opened: opened.verify())


def test_the_name_of_a_leaf_is_in_its_checksum(file):
    """A header of our own, renamed with right sums of the contents alone: not the leaf."""
    raw = file.read_bytes()
    outer, header, tensors = take_apart(raw)
    row = next(row for row in header["leaves"] if row[0] == "norm")
    row[5] = zlib.crc32(tensors["dense.bfloat16"])
    file.write_bytes(put_together(outer, json.dumps(header), tensors))
    refused(file, "'norm' is damaged: its checksum", lambda opened: opened.leaf("norm"))


def test_leaf_spec_is_what_the_file_says(file):
    with load(file) as opened:
        assert opened.plan.leaves[-1] == LeafSpec("stack", (3, 8, 8), "float32", stacked=1)
