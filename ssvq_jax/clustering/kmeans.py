"""k-means: the public function and its result."""

import contextlib
import dataclasses
import time
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from ssvq_jax.clustering import progress as bars
from ssvq_jax.clustering.checks import (
    check_mass,
    check_modes,
    check_options,
    check_points,
)
from ssvq_jax.clustering.compilation import compiled, tracing
from ssvq_jax.clustering.lloyd import Clustered, draw_batch, lloyd, mini_batches
from ssvq_jax.clustering.problem import block_rows, bucketed, make_problem
from ssvq_jax.clustering.seeding import SEEDINGS


@no_type_check  # pytree functions put shapes, axes or shardings in the place of the arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KMeansResult:
    """Centroids, codes and the course of a k-means run; a pytree.

    The report holds one value an iteration (t of them). Its last values belong to the returned
    centroids and codes, except `empty` and `reseeded`, which tell what the iteration found and
    repaired. After an early stop, the last iteration's values are repeated.

    Attributes:
        centroids: `[k, d]` float32.
        codes: `[n]` int32 in [0, k): for each sub-vector its nearest centroid.
        objective: `[t]` float32, weighted mean squared error per sub-vector:
            sum_i p_i sum_j w_ij (x_ij - c_ij)^2 over sum_i p_i, with p the weights `[n]` (else
            ones, so that the divisor is n) and w the weights `[n, d]` times the mask (else ones).
            With mini-batches all but the last are the batch's, before it moved the centroids; so
            is the imbalance.
        empty: `[t]` int32, codewords without a member of positive weight before the update (with
            mini-batches: in any batch so far).
        reseeded: `[t]` int32, how many of them were moved onto the worst-served sub-vectors: all,
            as far as sub-vectors with an error remained.
        imbalance: `[t]` float32, k sum_c m_c^2 / (sum_c m_c)^2, where m_c is the sum of p over the
            members of codeword c: 1 for equal shares, k if one codeword has all.
        iterations: int32, iterations that were run.
        seconds: float32, wall time with compilation; NaN where `kmeans` is traced.
        batch: sub-vectors of a mini-batch, as many as were drawn; None if every iteration saw all.
    """

    centroids: Float32[Array, "k d"]
    codes: Int32[Array, " n"]
    objective: Float32[Array, " t"]
    empty: Int32[Array, " t"]
    reseeded: Int32[Array, " t"]
    imbalance: Float32[Array, " t"]
    iterations: Int32[Array, ""]
    seconds: Float32[Array, ""]
    batch: int | None = dataclasses.field(default=None, metadata={"static": True})


