"""Programs that carry their packed weights and run without this package."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export

from ssvq_jax.inference.packed_leaf import packed_params
from ssvq_jax.inference.serve import serve
from ssvq_jax.plan import Packed
from ssvq_jax.tree import PyTree

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises ValueError, naming them, for platforms that there are not."""
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ValueError(f"platforms {unknown or 'are missing'}: choose of {PLATFORMS}")


def export_program(
    apply: Callable[..., Any],
    packed: Packed,
    *inputs: Any,
    platforms: Sequence[str] = ("cpu",),
) -> bytes:
    """Exports a model with its packed weights and their decoding inside.

    What comes out runs wherever JAX does: ``jax.export.deserialize(program).call(*inputs)``.

    Args:
        apply: the model, called with the parameter tree and the inputs.
        packed: the finalized model.
        *inputs: shapes and dtypes of the inputs: arrays or ``jax.ShapeDtypeStruct``, whose shapes
            may be symbolic (``jax.export.symbolic_shape``).
        platforms: what it is to run on: cpu, cuda, rocm, tpu. It is lowered for them, and compiled
            where it runs.

    Returns:
        The serialized program: StableHLO in JAX's envelope, compatible as ``jax.export`` says.

    Raises:
        ValueError: for an unknown platform.

    Example:
        >>> import jax.numpy as jnp
        >>> from ssvq_jax import SignSplit, make_plan
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> plan = make_plan(params, [("kernel", SignSplit(codewords=4, dim=8))])
        >>> packed = plan.finalize(plan.init(jax.random.key(1), params))
        >>> x = jnp.ones((2, 64))
        >>> program = export_program(lambda params, x: x @ params["kernel"], packed, x)
        >>> export.deserialize(bytearray(program)).call(x).shape
        (2, 64)
    """
    platforms = (platforms,) if isinstance(platforms, str) else platforms
    check_platforms(platforms)
    weights = packed_params(packed)
    run = serve(apply) if packed.plan.entries else apply

    def program(*arguments: Any) -> PyTree:
        return run(weights, *arguments)

    exported = export.export(jax.jit(program), platforms=tuple(platforms))(*inputs)
    return bytes(exported.serialize())
