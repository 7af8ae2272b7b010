"""Small models to pack, and when two are the same."""

import flax.struct
import jax
import numpy as np

from ssvq_jax import make_plan


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
