"""k-means over eight devices against one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssvq_jax.clustering import kmeans

KEY = jax.random.key(1)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def problem(n, d):
    return jnp.asarray(RNG.normal(size=(n, d)), jnp.float32)


def positive(*shape):
    return jnp.asarray(RNG.exponential(size=shape), jnp.float32)


# Eight does not divide the rows; of nine, some shares are nothing but padding.
@pytest.mark.parametrize(
    ("n", "init", "kind"),
    [
        (9, "given", {}),
        (1001, "k-means++", {}),
        (1001, "k-means++", {"weights": positive(1001), "mask": positive(1001, 3) < 1.2}),
        (1001, "random", {"weights": positive(1001, 3)}),
        (4000, "given", {"mask": positive(4000, 3) < 1.2}),
    ],
)
def test_the_same_as_one_device(mesh, n, init, kind):
    points = problem(n, 3)
    start = points[:7] if init == "given" else init
    one = kmeans(KEY, points, 7, iterations=4, init=start, **kind)
    eight = kmeans(KEY, points, 7, iterations=4, init=start, mesh=mesh, **kind)
    np.testing.assert_array_equal(one.codes, eight.codes)
    np.testing.assert_allclose(one.centroids, eight.centroids, atol=1e-5)
    np.testing.assert_allclose(one.objective, eight.objective, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one.imbalance, eight.imbalance, rtol=1e-5)
    np.testing.assert_array_equal(one.empty, eight.empty)
    np.testing.assert_array_equal(one.reseeded, eight.reseeded)


def test_large_problems_agree_up_to_the_order_of_additions(mesh):
    points = problem(300_001, 4)
    start = points[:16]
    one = kmeans(KEY, points, 16, iterations=4, init=start)
    eight = kmeans(KEY, points, 16, iterations=4, init=start, mesh=mesh)
    np.testing.assert_allclose(one.objective, eight.objective, rtol=1e-5)
    assert (np.asarray(one.codes) != np.asarray(eight.codes)).mean() < 1e-4


def test_empty_codewords_take_the_worst_rows_of_all_devices(mesh):
    points = jnp.asarray(RNG.normal(size=(100, 2)), jnp.float32).at[77].set(50.0).at[3].set(-40.0)
    start = jnp.array([[0.0, 0.0], [900.0, 0.0], [900.0, 1.0]])
    eight = kmeans(KEY, points, 3, iterations=1, init=start, mesh=mesh)
    np.testing.assert_array_equal(eight.centroids[1:], points[jnp.array([77, 3])])
    assert eight.empty.tolist() == eight.reseeded.tolist() == [2]


def test_quantiles(mesh):
    points = problem(5000, 1)
    one = kmeans(KEY, points, 16, iterations=2, init="quantile")
    eight = kmeans(KEY, points, 16, iterations=2, init="quantile", mesh=mesh)
    np.testing.assert_allclose(one.centroids, eight.centroids, atol=1e-5)


def test_mini_batches_draw_from_every_share(mesh):
    # Eight groups, one a device; a codeword for each is found only if all are drawn from.
    points = jnp.repeat(jnp.arange(8.0), 500)[:, None] * 10
    found = kmeans(KEY, points, 8, iterations=5, batch=60, mesh=mesh)
    np.testing.assert_allclose(np.sort(found.centroids[:, 0]), np.arange(8) * 10)
    assert found.objective[-1] == 0
    assert found.batch == 64  # eight a device


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_points_may_be_cut_already(kind):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    points = problem(4096, 3)
    start = points[:7]
    placed = jax.device_put(points, NamedSharding(mesh, PartitionSpec("rows")))
    one = kmeans(KEY, points, 7, iterations=3, init=start)
    eight = kmeans(KEY, placed, 7, iterations=3, init=start, mesh=mesh, axis="rows")
    np.testing.assert_array_equal(one.codes, eight.codes)


def test_two_axes_and_jit(mesh):
    both = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    points = problem(1000, 3)
    options: dict[str, Any] = {"iterations": 3, "init": points[:7]}
    one = kmeans(KEY, points, 7, **options)
    four = kmeans(KEY, points, 7, mesh=both, **options)
    traced = jax.jit(lambda x: kmeans(KEY, x, 7, mesh=both, **options))(points)
    np.testing.assert_array_equal(one.codes, four.codes)
    np.testing.assert_array_equal(one.codes, traced.codes)
