"""Llamas from GGUF files, whose weights llama.cpp has quantized: here they are float32 again."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ssvq_jax.models.gguf_file import GgufFile
from ssvq_jax.models.import_llama import convert_layers, llama_shapes
from ssvq_jax.models.import_state_dict import Renaming
from ssvq_jax.models.llama import LlamaConfig

_LAYER = r"blk\.(\d+)\."
RULES = [
    Renaming(r"token_embd\.weight", "params/embed/embedding"),
    Renaming(_LAYER + r"attn_([qkv])\.weight", r"params/layers_\1/attn/\2/kernel"),
    Renaming(_LAYER + r"attn_output\.weight", r"params/layers_\1/attn/o/kernel"),
    Renaming(_LAYER + r"ffn_(gate|up|down)\.weight", r"params/layers_\1/mlp/\2/kernel"),
    Renaming(_LAYER + r"attn_norm\.weight", r"params/layers_\1/attn_norm/scale"),
    Renaming(_LAYER + r"ffn_norm\.weight", r"params/layers_\1/mlp_norm/scale"),
    Renaming(r"output_norm\.weight", "params/norm/scale"),
    Renaming(r"output\.weight", "params/lm_head/kernel"),
    Renaming(r"rope_freqs\.weight", None),  # in the configuration
]
_FULL_PRECISION = 16  # bits from which on a weight does not count as quantized


class StoredType(NamedTuple):
    """How some weights of a file are stored.

    Attributes:
        name: GGML's name of the type.
        bits: bits a weight, scales included.
        tensors: number of tensors.
        weights: number of weights.
    """

    name: str
    bits: float
    tensors: int
    weights: int


class GgufModel(NamedTuple):
    """A model of a GGUF file.

    Attributes:
        config: its sizes.
        variables: its variables, float32.
        stored: how its weights are stored, the type of most weights first.
    """

    config: LlamaConfig
    variables: dict[str, Any]
    stored: tuple[StoredType, ...]

    @property
    def note(self) -> str:
        """What a report on the model must say; empty if its weights have 16 bits or more.

        Example:
            >>> stored = [StoredType("Q4_1", 5, 210, 106_168_320), StoredType("F32", 32, 61, 35136)]
            >>> GgufModel(LlamaConfig(), {}, tuple(stored)).note
            'already quantized: 106,168,320 weights to 5 bits (Q4_1); 35,136 at 32 bits (F32)'
        """
        if all(stored.bits >= _FULL_PRECISION for stored in self.stored):
            return ""
        told = [
            f"{x.weights:,} {'weights to' if i == 0 else 'at'} {x.bits:g} bits ({x.name})"
            for i, x in enumerate(self.stored)
        ]
        return "already quantized: " + "; ".join(told)


def load_gguf(path: Path, *, scan: bool = False) -> GgufModel:
    """Reads a Llama from a GGUF file.

    Args:
        path: the file.
        scan: make the variables those of a model with ``scan=True``.

    Returns:
        The model.

    Raises:
        ImportError: without the package `gguf`.
        ValueError: if the file is damaged or cut short, of another architecture, or lacks or has
            too many tensors.
    """
    return gguf_model(GgufFile(path), scan=scan)


def gguf_model(file: GgufFile, *, scan: bool = False) -> GgufModel:
    """Reads the model of an open file; see `load_gguf`."""
    config = read_gguf_config(file)
    tensors = {name: dequantize(tensor) for name, tensor in file.tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            tensors[name] = half_rotation(tensor, config.head_dim)
    shapes = llama_shapes(config, scan=scan)
    variables = convert_layers(tensors, shapes, RULES, source=str(file.path))
    return GgufModel(config, variables, stored_types(file))


def read_gguf_config(file: GgufFile) -> LlamaConfig:
    """Reads the sizes from the metadata.

    Raises:
        ValueError: naming what is missing or what `Llama` cannot follow.
    """
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise ValueError(
            f"{file.path} is of architecture '{architecture}': only 'llama' can be read"
        )
    if file.get("llama.expert_count", int, 0):
        raise ValueError(f"{file.path} is a mixture of experts: only dense models can be read")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'")
    depth = file.get("llama.block_count", int)
    found = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if depth != len(found):
        raise ValueError(f"{file.path} has tensors of {len(found)} layers, and should have {depth}")
    width, heads = (
        file.get(f"llama.{key}", int) for key in ("embedding_length", "attention.head_count")
    )
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if file.get(f"llama.{key}", int, width // heads) * heads != width:
            raise ValueError(f"{file.path}: only llama.{key} = {width // heads} can be read")
    return LlamaConfig(
        vocab=int(file.tensors["token_embd.weight"].shape[1]),  # GGUF lists the inner axis first
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=file.get("llama.attention.head_count_kv", int, heads),
        hidden=file.get("llama.feed_forward_length", int),
        context=file.get("llama.context_length", int),
        rope_theta=file.get("llama.rope.freq_base", float, 10_000.0),
        rope_factors=_rope_factors(file, width // heads),
        norm_epsilon=file.get("llama.attention.layer_norm_rms_epsilon", float),
        tied="output.weight" not in file.tensors,
    )


def dequantize(tensor: Any) -> Float[np.ndarray, "..."]:
    """Calculates the weights of a tensor of `gguf.GGUFReader`, float32.

    Raises:
        ValueError: if the package `gguf` cannot read its type.
    """
    from gguf.quants import dequantize as read

    try:
        return np.asarray(read(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise ValueError(
            f"tensor '{tensor.name}' is of type {tensor.tensor_type.name}, which the package gguf "
            "cannot read: get the model in another type"
        ) from error


def half_rotation(rows: Float[np.ndarray, "n i"], head_dim: int) -> Float[np.ndarray, "n i"]:
    """Orders the rows of query and key kernels for `ssvq_jax.models.rope.rotate`.

    GGUF's rotary embeddings turn rows ``(2 i, 2 i + 1)`` of a head, ours ``(i, i + head_dim / 2)``.

    Example:
        >>> half_rotation(np.arange(4.0)[:, None], 4).T.tolist()
        [[0.0, 2.0, 1.0, 3.0]]
    """
    if rows.ndim != 2 or rows.shape[0] % head_dim:
        return rows  # the wrong shape is told where tensors meet leaves
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def stored_types(file: GgufFile) -> tuple[StoredType, ...]:
    """Counts tensors and weights by their type, the type of most weights first."""
    from gguf import GGML_QUANT_SIZES

    counts: dict[Any, tuple[int, int]] = {}
    for tensor in file.tensors.values():
        tensors, weights = counts.get(tensor.tensor_type, (0, 0))
        counts[tensor.tensor_type] = (tensors + 1, weights + int(tensor.n_elements))
    bits = {kind: 8 * size / block for kind, (block, size) in GGML_QUANT_SIZES.items()}
    found = [StoredType(kind.name, bits[kind], *count) for kind, count in counts.items()]
    return tuple(sorted(found, key=lambda stored: -stored.weights))


def _rope_factors(file: GgufFile, head_dim: int) -> tuple[float, ...]:
    if "rope_freqs.weight" in file.tensors:  # Llama 3's, worked out
        return tuple(dequantize(file.tensors["rope_freqs.weight"]).tolist())
    kind = file.get("llama.rope.scaling.type", str, "none")
    if kind == "linear":
        return (file.get("llama.rope.scaling.factor", float),) * (head_dim // 2)
    if kind != "none":
        raise ValueError(f"{file.path}: rope scaling '{kind}': only 'linear' can be read")
    return ()
