"""Every refusal says what was given and what to change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ssvq_jax.clustering import assign, kmeans

KEY = jax.random.key(0)
POINTS = jnp.arange(12.0).reshape(6, 2)
FIRST = jnp.eye(6)[0]
CLASH = "weights: zero wherever mask is True: weight an unmasked element"
MESH = Mesh(np.array(jax.devices()[:1]), ("data",))
NAN = POINTS.at[2, 1].set(jnp.nan)


pytestmark = pytest.mark.usefixtures("as_installed")

SHARED = [
    ({"points": POINTS[:, 0]}, r"points: shape \(6,\): pass \[n, d\]"),
    ({"points": POINTS[:, :0]}, r"points: shape \(6, 0\): pass \[n, d\]"),
    ({"points": POINTS.astype(jnp.int32)}, "points: dtype int32 is not float"),
    ({"points": NAN}, "points: NaN or infinity"),
    ({"points": POINTS.at[0, 0].set(-jnp.inf)}, "points: NaN or infinity"),
    ({"points": [[1.0]]}, "points: list is no array: pass jnp.asarray of it"),
    ({"points": np.full((6, 2), 1e300)}, "points: numbers beyond float32: rescale them"),
    ({"weights": jnp.ones(5)}, r"weights: shape \(5,\): pass \(6,\).* or \(6, 2\)"),
    ({"weights": jnp.ones((6, 1))}, r"weights: shape \(6, 1\): pass \(6,\).* or \(6, 2\)"),
    ({"weights": jnp.ones(6, jnp.int32)}, "weights: dtype int32 is not float"),
    ({"weights": NAN}, "weights: NaN or infinity"),
    ({"weights": -POINTS}, "weights: negative entries: pass weights of zero or more"),
    ({"mask": jnp.ones((6, 2))}, "mask: dtype float32 is not bool: pass bool"),
    ({"mask": jnp.ones(6, bool)}, r"mask: shape \(6,\): pass \(6, 2\)"),
]


@pytest.mark.parametrize(("changes", "message"), SHARED)
def test_shared(changes, message):
    arguments = {"points": POINTS} | changes
    with pytest.raises(ValueError, match=message):
        kmeans(KEY, codewords=2, iterations=1, **arguments)
    with pytest.raises(ValueError, match=message):
        assign(centroids=POINTS[:2], **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codewords": 0}, "k=0 codewords asked for: pass 1 or more"),
        ({"codewords": 7}, "k=7 is larger than the number of sub-vectors n=6"),
        ({"iterations": 0}, "iterations=0 asked for: pass 1 or more"),
        (
            {"init": "kmeans++"},
            r"init='kmeans\+\+' is unknown: pass one of \['k-means\+\+', 'quantile",
        ),
        ({"init": POINTS[:3]}, "init has 3 rows: pass k=2 of them"),
        ({"init": "quantile"}, "init='quantile' needs d=1, not d=2: pass init='k-means"),
        ({"codewords": 2.0}, r"k=2.0: pass a whole number \(a Python int\)"),
        ({"iterations": True}, "iterations=True: pass a whole number"),
        ({"restarts": 1.0}, "restarts=1.0: pass a whole number"),
        ({"batch": 3.0}, "batch=3.0: pass a whole number"),
        ({"init": None}, "init: NoneType is no array: pass jnp.asarray of it"),
        ({"weights": jnp.full(6, 1e-40)}, "weights: all zero: give at least one"),
        ({"restarts": 0}, "restarts=0 asked for: pass 1 or more"),
        ({"restarts": 2, "init": POINTS[:2]}, "restarts=2 would all start alike: pass restarts=1"),
        ({"tolerance": 1.0}, r"tolerance=1.0: pass a share of the objective in \[0, 1\)"),
        ({"tolerance": -0.1}, "tolerance=-0.1: pass a share"),
        ({"batch": 1}, "batch=1: pass from k=2 to n=6, or None"),
        ({"batch": 7}, "batch=7: pass from k=2 to n=6, or None"),
        ({"batch": 2, "tolerance": 0.1}, "tolerance: the objectives of random batches say nothing"),
        ({"mesh": MESH, "axis": "rows"}, r"axis='rows' is not of the mesh: pass one of \['data'\]"),
        ({"init": POINTS[:2, :1]}, r"init: shape \(2, 1\): pass \[k, 2\]"),
        ({"init": POINTS[0]}, r"init: shape \(2,\): pass \[k, 2\]"),
        ({"init": POINTS[:2].astype(jnp.int32)}, "init: dtype int32 is not float"),
        ({"init": NAN[2:4]}, "init: NaN or infinity"),
        ({"weights": jnp.zeros(6)}, "weights: all zero: give at least one sub-vector"),
        ({"mask": jnp.zeros((6, 2), bool)}, "mask: False everywhere: leave at least one"),
        (
            {
                "weights": jnp.ones(6).at[1].set(0.0),
                "mask": jnp.zeros((6, 2), bool).at[1].set(True),
            },
            "weights: zero wherever mask is True",
        ),
        (
            {"weights": 1 - jnp.eye(6, 2), "mask": jnp.eye(6, 2, dtype=bool)},
            "weights: zero wherever mask is True",
        ),
    ],
)
def test_kmeans(changes, message):
    arguments = {"codewords": 2, "iterations": 1} | changes
    with pytest.raises(ValueError, match=message):
        kmeans(KEY, POINTS, **arguments)


@pytest.mark.parametrize(
    ("centroids", "message"),
    [
        (POINTS[:2, :1], r"centroids: shape \(2, 1\): pass \[k, 2\]"),
        (POINTS[:0], r"centroids: shape \(0, 2\): pass \[k, 2\] with k >= 1"),
        (POINTS.astype(jnp.int32), "centroids: dtype int32 is not float"),
        (NAN, "centroids: NaN or infinity"),
    ],
)
def test_assign(centroids, message):
    with pytest.raises(ValueError, match=message):
        assign(POINTS, centroids)


def test_traced_values_pass_and_known_ones_inside_jit_do_not():
    assert jax.jit(assign)(NAN, POINTS[:3]).max() < 3
    with pytest.raises(ValueError, match="points: NaN or infinity"):
        jax.jit(lambda centroids: assign(NAN, centroids))(POINTS[:3])
    with pytest.raises(ValueError, match="k=7 is larger"):
        jax.jit(lambda points: kmeans(KEY, points, 7, iterations=1))(POINTS)
