"""A packed model of every kind of leaf and its file; files of random models."""

import jax.numpy as jnp
import numpy as np
import pytest
from packed_models import weight
from random_models import random_model, randomly_packed

from ssvq_jax import Rule, SignSplit, Uniform, Vector, load, save


@pytest.fixture(scope="session")
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
        (r"blocks/\d/kernel", SignSplit(codewords=4, dim=4)),
        Rule("pair/.", Vector(codewords=5, dim=4), share="pairs"),
        Rule("stack", Vector(3, 4, codebook_dtype="float16"), stacked=1),
        ("head", Uniform(bits=3)),
        (".*", None),
    ]
    return randomly_packed(params, rules, np.random.default_rng(0))


@pytest.fixture
def file(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, packed, model={"name": "tiny"}, metrics={"top1": 0.5})
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Bytes of four random models' files, by name."""
    folder, files = tmp_path_factory.mktemp("fuzz"), {}
    for seed, (name, codec, skew, dtype) in enumerate([
        ("plain", "plain", 1, None), ("coded", "entropy", 12, None),
        ("half", "plain", 1, "float16"), ("some coded", "entropy", 5, "bfloat16"),
    ]):  # fmt: skip
        state = {"batch_stats": {"mean": np.arange(4.0)}, "steps": [np.int32(seed)]}
        save(
            folder / name, random_model(seed, skew, dtype), codec=codec, state=state,
            model={"name": name}, metrics={"top1": seed / 8, "history": [1, 2, 3]},
        )  # fmt: skip
        files[name] = (folder / name).read_bytes()
        with load(folder / name) as opened:
            assert bool(opened._stored.header.coded) == (codec == "entropy")
    return files
