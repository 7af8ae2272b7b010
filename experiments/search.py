"""Draws of learning rates, and what is done with them: all are judged, the best is reported."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from tables import Rows
from units import Options, Results, Unit, work

SEED = 100  # of draws; no reported run has it


def spread(name: str, bounds: tuple[float, float], trials: int) -> list[float]:
    """One rate a trial, each in its own part of the range, by the logarithm.

    Rates of different names are permuted by themselves, so that all together are a Latin hypercube;
    a function of its arguments alone.

    Example:
        >>> rates = spread("sign", (1e-4, 1e-2), 2)
        >>> sum(rate < 1e-3 for rate in rates)
        1
    """
    generator = np.random.default_rng([SEED, *name.encode()])
    places = (generator.permutation(trials) + generator.uniform(size=trials)) / trials
    low, high = np.log(bounds)
    return [float(f"{math.exp(low + place * (high - low)):.2g}") for place in places]


def best_trial(rows: Rows, method: str, trials: int, judged_by: str) -> int | None:
    """The draw with the least of a figure, once all were run."""
    own = [r for r in rows if (r["settings"]["stage"], r["method"]) == ("tuning", method)]
    if len(own) < trials:
        return None
    losses = [row[judged_by] if math.isfinite(row[judged_by]) else math.inf for row in own]
    return own[losses.index(min(losses))]["settings"]["trial"]


def search_and_report(
    unit: Callable[[str, str, int, int], Unit],
    methods: Sequence[str],
    trials: int,
    judged_by: str,
    results: Results,
    options: Options,
) -> Rows:
    """Runs the draws of every method, then the best ones with all seeds.

    Args:
        unit: of a stage ("tuning" or "report"), method, seed and trial.
        methods: methods to compare.
        trials: draws a method.
        judged_by: figure of a row that is to be small, on validation data.
        results: where rows are and go.
        options: of the experiment.

    Returns:
        The rows of all units that have one by now.
    """
    began = time.perf_counter()
    tuning = [unit("tuning", name, SEED, i) for i in range(trials) for name in methods]
    rows = work(tuning, results, options)
    best = {name: best_trial(rows, name, trials, judged_by) for name in methods}
    if None in best.values():
        print("draws are left: once all were run, the same command runs the best of them")
        return rows
    left = dataclasses.replace(options, hours=options.hours - (time.perf_counter() - began) / 3600)
    return rows + work(
        [
            unit("report", name, seed, trial)
            for seed in options.seeds
            for name, trial in best.items()
            if trial is not None
        ],
        results,
        left,
    )


def reported(rows: Rows, method: str) -> Rows:
    """The rows of a method that count."""
    return [r for r in rows if (r["settings"]["stage"], r["method"]) == ("report", method)]
