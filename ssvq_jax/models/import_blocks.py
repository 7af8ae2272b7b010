"""Attention and stacks of blocks, where another implementation cuts its tensors in other pieces."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ssvq_jax.models.import_state_dict import Renaming, Tensors, convert_state_dict
from ssvq_jax.models.variables import nest, paths_of

# transformers' names in files and, from its version 5 on, in memory.
QUERY_KEY_VALUE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))


def join_qkv(tensors: Tensors, *, source: str) -> dict[str, np.ndarray]:
    """Joins the projections to queries, keys and values, which transformers keeps apart.

    Args:
        tensors: weights by name; ``X.query.weight`` ``[w, w]`` and its like are joined.
        source: what the tensors are of, for messages.

    Returns:
        The tensors, with ``X.qkv.weight`` ``[3 w, w]`` for three.

    Raises:
        ValueError: naming a tensor of three that is missing.

    Example:
        >>> apart = {f"attn.{name}.bias": np.ones(2) for name in ("query", "key", "value")}
        >>> {name: tensor.shape for name, tensor in join_qkv(apart, source="vit.pth").items()}
        {'attn.qkv.bias': (6,)}
    """
    joined = dict(tensors)
    for names in QUERY_KEY_VALUE:
        found = (re.fullmatch(rf"(.*)\.(?:{'|'.join(names)})\.(weight|bias)", x) for x in tensors)
        for start, end in dict.fromkeys(match.groups() for match in found if match):
            three = [f"{start}.{name}.{end}" for name in names]
            missing = [name for name in three if name not in tensors]
            if missing:
                raise ValueError(f"{source} lacks {missing}, which belong with others of {three}")
            parts = [joined.pop(name) for name in three]
            joined[f"{start}.qkv.{end}"] = np.concatenate(parts)
    return joined


def convert_with_stacks(
    tensors: Tensors,
    shapes: Any,
    rules: Sequence[Renaming],
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Does what `convert_state_dict` does, for models that may scan over stacked blocks.

    Args:
        tensors: as there.
        shapes: as there; leaves under ``blocks/`` are stacks on a leading axis.
        rules: as there, as if the leaves of a stack were under ``blocks_0/``, ``blocks_1/`` …
        source: as there.
        keep: as there, with such names.

    Returns:
        The variables, with the leaves that ``shapes`` has.
    """
    wanted = paths_of(shapes)
    stacks = {path: leaf.shape[0] for path, leaf in wanted.items() if "/blocks/" in path}
    apart = {path: leaf for path, leaf in wanted.items() if path not in stacks}
    for path, depth in stacks.items():
        apart |= {_block(path, i): _row(wanted[path], i) for i in range(depth)}
    found = paths_of(convert_state_dict(tensors, nest(apart), rules, source=source, keep=keep))
    for path, depth in stacks.items():
        found[path] = np.stack([found[_block(path, i)] for i in range(depth)])
    return nest({path: found[path] for path in wanted})


def _block(path: str, index: int) -> str:
    return path.replace("/blocks/", f"/blocks_{index}/")


def _row(leaf: Any, index: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]
