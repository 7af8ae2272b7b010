"""Models with random codes: no clustering, which would take most of the time."""

import jax
import jax.numpy as jnp
import numpy as np

from ssvq_jax import Packed, Rule, SignSplit, Uniform, Vector, make_plan
from ssvq_jax.quantizers.streams import pack_fields


def random_model(seed, skew, dense_dtype=None):
    """A model of all methods."""
    rng = np.random.default_rng(seed)

    def dense(*shape, dtype="float32"):
        return rng.normal(size=shape).astype(np.float32).astype(dense_dtype or dtype)

    params = {
        "blocks": {
            0: {"kernel": np.zeros((8, 32), np.float32), "bias": dense(5)},
            1: {"kernel": np.zeros((8, 32), np.float32), "bias": dense(3, dtype="bfloat16")},
        },
        "pair": [np.zeros((4, 8), np.float32), np.zeros((16, 2), np.float32), None],
        "stack": np.zeros((3, 10, 12), np.float32),
        "head/kernel": np.zeros((16, 60), np.float32),
        "empty": dense(0, 4),
        "scale": dense(),
    }
    rules = [
        (r"blocks/0/kernel", SignSplit(codewords=16, dim=8)),
        (r"blocks/1/kernel", SignSplit(4, 4, codebook_dtype="float32", channel_scale=True)),
        Rule(r"pair/\d", Vector(codewords=5, dim=2, codebook_dtype="float16"), share="pairs"),
        Rule("stack", Vector(codewords=6, dim=5, pad=True), stacked=1),
        ("head/kernel", Uniform(bits=3)),
        (".*", None),
    ]
    return randomly_packed(params, rules, rng, skew)


def randomly_packed(params, rules, rng, skew=1):
    """Packs a tree, its compressed leaves as random codes and codebooks of their shapes.

    The higher the skew, the more does entropy coding gain.
    """
    plan = make_plan(params, rules)
    streams = {}
    for entry in plan.entries:
        lead = entry.spec.shape[: entry.spec.stacked]
        fields = {}
        for stream in entry.storage.streams:
            shape = (*lead, *stream.shape)
            if stream.values is not None:
                found = (stream.values * rng.random(shape) ** skew).astype(stream.dtype)
            elif stream.dtype == "int8":
                found = rng.integers(-127, 128, shape).astype(np.int8)
            else:
                found = (0.5 + rng.random(shape)).astype(jnp.dtype(stream.dtype))
            fields[stream.field] = found
        streams[entry.name] = pack_fields(entry.quantizer, fields, entry.spec)
    holed = jax.tree_util.tree_map_with_path(
        lambda path, x: None if jax.tree_util.keystr(path, simple=True, separator="/")
        in plan.compressed else np.asarray(x), params,
    )  # fmt: skip
    return Packed(plan, holed, streams)