def kmeans(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    codewords: int,
    *,
    iterations: int,
    init: str | Float[Array, "k d"] = "k-means++",
    weights: Float[Array, " n"] | Float[Array, "n d"] | None = None,
    mask: Bool[Array, "n d"] | None = None,
    restarts: int = 1,
    tolerance: float | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
    progress: bool = False,
) -> KMeansResult:
    """Clusters sub-vectors into k codewords by Lloyd's iterations.

    Minimises sum_i p_i sum_j w_ij (x_ij - c_j(i))^2 over centroids and codes: seed and assign;
    then, each iteration, move every centroid to the weighted mean of its members, re-seed the
    codewords that have none from the sub-vectors with the largest weighted errors (each from
    another one, the worst first), and assign again. No step raises the objective beyond float32
    rounding. Without ``tolerance`` all iterations run.

    Works under `jax.jit`, `jax.vmap` and `jax.lax.map`, where all but the arrays is static.
    (`jax.vmap` runs the repair in every iteration, needed or not.) Memory besides the arguments and
    the codes is that of one tile (some 16 MiB on a CPU), of a transposed copy for up to 2^24
    numbers, and while seeding of some 4 numbers per sub-vector (`"quantile"`: 11); an `[n, k]`
    array never exists. Distances are exact as those of `ssvq_jax.clustering.assign`.
    Called outside of them, problems of up to 131,072 sub-vectors are padded to one of four sizes,
    so that the many leaves of a model share a few compiled loops.

    Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2), 1982.

    Args:
        key: typed PRNG key (`jax.random.key`); unused where `init` gives the centroids.
        points: sub-vectors x, `[n, d]`, any float dtype; arithmetic is float32.
        codewords: k, from 1 to n.
        iterations: number of Lloyd iterations t, 1 or more; with mini-batches, of batches.
        init: `"k-means++"` (greedy), `"random"` (distinct sub-vectors), `"quantile"` (d = 1: equal
            shares of the weight) or centroids to start from, `[k, d]`.
        weights: importance per sub-vector p, `[n]`, or per element w, `[n, d]` (e.g. the diagonal
            of a Hessian).
        mask: `[n, d]` bool; False leaves an element out of distances and means. A coordinate of a
            centroid that no member has keeps its value.
        restarts: seedings to run, one after the other; the result with the least objective is kept.
        tolerance: stop after an iteration that lowers the objective by no more than this share.
        batch: draw so many sub-vectors for each iteration instead of taking all, for problems too
            large to sweep (50 M sub-vectors and more), on a mesh rounded up to a multiple of its
            devices; seeding draws as many. The codes and the last objective are those of all
            sub-vectors all the same.
        mesh: cut the sub-vectors over the devices of a mesh (not under `jax.vmap`; with several
            processes, under `jax.jit` only). The result is that of one device up to the order of
            float additions (with mini-batches, other random batches). `"quantile"` gathers all
            values on every device.
        axis: the mesh axis to cut them over.
        progress: show a progress bar (not while traced).

    Returns:
        Centroids, codes and the report per iteration, see `KMeansResult`.

    Raises:
        ValueError: for k < 1 or k > n, other options out of range, shapes that do not fit
            together, dtypes that are not float (bool for the mask), and, outside `jax.jit`, NaN,
            infinite or negative values, and weights or a mask that leave nothing to cluster.

    Example:
        >>> points = jnp.array([[0.0], [1.0], [10.0], [11.0]])
        >>> start = jnp.array([[0.0], [1.0]])
        >>> result = kmeans(jax.random.key(0), points, 2, iterations=3, init=start)
        >>> result.centroids.tolist(), result.codes.tolist()
        ([[0.5], [10.5]], [0, 0, 1, 1])
        >>> [round(float(value), 2) for value in result.objective]
        [5.39, 0.25, 0.25]
    """
    began = time.perf_counter()
    check_points(points, weights, mask)
    check_mass(weights, mask)
    tolerance = None if tolerance is None else float(tolerance)
    check_options(points, codewords, iterations, init, sorted(SEEDINGS))
    check_modes(init, restarts, tolerance, batch, (codewords, points.shape[0]), mesh, axis)
    start = None
    if not isinstance(init, str):
        start, init = init, "given"
    if mesh is not None:
        # Without explicit shardings in the types: rows that do not divide come back uncut.
        mesh = Mesh(mesh.devices, mesh.axis_names)
    devices = 1 if mesh is None else mesh.shape[axis]
    rows = points.shape[0]
    block = block_rows(rows)
    whole_blocks = 1 if mesh is None else devices * block
    points, weights, mask = bucketed(points, weights, mask, whole_blocks)
    options = {
        "codewords": codewords, "iterations": iterations, "init": init, "restarts": restarts,
        "tolerance": tolerance, "batch": batch, "block": block,
        "watched": progress and not tracing(),
    }  # fmt: skip
    shown = bars.bar(restarts * iterations) if options["watched"] else contextlib.nullcontext()
    with shown:
        arguments = key, points, start, weights, mask, jnp.int32(rows)
        if mesh is None:
            found = _on_one_device(*arguments, **options)
        else:
            found = _on_a_mesh(*arguments, mesh=mesh, axis=axis, **options)
        codes = found.codes[:rows]
        seconds = jnp.float32(jnp.nan)
        if not isinstance(codes, Tracer):
            jax.block_until_ready(codes)
            seconds = jnp.float32(time.perf_counter() - began)
    return KMeansResult(
        found.centroids, codes, **found.report._asdict(),
        iterations=found.iterations, seconds=seconds,
        batch=None if batch is None else -(-batch // devices) * devices,
    )  # fmt: skip


def _run(
    key: Key[Array, ""],
    points: Float[Array, "n d"],
    start: Float[Array, "k d"] | None,
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
    count: Int32[Array, ""],
    *,
    codewords: int,
    iterations: int,
    init: str,
    restarts: int,
    tolerance: float | None,
    batch: int | None,
    block: int,
    watched: bool,
    axis: str | None = None,
) -> Clustered:
    problem = make_problem(points, weights, mask, count, start, block=block, axis=axis)

    def once(key: Key[Array, ""], first: Int32[Array, ""]) -> Clustered:
        if start is not None:
            centroids = start.astype(jnp.float32) * problem.scale
        else:
            seeded = problem
            if batch is not None:
                seeded = draw_batch(jax.random.fold_in(key, iterations), problem, batch)
            centroids = SEEDINGS[init](key, seeded, codewords)

        def watch(done: Int32[Array, ""], objective: Float32[Array, ""]) -> None:
            bars.advance(first + done, problem.unscaled(objective))

        told = watch if watched else None
        if batch is None:
            return lloyd(problem, centroids, iterations=iterations, tolerance=tolerance, watch=told)
        return mini_batches(key, problem, centroids, iterations=iterations, batch=batch, watch=told)

    best = once(key, jnp.int32(0))

    def again(best: Clustered, each: tuple[Array, Array]) -> tuple[Clustered, None]:
        other = once(each[0], each[1])
        better = other.report.objective[-1] < best.report.objective[-1]
        return jax.tree.map(partial(jnp.where, better), other, best), None

    if restarts > 1:
        keys = jax.vmap(partial(jax.random.fold_in, key))(lax.iota(jnp.uint32, restarts)[1:])
        firsts = lax.iota(jnp.int32, restarts)[1:] * iterations
        best = lax.scan(again, best, (keys, firsts))[0]
    report = best.report._replace(objective=problem.unscaled(best.report.objective))
    return best._replace(centroids=best.centroids / problem.scale, report=report)


_STATIC = (
    "codewords", "iterations", "init", "restarts", "tolerance", "batch", "block", "watched",
)  # fmt: skip
_on_one_device = compiled(_run, static_argnames=_STATIC)


def _sharded(*arguments: Any, mesh: Mesh, axis: str, **options: Any) -> Clustered:
    whole, cut = PartitionSpec(), PartitionSpec(axis)
    specs: Any = (whole, cut, whole, whole)
    # What the devices share is the same on all by construction, though not to the checker.
    return jax.shard_map(
        partial(_run, axis=axis, **options),
        mesh=mesh,
        in_specs=(whole, cut, whole, cut, cut, whole),
        out_specs=Clustered(*specs),
        check_vma=False,
    )(*arguments)


_compiled_sharded = compiled(_sharded, static_argnames=(*_STATIC, "mesh", "axis"))


def _on_a_mesh(*arguments: Any, mesh: Mesh, axis: str, **options: Any) -> Clustered:
    key, points, start, weights, mask, count = arguments
    whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (axis,)))
    placed = jax.device_put(
        (key, points, start, weights, mask, count), (whole, cut, whole, cut, cut, whole)
    )
    return _compiled_sharded(*placed, mesh=mesh, axis=axis, **options)
