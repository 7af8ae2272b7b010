"""Refusal of input that is no clustering problem, each time with what to change.

Shapes and dtypes are checked always, values only where they are known: under `jax.jit`, `jax.vmap`
and `jax.lax.map` the caller has to vouch for them.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float


def check_points(
    points: Float[Array, "n d"],
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
) -> None:
    """Checks sub-vectors and the weights and mask that go with them.

    Raises:
        ValueError: for a shape, dtype or known value that cannot be meant.
    """
    _check_float("points", points)
    if points.ndim != 2 or points.shape[1] < 1:
        raise ValueError(
            f"points: shape {points.shape}: pass [n, d], a sub-vector of width d >= 1 a row"
        )
    _check_finite("points", points)
    if weights is not None:
        _check_float("weights", weights)
        if weights.shape not in (points.shape[:1], points.shape):
            raise ValueError(
                f"weights: shape {weights.shape}: pass {points.shape[:1]}, one a sub-vector, "
                f"or {points.shape}, one an element"
            )
        _check_finite("weights", weights)
        known = _known(weights)
        if known is not None and (known < 0).any():
            raise ValueError("weights: negative entries: pass weights of zero or more")
    if mask is not None:
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask: dtype {mask.dtype} is not bool: pass bool, True where it counts"
            )
        if mask.shape != points.shape:
            raise ValueError(
                f"mask: shape {mask.shape}: pass {points.shape}, the shape of the points"
            )


def check_mass(
    weights: Float[Array, " n"] | Float[Array, "n d"] | None,
    mask: Bool[Array, "n d"] | None,
) -> None:
    """Checks that some element has a weight; `check_points` has passed before.

    Raises:
        ValueError: if weights, mask, or both together leave nothing to cluster.
    """
    known_weights, known_mask = _known(weights), _known(mask)
    if known_weights is not None:  # the rest is zero to float32
        known_weights = np.where(known_weights >= np.finfo(np.float32).tiny, known_weights, 0)
    if known_weights is not None and not (known_weights > 0).any():
        raise ValueError("weights: all zero: give at least one sub-vector a positive weight")
    if known_mask is not None and not known_mask.any():
        raise ValueError("mask: False everywhere: leave at least one element unmasked")
    if known_weights is not None and known_mask is not None:
        rows = known_weights if known_weights.ndim == 2 else known_weights[:, None]
        if not ((rows > 0) & known_mask).any():
            raise ValueError("weights: zero wherever mask is True: weight an unmasked element")


def check_centroids(name: str, centroids: Float[Array, "k d"], points: Float[Array, "n d"]) -> None:
    """Checks centroids that the caller gave against the points.

    Raises:
        ValueError: for a shape, dtype or known value that cannot be meant.
    """
    _check_float(name, centroids)
    width = points.shape[1]
    if centroids.ndim != 2 or centroids.shape[0] < 1 or centroids.shape[1] != width:
        raise ValueError(
            f"{name}: shape {centroids.shape}: pass [k, {width}] with k >= 1, "
            f"as wide as the points {points.shape}"
        )
    _check_finite(name, centroids)


def check_options(
    points: Float[Array, "n d"],
    codewords: int,
    iterations: int,
    init: Any,
    seedings: Sequence[str],
) -> None:
    """Checks the size of a problem and its start; `check_points` has passed before.

    Raises:
        ValueError: for numbers out of range, and an unknown or unfit start.
    """
    rows, dim = points.shape
    for name, value in (("k", codewords), ("iterations", iterations)):
        _check_whole(name, value)
    if codewords < 1:
        raise ValueError(f"k={codewords} codewords asked for: pass 1 or more")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} asked for: pass 1 or more")
    if codewords > rows:
        raise ValueError(
            f"k={codewords} is larger than the number of sub-vectors n={rows}: "
            "pass fewer codewords or narrower sub-vectors"
        )
    if isinstance(init, str):
        if init not in seedings:
            raise ValueError(
                f"init={init!r} is unknown: pass one of {seedings} or centroids "
                f"[{codewords}, {dim}]"
            )
        if init == "quantile" and dim != 1:
            raise ValueError(f"init='quantile' needs d=1, not d={dim}: pass init='k-means++'")
        return
    check_centroids("init", init, points)
    if init.shape[0] != codewords:
        raise ValueError(f"init has {init.shape[0]} rows: pass k={codewords} of them")


def check_modes(
    init: Any,
    restarts: int,
    tolerance: float | None,
    batch: int | None,
    batch_range: tuple[int, int],
    mesh: Mesh | None,
    axis: str,
) -> None:
    """Checks how a problem is to be iterated.

    Raises:
        ValueError: for an option out of range, or options that do not go together.
    """
    _check_whole("restarts", restarts)
    if restarts < 1:
        raise ValueError(f"restarts={restarts} asked for: pass 1 or more")
    if restarts > 1 and (not isinstance(init, str) or init == "quantile"):
        raise ValueError(
            f"restarts={restarts} would all start alike: pass restarts=1, or init='k-means++'"
        )
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: pass a share of the objective in [0, 1)")
    if batch is not None:
        _check_whole("batch", batch)
        least, most = batch_range
        if not least <= batch <= most:
            raise ValueError(f"batch={batch}: pass from k={least} to n={most}, or None")
        if tolerance is not None:
            raise ValueError(
                "tolerance: the objectives of random batches say nothing about convergence: "
                "pass tolerance=None or batch=None"
            )
    if mesh is not None and axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is not of the mesh: pass one of {list(mesh.shape)}")


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: pass a whole number (a Python int)")


def _check_float(name: str, values: Array) -> None:
    if not hasattr(values, "dtype"):
        raise ValueError(f"{name}: {type(values).__name__} is no array: pass jnp.asarray of it")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name}: dtype {values.dtype} is not float: pass e.g. astype(float32)")


def _check_finite(name: str, values: Array) -> None:
    known = _known(values)
    if known is not None and not np.isfinite(known).all():
        raise ValueError(f"{name}: NaN or infinity: replace those entries or leave them out")
    if known is not None and known.dtype.itemsize > 4 and np.abs(known).max(initial=0) > 3.4e38:
        raise ValueError(f"{name}: numbers beyond float32: rescale them")


def _known(values: Array | None) -> np.ndarray | None:
    """The values, or None where there are none, they are traced, or other processes hold some.

    NumPy looks at them, since every jax function would be compiled for every new shape.
    """
    if values is None or isinstance(values, Tracer):
        return None
    return np.asarray(values) if getattr(values, "is_fully_addressable", True) else None
