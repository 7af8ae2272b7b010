"""Lloyd's iterations, over all sub-vectors or random batches of them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Key

from ssvq_jax.clustering.problem import Problem
from ssvq_jax.clustering.sweep import Sums, move, no_sums, sweep

# Called with the number of iterations made and the objective of the scaled points.
Watch = Callable[[Int32[Array, ""], Float32[Array, ""]], None]


class Report(NamedTuple):
    """One value an iteration, `[t]` each; see `ssvq_jax.clustering.KMeansResult`."""

    objective: Float32[Array, " t"]
    empty: Int32[Array, " t"]
    reseeded: Int32[Array, " t"]
    imbalance: Float32[Array, " t"]


class Clustered(NamedTuple):
    """Where the iterations ended: scaled centroids, codes, report and number of iterations."""

    centroids: Float32[Array, "k d"]
    codes: Int32[Array, " n"]
    report: Report
    iterations: Int32[Array, ""]


def lloyd(
    problem: Problem,
    start: Float32[Array, "k d"],
    *,
    iterations: int,
    tolerance: float | None,
    watch: Watch | None,
) -> Clustered:
    """Iterates over all sub-vectors.

    Args:
        problem: the sub-vectors.
        start: centroids, scaled as the problem says.
        iterations: most iterations, 1 or more.
        tolerance: stop after an iteration that lowers the objective by no more than this share of
            it; None to run all of them.
        watch: told of every iteration, if given.
    """

    class State(NamedTuple):
        done: Array
        stop: Array
        centroids: Array
        sums: Sums
        codes: Array
        report: Report

    def iterate(state: State) -> State:
        started = state.done >= 0  # the first sums are zero, so that nothing moves yet
        empty = started & (state.sums.members == 0)
        centroids, reseeded = move(problem, state.centroids, state.codes, state.sums, empty=empty)
        sums, codes = sweep(problem, centroids, state.codes)
        found = Report(sums.objective, empty.sum(dtype=jnp.int32), reseeded, sums.imbalance)
        if watch is not None:
            watch(state.done + 1, sums.objective)
        stop = jnp.bool_(False)
        if tolerance is not None:
            before = state.sums.objective
            stop = started & (before - sums.objective <= jnp.float32(tolerance) * before)
        report = _record(state.report, jnp.maximum(state.done, 0), found)
        return State(state.done + 1, stop, centroids, sums, codes, report)

    # The assignment to the first centroids is a round of the loop too: its code exists once.
    codes, sums = jnp.zeros(problem.rows, jnp.int32), no_sums(problem, start)
    state = State(jnp.int32(-1), jnp.bool_(False), start, sums, codes, _blank(iterations))
    state = lax.while_loop(lambda state: (state.done < iterations) & ~state.stop, iterate, state)
    report = _filled(state.report, state.done)
    return Clustered(state.centroids, state.codes, report, state.done)


def mini_batches(
    key: Key[Array, ""],
    problem: Problem,
    start: Float32[Array, "k d"],
    *,
    iterations: int,
    batch: int,
    watch: Watch | None,
) -> Clustered:
    """Iterates over random batches, and at last assigns all sub-vectors.

    A centroid is the mean of all that were assigned to it so far, each at its time: it moves by the
    batch's pull over the mass so far. Codewords that got nothing in any batch yet are re-seeded
    from the batch's worst-served sub-vectors.

    Sculley, "Web-scale k-means clustering", WWW 2010, algorithm 1, a batch at a time.

    Args:
        key: typed PRNG key.
        problem: the sub-vectors.
        start: centroids, scaled as the problem says.
        iterations: number of batches.
        batch: sub-vectors of one, over all devices; drawn with replacement.
        watch: told of every batch, if given.
    """

    class State(NamedTuple):
        centroids: Array
        mass: Array
        members: Array
        report: Report

    def iterate(done: Int32[Array, ""], state: State) -> State:
        part = draw_batch(jax.random.fold_in(key, done), problem, batch)
        sums, codes = sweep(part, state.centroids, jnp.zeros(part.rows, jnp.int32))
        mass, members = state.mass + sums.mass, state.members + sums.members
        empty = members == 0
        centroids, reseeded = move(part, state.centroids, codes, sums, mass=mass, empty=empty)
        found = Report(sums.objective, empty.sum(dtype=jnp.int32), reseeded, sums.imbalance)
        if watch is not None:
            watch(done + 1, sums.objective)
        return State(centroids, mass, members, _record(state.report, done, found))

    nothing = no_sums(problem, start)
    state = State(start, nothing.mass, nothing.members, _blank(iterations))
    state = lax.fori_loop(jnp.int32(0), jnp.int32(iterations), iterate, state)
    sums, codes = sweep(problem, state.centroids, jnp.zeros(problem.rows, jnp.int32))
    last = state.report._replace(
        objective=state.report.objective.at[-1].set(sums.objective),
        imbalance=state.report.imbalance.at[-1].set(sums.imbalance),
    )
    return Clustered(state.centroids, codes, last, jnp.int32(iterations))


def draw_batch(key: Key[Array, ""], problem: Problem, batch: int) -> Problem:
    """Draws sub-vectors at random, with replacement, as a problem of its own.

    Every device draws from its own share as often as the others; weights make up for shares that
    are partly padding.
    """
    devices, weights = problem.devices, problem.weights
    size = -(-batch // devices)
    here = jnp.clip(problem.count - problem.offset, 0, problem.rows)
    if problem.axis is not None:
        key = jax.random.fold_in(key, lax.axis_index(problem.axis))
        share = here.astype(jnp.float32) * (devices / problem.count.astype(jnp.float32))
        ones = jnp.ones(problem.rows, jnp.float32)
        weights = share * (ones if weights is None else weights.astype(jnp.float32))
    rows = jax.random.randint(key, (size,), 0, jnp.maximum(here, 1), jnp.int32)
    points, weights, mask = jax.tree.map(
        lambda values: values[rows], (problem.points, weights, problem.mask)
    )
    count = jnp.int32(size * devices)
    return dataclasses.replace(
        problem,
        points=points,
        weights=weights,
        mask=mask,
        count=count,
        columns=None,
        block=1,  # small enough to be sampled in one level
    )


def _blank(iterations: int) -> Report:
    number, whole = jnp.zeros(iterations, jnp.float32), jnp.zeros(iterations, jnp.int32)
    return Report(number, whole, whole, number)


def _record(report: Report, done: Int32[Array, ""], found: Report) -> Report:
    return jax.tree.map(lambda values, value: values.at[done].set(value), report, found)


def _filled(report: Report, done: Int32[Array, ""]) -> Report:
    """Repeats the last iteration's values in place of those that were not run."""
    places = jnp.minimum(lax.iota(jnp.int32, report.empty.shape[0]), done - 1)
    return jax.tree.map(lambda values: values[places], report)
