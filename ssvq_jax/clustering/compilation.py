"""Compilation of the clustering loops for the machine at hand."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer

# XLA uses half of an AVX-512 register unless told otherwise; the distance loops run 1.6 times
# faster on whole ones. Processors without such registers use what they have.
_CPU_OPTIONS = {"xla_cpu_prefer_vector_width": 512}


def compiled(
    function: Callable[..., Any], *, static_argnames: Sequence[str] = ()
) -> Callable[..., Any]:
    """Like ``jax.jit``, but on a CPU with the widest vectors it has.

    Args:
        function: a pure function.
        static_argnames: as ``jax.jit`` takes them.

    Returns:
        The compiled function. Called while another function is traced, it becomes a part of that
        one, whose options then hold.
    """
    plain = jax.jit(function, static_argnames=static_argnames)
    wide = jax.jit(function, static_argnames=static_argnames, compiler_options=_CPU_OPTIONS)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = wide if jax.default_backend() == "cpu" and not tracing() else plain
        return chosen(*args, **kwargs)

    return call


def tracing() -> bool:
    """Whether the caller runs while ``jax.jit`` or another transformation traces it."""
    return isinstance(lax.neg(np.float32(0)), Tracer)
