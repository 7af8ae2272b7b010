"""Early stop, restarts, mini-batches, the progress bar, shared compilation, and other libraries."""

import logging

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from ssvq_jax.clustering import assign, kmeans, progress

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def groups(seed, count, *, n=600):
    """Points around so many far centres, of unequal sizes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 3)) * 20
    chosen = rng.integers(count, size=n) % rng.integers(1, count + 1, size=n)
    return jnp.asarray(centres[chosen] + rng.normal(size=(n, 3)), jnp.float32)


def test_stops_when_the_objective_hardly_falls():
    points = groups(0, 5)
    whole = kmeans(KEY, points, 5, iterations=30, init=points[:5])
    stopped = kmeans(KEY, points, 5, iterations=30, init=points[:5], tolerance=1e-3)
    done = int(stopped.iterations)
    falls = 1 - np.asarray(whole.objective[1:]) / np.asarray(whole.objective[:-1])
    assert falls[done - 2] <= 1e-3  # the last one run
    assert (falls[: done - 2] > 1e-3).all()
    assert 2 < done < 30 == int(whole.iterations)
    np.testing.assert_array_equal(stopped.objective[:done], whole.objective[:done])
    assert (stopped.objective[done:] == stopped.objective[done - 1]).all()
    assert (stopped.imbalance[done:] == stopped.imbalance[done - 1]).all()
    shorter = kmeans(KEY, points, 5, iterations=done, init=points[:5])
    np.testing.assert_array_equal(stopped.centroids, shorter.centroids)
    np.testing.assert_array_equal(stopped.codes, shorter.codes)


def test_tolerance_zero_stops_at_the_fixed_point():
    points = jnp.array([[0.0], [1.0], [10.0], [11.0]])
    result = kmeans(KEY, points, 2, iterations=9, init=points[:2], tolerance=0.0)
    assert result.objective[0] > result.objective[1] == result.objective[2] == 0.25
    assert result.iterations == 3


def test_the_best_of_several_starts_is_kept():
    points = groups(1, 12)
    several = kmeans(KEY, points, 8, iterations=4, init="random", restarts=6)
    keys = [KEY, *(jax.random.fold_in(KEY, index) for index in range(1, 6))]
    single = [kmeans(key, points, 8, iterations=4, init="random") for key in keys]
    last = [float(each.objective[-1]) for each in single]
    assert np.ptp(last) > 0.1
    best = single[int(np.argmin(last))]
    np.testing.assert_array_equal(several.codes, best.codes)
    np.testing.assert_allclose(several.centroids, best.centroids, rtol=1e-6)
    np.testing.assert_allclose(several.objective, best.objective, rtol=1e-6)


def test_mini_batches_come_near_and_say_what_they_are():
    points = normal(2, 20_000, 4)
    whole = kmeans(KEY, points, 16, iterations=40)
    parts = kmeans(KEY, points, 16, iterations=40, batch=1000)
    assert (whole.batch, parts.batch) == (None, 1000)
    assert parts.objective[-1] < 1.05 * whole.objective[-1]
    assert len(set(np.asarray(parts.objective).tolist())) == 40
    np.testing.assert_array_equal(parts.codes, assign(points, parts.centroids))
    difference = np.asarray(points - parts.centroids[parts.codes], np.float64)
    np.testing.assert_allclose(parts.objective[-1], (difference**2).sum(axis=1).mean(), rtol=1e-5)


def test_a_mini_batch_moves_by_the_share_of_what_it_brings():
    points = jnp.array([[0.0], [4.0], [7.0]])
    result = kmeans(KEY, points, 1, iterations=5, batch=2, init=jnp.array([[2.0]]))
    rows = [
        jax.random.randint(jax.random.fold_in(KEY, i), (2,), 0, jnp.int32(3), jnp.int32)
        for i in range(5)
    ]
    centroid, members = 2.0, 0
    for row in rows:
        batch = points[row, 0]
        members += 2
        centroid += float((batch - centroid).sum()) / members
    np.testing.assert_allclose(result.centroids, [[centroid]], rtol=1e-6)


def test_mini_batches_with_masks_and_weights():
    points, mask = normal(3, 3000, 3), normal(4, 3000, 3) > -1
    result = kmeans(
        KEY, points, 8, iterations=30, batch=500, mask=mask, weights=jnp.abs(normal(5, 3000))
    )
    whole = kmeans(KEY, points, 8, iterations=30, mask=mask, weights=jnp.abs(normal(5, 3000)))
    assert result.objective[-1] < 1.08 * whole.objective[-1]


def test_the_bar_follows_the_iterations(monkeypatch):
    told = []
    monkeypatch.setattr(
        progress, "_advance", lambda done, objective: told.append((done, objective))
    )
    points = normal(6, 500, 2)
    result = kmeans(KEY, points, 4, iterations=5, init="random", restarts=2, progress=True)
    counts = [int(done) for done, _ in told]
    assert set(counts) == set(range(11))  # with the two starts' first assignments
    assert min(float(each) for _, each in told) == pytest.approx(float(result.objective[-1]))


def test_a_bar_is_shown(capsys):
    kmeans(KEY, normal(7, 500, 2), 4, iterations=5, progress=True)
    shown = capsys.readouterr().out
    assert "k-means" in shown
    assert "5/5" in shown
    assert "objective" in shown


def test_time_is_told_unless_traced():
    points = normal(8, 100, 2)
    assert 0 < kmeans(KEY, points, 4, iterations=2).seconds < 60
    traced = jax.jit(lambda x: kmeans(KEY, x, 4, iterations=2))(points)
    assert np.isnan(traced.seconds)


def test_leaves_of_many_sizes_share_compiled_loops(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in (3001, 4999, 8000):
            points = normal(count, count, 5)
            kmeans(KEY, points, 11, iterations=3)
            assign(points, points[:11])
    compiled = [line for line in caplog.messages if line.startswith("Compiling jit(_run)")]
    assert len(compiled) == 2  # one of kmeans, one of assign


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    # To StableHLO: every operation has a rule there. It compiles nothing.
    shapes = jax.ShapeDtypeStruct((5000, 8), jnp.float32), jax.ShapeDtypeStruct((5000, 8), bool)
    cluster = jax.jit(lambda x, mask: kmeans(KEY, x, 16, iterations=2, mask=mask).codes)
    assert jax.export.export(cluster, platforms=(platform,))(*shapes).platforms == (platform,)


@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_faiss_from_the_same_start(weighted):
    points, start = np.asarray(normal(9, 20_000, 8)), np.asarray(normal(10, 64, 8))
    weights = np.abs(np.asarray(normal(11, 20_000))) if weighted else None
    theirs = faiss.Kmeans(8, 64, niter=10, max_points_per_centroid=20_000)
    theirs.train(points, weights, init_centroids=start)
    ours = kmeans(
        KEY, jnp.asarray(points), 64, iterations=10, init=jnp.asarray(start),
        weights=None if weights is None else jnp.asarray(weights),
    )  # fmt: skip
    index = faiss.IndexFlatL2(8)
    index.add(theirs.centroids)
    _, codes = index.search(points, 1)
    errors = np.square(points - theirs.centroids[codes[:, 0]], dtype=np.float64).sum(axis=1)
    expected = np.average(errors, weights=weights)
    np.testing.assert_allclose(ours.objective[-1], expected, rtol=1e-4)


def test_own_seeding_is_no_worse_than_scikit_learns():
    points = groups(12, 30, n=4000)
    ours, theirs = [], []
    for seed in range(5):
        ours.append(float(kmeans(jax.random.key(seed), points, 16, iterations=10).objective[-1]))
        fitted = KMeans(16, n_init=1, max_iter=10, tol=0, random_state=seed).fit(np.asarray(points))
        assert fitted.inertia_ is not None
        theirs.append(fitted.inertia_ / 4000)
    assert np.mean(ours) < 1.05 * np.mean(theirs)
