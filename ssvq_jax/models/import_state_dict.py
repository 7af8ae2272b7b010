"""Weights of another framework, tensor by tensor: what a name becomes, and nothing left over.

A family's importer is a list of `Renaming` rules; layouts follow from the names of Flax's leaves.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssvq_jax.models.variables import nest, paths_of

Tensors = Mapping[str, np.ndarray]


class Renaming(NamedTuple):
    r"""Where the tensors whose whole name matches a pattern go.

    Attributes:
        source: regular expression for the tensor's name.
        target: path of the leaf, its collection first (``params/stem/kernel``); groups as ``\1``.
            None for tensors that are left out on purpose.
        convert: turns the tensor into the leaf, where the leaf's name does not say how.
    """

    source: str
    target: str | None
    convert: Callable[[np.ndarray], np.ndarray] | None = None


def convert_state_dict(
    tensors: Tensors,
    shapes: Any,
    rules: Sequence[Renaming],
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    r"""Gives a model the weights of another implementation.

    Leaves called ``kernel`` are transposed: dense ones from ``[out, in]`` to ``[in, out]``,
    convolutions from ``[out, in / groups, h, w]`` to ``[h, w, in / groups, out]``. All others are
    taken as they are, but for axes of length 1.

    Args:
        tensors: the other implementation's weights by name.
        shapes: variables of the model, ``{"params": ..., ...}``: arrays or shapes.
        rules: where tensors go; the first that matches a name counts.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves, without their collection, that keep their values in
            ``shapes``, which must then be arrays: a new head. Tensors for them are left out.

    Returns:
        The variables, as nested dictionaries of arrays in the model's dtypes.

    Raises:
        ValueError: naming all tensors that no rule takes, leaves that no tensor fills, or shapes
            that do not fit.

    Example:
        >>> tensors = {"fc.weight": np.ones((10, 4)), "fc.steps": np.array(3)}
        >>> shapes = {"params": {"head": {"kernel": np.zeros((4, 10), "float32")}}}
        >>> rules = [Renaming(r"fc\.weight", "params/head/kernel"), Renaming(r".*steps", None)]
        >>> found = convert_state_dict(tensors, shapes, rules, source="fc.pth")
        >>> found["params"]["head"]["kernel"].shape
        (4, 10)
    """
    wanted = paths_of(shapes)
    kept = {path for path in wanted if _any_matches(keep, path.partition("/")[2])}
    # Compiled once: deep networks have more rules than the cache of ``re`` holds.
    compiled = [(rule, re.compile(rule.source)) for rule in rules]
    found: dict[str, np.ndarray] = {}
    unknown, wrong, twice = [], [], []
    for name, tensor in tensors.items():
        tried = ((rule, pattern.fullmatch(name)) for rule, pattern in compiled)
        rule, match = next((pair for pair in tried if pair[1]), (None, None))
        if rule is None or match is None:
            unknown.append(name)
            continue
        if rule.target is None:
            continue
        path = match.expand(rule.target)
        if path in kept:
            continue
        if path not in wanted:
            unknown.append(name)
        elif path in found:
            twice.append(f"{name} and another for '{path}'")
        else:
            shape = wanted[path].shape
            leaf = (rule.convert or _layout(path, len(shape)))(np.asarray(tensor))
            if leaf.shape != shape and _without_ones(leaf.shape) == _without_ones(shape):
                leaf = leaf.reshape(shape)
            if leaf.shape != shape:
                wrong.append(f"{name} {list(tensor.shape)} for leaf '{path}' {list(shape)}")
            found[path] = leaf.astype(wanted[path].dtype)
    missing = sorted(set(wanted) - set(found) - kept)
    problems = {
        "tensors of other shapes": wrong,
        "tensors that the model has no place for": unknown,
        "leaves that no tensor fills": missing,
        "leaves that two tensors would fill": twice,
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"{source} does not fit the model. {told}. Choose the model that it is of, with its "
            "number of classes (--classes), or begin with a new head (--new-head)"
        )
    return nest({path: found.get(path, leaf) for path, leaf in wanted.items()})


def _layout(path: str, axes: int) -> Callable[[np.ndarray], np.ndarray]:
    if path.endswith("/kernel") and axes in (2, 4):
        order = (1, 0) if axes == 2 else (2, 3, 1, 0)
        # A 1 x 1 convolution may stand for a dense layer, and the other way round.
        return lambda x: x.transpose(order) if x.ndim == axes else _squeezed(x).T
    return lambda x: x


def _squeezed(tensor: np.ndarray) -> np.ndarray:
    """Without axes of length 1 after the second; as it is if there are others, which do not fit."""
    return tensor.reshape(tensor.shape[:2]) if set(tensor.shape[2:]) <= {1} else tensor


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _any_matches(patterns: Iterable[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _some(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
