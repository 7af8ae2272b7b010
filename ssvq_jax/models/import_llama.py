"""Llamas from Hugging Face: state dicts of `LlamaForCausalLM`, and model folders on disk."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssvq_jax.json_files import read_json
from ssvq_jax.models.import_state_dict import Renaming, Tensors, convert_state_dict
from ssvq_jax.models.llama import Llama, LlamaConfig
from ssvq_jax.models.rope import llama3_factors
from ssvq_jax.models.tensor_files import load_tensors
from ssvq_jax.models.variables import nest, paths_of

_LAYER = r"(?:model\.)?layers\.(\d+)\."
RULES = [
    Renaming(r"(?:model\.)?embed_tokens\.weight", "params/embed/embedding"),
    Renaming(_LAYER + r"self_attn\.([qkvo])_proj\.weight", r"params/layers_\1/attn/\2/kernel"),
    Renaming(_LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"params/layers_\1/mlp/\2/kernel"),
    Renaming(_LAYER + r"input_layernorm\.weight", r"params/layers_\1/attn_norm/scale"),
    Renaming(_LAYER + r"post_attention_layernorm\.weight", r"params/layers_\1/mlp_norm/scale"),
    Renaming(r"(?:model\.)?norm\.weight", "params/norm/scale"),
    Renaming(r"lm_head\.weight", "params/lm_head/kernel"),
    Renaming(r".*rotary_emb\.inv_freq", None),  # old checkpoints; `rope_frequencies` computes it
]


def import_llama(
    tensors: Tensors,
    shapes: Any,
    config: LlamaConfig,
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Gives a `Llama` the weights of a `LlamaForCausalLM` or a `LlamaModel`.

    Args:
        tensors: its state dict.
        shapes: variables of the model, of either value of ``scan``.
        config: the model's sizes.
        source: what the tensors are of, for messages.
        keep: as in `convert_state_dict`, by the names without ``scan``.

    Returns:
        The variables, NumPy arrays.

    Raises:
        ValueError: as `convert_state_dict`, or if the model ties its output kernel to the
            embedding and the tensors have two that differ.
    """
    tensors = dict(tensors)
    head = tensors.pop("lm_head.weight", None) if config.tied else None
    if head is not None:
        embeds = [tensors.get(f"{prefix}embed_tokens.weight") for prefix in ("model.", "")]
        if not any(embed is not None and np.array_equal(embed, head) for embed in embeds):
            raise ValueError(
                f"{source}: lm_head.weight is not embed_tokens.weight, and the model has one for "
                "both: make the model with tied=False"
            )
    return convert_layers(tensors, shapes, RULES, source=source, keep=keep)


def convert_layers(
    tensors: Tensors,
    shapes: Any,
    rules: list[Renaming],
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Calls `convert_state_dict` for rules of single layers, whatever ``scan`` is in ``shapes``."""
    if "layers" not in shapes["params"]:
        return convert_state_dict(tensors, shapes, rules, source=source, keep=keep)
    single = unstack_layers(shapes)
    return stack_layers(convert_state_dict(tensors, single, rules, source=source, keep=keep))


def stack_layers(variables: Any) -> dict[str, Any]:
    """Turns the variables of a `Llama` into those with ``scan=True``.

    Example:
        >>> params = {"layers_0": {"a": np.zeros(2)}, "layers_1": {"a": np.ones(2)}}
        >>> stack_layers({"params": params})["params"]["layers"]["a"].shape
        (2, 2)
    """
    leaves, layers = {}, {}
    for path, leaf in paths_of(variables).items():
        found = re.fullmatch(r"(.*/)layers_(\d+)(/.*)", path)
        if found:
            layers.setdefault(f"{found[1]}layers{found[3]}", {})[int(found[2])] = leaf
        else:
            leaves[path] = leaf
    stacked = {path: np.stack([x[i] for i in range(len(x))]) for path, x in layers.items()}
    return nest(leaves | stacked)


def unstack_layers(variables: Any) -> dict[str, Any]:
    """Inverts `stack_layers`, for arrays and for shapes."""
    leaves = {}
    for path, leaf in paths_of(variables).items():
        before, found, after = path.partition("/layers/")
        if not found:
            leaves[path] = leaf
            continue
        for i in range(leaf.shape[0]):
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if is_shape else leaf[i]
            leaves[f"{before}/layers_{i}/{after}"] = layer
    return nest(leaves)


def llama_shapes(config: LlamaConfig, *, scan: bool = False) -> Any:
    """Shapes of a model's variables, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(config, scan=scan).init, jax.random.key(0), tokens)


def read_llama_config(settings: Mapping[str, Any], source: str) -> LlamaConfig:
    """Reads the sizes from a Hugging Face ``config.json``.

    Args:
        settings: what is in the file.
        source: its name, for messages.

    Returns:
        The sizes.

    Raises:
        ValueError: naming the setting that is missing or that `Llama` cannot follow.
    """
    kind = settings.get("model_type")
    if kind != "llama":
        raise ValueError(f"{source}: model_type={kind!r}: only 'llama' can be read")
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{source}: {name}={settings[name]!r}: only {value!r} can be read")
    try:
        width, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
        head_dim = int(settings.get("head_dim") or width // heads)
        if head_dim * heads != width:
            raise ValueError(f"{source}: head_dim={head_dim}: only hidden_size / heads can be read")
        rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
        return LlamaConfig(
            vocab=int(settings["vocab_size"]),
            width=width,
            depth=int(settings["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(settings.get("num_key_value_heads") or heads),
            hidden=int(settings["intermediate_size"]),
            context=int(settings["max_position_embeddings"]),
            rope_theta=theta,
            rope_factors=_rope_factors(rope, head_dim, theta, source),
            norm_epsilon=float(settings["rms_norm_eps"]),
            tied=bool(settings.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ValueError(f"{source} has no {error}") from error


def load_llama_folder(folder: Path, *, scan: bool = False) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a Hugging Face model folder: ``config.json`` and ``*.safetensors``.

    Args:
        folder: with one ``model.safetensors``, or several and their index.
        scan: make the variables those of a model with ``scan=True``.

    Returns:
        Sizes and variables; these are float32 whatever the files' dtype.

    Raises:
        ValueError: if the folder lacks a file, or the files do not fit each other.
    """
    try:
        data = read_json(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{error}: give a model's folder") from error
    config = read_llama_config(data, f"{folder}/config.json")
    tensors = load_tensors(folder)
    shapes = llama_shapes(config, scan=scan)
    return config, import_llama(tensors, shapes, config, source=str(folder))


def _rope_factors(
    rope: Mapping[str, Any], head_dim: int, theta: float, source: str
) -> tuple[float, ...]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor: only 1 can be read")
    if kind == "default":
        return ()
    if kind == "linear":
        return (float(rope["factor"]),) * (head_dim // 2)
    if kind == "llama3":
        return llama3_factors(
            head_dim,
            theta,
            factor=float(rope["factor"]),
            low_frequency=float(rope["low_freq_factor"]),
            high_frequency=float(rope["high_freq_factor"]),
            trained_length=int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(
        f"{source}: rope scaling of type {kind!r}: only 'default', 'linear' and 'llama3' can be "
        "read"
    )
