"""Counts in float64, exact to 2^53, whatever precision the caller computes in."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float64

Count = Float64[Array | np.ndarray, "..."]
Number = Any  # int, float or an array of either

Function = TypeVar("Function", bound=Callable[..., Any])


def in_float64(function: Function) -> Function:
    """Has a function compute in float64, whatever `jax.numpy` computes in around it.

    Numbers in its arguments (pytrees) arrive as float64 arrays. Its results are NumPy arrays, which
    go on in float64 outside, too, unless something is traced: then they are what JAX traces.
    """

    @functools.wraps(function)
    def exact(*args: Any) -> Any:
        with jax.enable_x64(True):
            results = function(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args))
            if any(isinstance(x, Tracer) for x in jax.tree.leaves(results)):
                return results
            return jax.tree.map(np.asarray, results)

    return exact  # type: ignore[return-value]
