"""Saving: what cannot be saved is named, and a save that fails leaves the old file."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_models import Layer, pack, same, weight
from safetensors import safe_open

import ssvq_jax as ssvq
from ssvq_jax import Vector, load, make_plan, save

KILLED = """
import os, signal, sys
from pathlib import Path
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
    Path.write_bytes = ssvq_jax.packing.write.write_container = half
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
    with pytest.raises(OSError, match="model.safetensors cannot be written .No such file"):
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


def test_state_that_cannot_come_back_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"the state has nodes of type .*\.Layer: give dict"):
        save(tmp_path / "x", packed, state={"a": Layer(jnp.ones(2))})
    with pytest.raises(ValueError, match="complex64, which the file cannot hold: use one of"):
        save(tmp_path / "x", packed, state={"a": np.complex64([1])})
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


def test_state_of_another_byte_order_is_refused_by_name(packed, tmp_path):
    with pytest.raises(ValueError, match=r"state:mean has dtype >f4, whose byte order"):
        save(tmp_path / "x", packed, state={"mean": np.zeros(3, ">f4")})
    assert list(tmp_path.iterdir()) == []


def test_equal_models_give_equal_bytes(packed, tmp_path):
    code = (
        "import sys, ssvq_jax as ssvq\n"
        "with ssvq.load(sys.argv[1]) as file: packed, state = file.read(), file.state()\n"
        "ssvq.save(sys.argv[2], packed, model={'b': 1, 'a': 2}, metrics={'x': 0.5})"
    )
    save(tmp_path / "0", packed)
    for name in ("1", "2"):  # in processes of their own: hashes are seeded anew
        subprocess.run([sys.executable, "-c", code, tmp_path / "0", tmp_path / name], check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    texts = {save(tmp_path / "3", packed) or (tmp_path / "3").read_bytes() for _ in range(8)}
    assert len(texts) == 1


def test_the_safetensors_library_reads_what_is_written(packed, tmp_path):
    save(tmp_path / "x", packed)
    with safe_open(tmp_path / "x", "numpy") as file, load(tmp_path / "x") as opened:
        assert set(file.metadata()) == {"ssvq_jax", "ssvq_jax_crc32"}
        sizes = sum(file.get_slice(name).get_shape()[0] for name in file.keys())  # noqa: SIM118
        assert sizes > 0
        opened.verify()


def test_dense_leaves_stored_beyond_the_range_of_their_dtype_stay_finite(tmp_path):
    params = {"w": jnp.full(4, jnp.finfo("float16").max, "float16")}
    plan = ssvq.make_plan(params, [(".*", None)])
    packed = plan.finalize(plan.init(jax.random.key(0), params), dense_dtype="bfloat16")
    save(tmp_path / "x", packed)
    with load(tmp_path / "x") as file:
        for decoded in (packed.decode(), file.decode()):
            assert float(decoded["w"][0]) == 65504
