"""Recomputation of activations, block by block, for linen models as they are."""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

# What a block keeps: matrix products cost most to compute again; the rest is cheap.
SAVED = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def remat_calls(kind: type[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Within the context, every call of a module of a class runs inside ``jax.checkpoint``.

    Each block has to be one on its own: with the whole model in one ``jax.checkpoint`` the backward
    pass computes all of it again before it begins, and needs as much memory as without.

    Args:
        kind: class of the blocks.

    Returns:
        The context, to apply or initialise a model in.
    """
    return nn.intercept_methods(_Remat(kind))


class _Remat:
    """Lifts the calls; the lifted call comes by a second time and is then let through."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind
        self.lifted = False

    def __call__(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if not isinstance(context.module, self.kind) or context.method_name != "__call__":
            return method(*args, **kwargs)
        if self.lifted:
            self.lifted = False
            return method(*args, **kwargs)

        def call(module: Any) -> Any:
            self.lifted = True
            return module(*args, **kwargs)

        return nn.remat(call, policy=SAVED)(context.module)
