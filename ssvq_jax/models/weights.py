"""Trained weights from files: safetensors, Flax msgpack files, and orbax checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from ssvq_jax.models.loading import LoadedModel
from ssvq_jax.models.read_orbax import read_orbax
from ssvq_jax.models.tensor_files import PICKLED, is_tensors, load_tensors
from ssvq_jax.models.variables import paths_of

_COLLECTIONS = ("params", "batch_stats")


def load_weights(path: Path) -> dict[str, Any]:
    """Reads the variables of a model.

    Args:
        path: a ``.safetensors`` file whose names are key paths joined by slashes or dots, a folder
            of such shards or their index, a file that `flax.serialization.to_bytes` wrote, or the
            folder of an orbax checkpoint; each of the variables (``{"params": ...}``), of a
            training state with ``params``, or of the bare parameters.

    Returns:
        The variables, ``params`` among them, as nested dictionaries.

    Raises:
        ValueError: if there is nothing at ``path``, or it cannot be read.
    """
    if not path.exists():
        raise ValueError(
            f"no weights at {path}: give a run's folder, an orbax checkpoint or a file"
        )
    try:
        if path.suffix == ".json" and not is_tensors(path):
            raise ValueError("it is a JSON file, which holds no weights")
        if is_tensors(path) and path.suffix not in PICKLED:
            tensors = load_tensors(path)
            separator = "/" if any("/" in name for name in tensors) else "."
            tree = unflatten_dict(tensors, sep=separator)
        elif path.is_dir():
            tree = read_orbax(path)
        else:
            tree = _read_msgpack(path)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the weights in {path} cannot be read ({reason}): give a run's folder, an orbax "
            "checkpoint, a .safetensors file or a file of flax.serialization.to_bytes"
        ) from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a tree of parameters")
    if "params" not in tree:
        return {"params": tree}
    inner = tree["params"]
    if isinstance(inner, Mapping) and "params" in inner and set(inner) <= set(_COLLECTIONS):
        tree = inner  # a training state that was made with `params=variables`
    return {name: tree[name] for name in _COLLECTIONS if tree.get(name) is not None}


def fit_weights(
    model: LoadedModel, variables: Mapping[str, Any], shapes: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Checks weights against a model, and gives them its structure.

    Args:
        model: the model, for messages.
        variables: what was found.
        shapes: what the model has, from `LoadedModel.shapes`.
        source: where the weights are from, for messages.

    Returns:
        The variables as the model has them; parameters keep the dtypes of the weights.

    Raises:
        ValueError: naming the first leaf that is missing, too many, of another shape, or not
            finite.
    """
    found = paths_of(variables)
    leaves = []
    for path, wanted in paths_of(shapes).items():
        leaf = found.pop(path, None)
        where = f"'{path}' of model '{model.name}'"
        if leaf is None:
            raise ValueError(f"{source} has no leaf {where}: these are weights of another model")
        if tuple(leaf.shape) != tuple(wanted.shape):
            raise ValueError(
                f"{source}: leaf {where} is {list(leaf.shape)} there, and the model has "
                f"{list(wanted.shape)}: check classes and image size"
            )
        is_param = path.startswith("params/")
        leaves.append(jnp.asarray(leaf, None if is_param else wanted.dtype))
        bad = leaves[-1].size - int(jnp.isfinite(leaves[-1]).sum())
        if bad:
            raise ValueError(f"{source}: leaf {where} holds {bad} NaN or infinite values")
    if found:
        raise ValueError(
            f"{source} has {len(found)} leaves that model '{model.name}' has not, e.g. "
            f"'{min(found)}': these are weights of another model"
        )
    return dict(jax.tree.unflatten(jax.tree.structure(shapes), leaves))


def _read_msgpack(file: Path) -> Any:
    from flax import serialization

    return serialization.msgpack_restore(file.read_bytes())
