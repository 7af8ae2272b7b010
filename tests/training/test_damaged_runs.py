"""The folder of a run, damaged at random: it is read as it was written, or there is an error."""

import gc
import logging
import random
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.cli.run_folder import RunFolder, read_config
from ssvq_jax.packing import load, save
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.metrics import MetricsFile

CONFIG = {"command": "train", "steps": 20, "image_size": 28, "learning_rate": 1e-3}
QUIETLY = (ValueError, OSError)  # what commands show as one line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two checkpoints, the first of them the best; its plan and template."""
    path = tmp_path_factory.mktemp("run") / "run"
    folder = RunFolder(path, CONFIG)
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "bias": jnp.arange(8.0)}
    plan = ssvq.make_plan(params, [("w", ssvq.SignSplit(codewords=4, dim=4)), (".*", None)])
    variables = plan.init(jax.random.key(1), params)
    with folder.checkpoints("model", 0.0) as checkpoints:
        for step, loss in ((10, 0.25), (20, 0.5)):
            folder.metrics.append({"run": "model", "step": step, "loss": loss})
            state = {"variables": variables, "step": jnp.int32(step), "key": jax.random.key(step)}
            notes = {"records": folder.metrics.count("model", step), "name": "demo"}
            checkpoints.save(step, state, plan, data={"batches": step}, notes=notes, loss=loss)
            checkpoints.wait()
    save(path / "model.safetensors", plan.finalize(variables), model={"model": "own:net"})
    return path, plan, state


def observe(path, plan, state):
    """What commands read of a run, by part; an error or a warning in the place of a part."""

    def checkpoint(which):
        with Checkpoints(path / "checkpoints" / "model", read_only=True) as checkpoints:
            found = checkpoints.restore(state, plan, which)
        metrics.check("model", int(found.state["step"]), found.notes["records"])
        arrays = jax.tree.map(
            lambda x: np.asarray(jax.random.key_data(x)) if x.dtype == state["key"].dtype else x,
            found.state,
        )
        return jax.tree.map(lambda x: np.asarray(x).tobytes(), arrays), found.data, found.notes

    def packed():
        with load(path / "model.safetensors") as file:
            return jax.tree.map(lambda x: np.asarray(x).tobytes(), file.decode()), file.model

    metrics = MetricsFile(path / "metrics.jsonl")
    parts = {
        "config": lambda: read_config(path),
        "metrics": lambda: (checkpoint("last"), metrics.read())[1],
        "last": lambda: checkpoint("last"),
        "best": lambda: checkpoint("best"),
        "packed": packed,
    }
    found = {}
    for name, read in parts.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                found[name] = read()
            except (*QUIETLY, UserWarning) as error:
                lines = str(error).splitlines()
                found[name] = None if len(lines) == 1 else f"{len(lines)} lines: {lines}"
    return found


def damage(file, draw):
    """Changes a file in one of the ways in which disks, networks and people do."""
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "flip", "flip", "zero", "cut", "delete", "insert", "swap", "gone"])
    place = draw.randrange(max(len(content), 1))
    length = draw.randrange(1, 65)
    if kind == "gone" or not content:
        file.unlink()
        return
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        content[place : place + length] = bytes(len(content[place : place + length]))
    elif kind == "cut":
        del content[place:]
    elif kind == "delete":
        del content[place : place + length]
    elif kind == "insert":
        content[place:place] = draw.randbytes(length)
    else:
        other = draw.randrange(len(content))
        content[place], content[other] = content[other], content[place]
    file.write_bytes(content)


def silent_differences(run, tmp_path, monkeypatch, seeds):
    path, plan, state = run
    # Records of orbax's log hold what failed, and with it coroutines that could not begin; pytest
    # keeps records beyond the test.
    monkeypatch.setattr(logging.getLogger().manager, "disable", logging.CRITICAL)
    expected = observe(path, plan, state)
    assert None not in expected.values()
    files = sorted(x.relative_to(path) for x in path.rglob("*") if x.is_file())
    files = [x for x in files if x.name != ".lock"]
    differences = []
    for seed in seeds:
        draw = random.Random(seed)
        copy = tmp_path / str(seed)
        shutil.copytree(path, copy)
        name = draw.choice(files)
        damage(copy / name, draw)
        for part, found in observe(copy, plan, state).items():
            if found is not None and found != expected[part]:
                differences.append((seed, str(name), part))
        shutil.rmtree(copy)
    with warnings.catch_warnings():  # coroutines that orbax made and could not begin
        warnings.simplefilter("ignore")
        gc.collect()
    return differences


def test_a_damaged_run_is_never_believed(run, tmp_path, monkeypatch):
    assert silent_differences(run, tmp_path, monkeypatch, range(12)) == []


@pytest.mark.slow
def test_a_thousand_damaged_runs_are_never_believed(run, tmp_path, monkeypatch):
    assert silent_differences(run, tmp_path, monkeypatch, range(1000, 2000)) == []
