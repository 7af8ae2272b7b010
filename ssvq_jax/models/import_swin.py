"""Swin with the weights of timm's, torchvision's, transformers' or the authors' models."""

from collections.abc import Iterable
from typing import Any

from ssvq_jax.models.import_blocks import join_qkv
from ssvq_jax.models.import_state_dict import Renaming, Tensors, convert_state_dict
from ssvq_jax.models.swin import SwinConfig


def import_swin(
    tensors: Tensors, shapes: Any, config: SwinConfig, *, source: str, keep: Iterable[str] = ()
) -> dict[str, Any]:
    """Gives a `Swin` the weights of another implementation.

    Args:
        tensors: weights by name, of timm's ``swin_*`` or torchvision's ``swin_*`` (version 1), of
            transformers' ``SwinForImageClassification``, or of the authors' files.
        shapes: variables of the model: arrays or shapes.
        config: sizes of the model.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values, as in `convert_state_dict`.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors or leaves that find no counterpart.
    """
    tensors = join_qkv(tensors, source=source)
    # timm, too, now merges patches where a stage begins; the others do where the one before ends.
    merged_after = any(name.startswith("layers.0.downsample.") for name in tensors)
    rules = _rules(config, merged_after)
    return convert_state_dict(tensors, shapes, rules, source=source, keep=keep)


def _rules(config: SwinConfig, merged_after: bool) -> list[Renaming]:
    embeddings = r"swin\.embeddings\."
    projection = rf"{embeddings}patch_embeddings\.projection"
    kernels = {
        rf"patch_embed\.proj|features\.0\.0|{projection}": "patch_embed",
        r"head|head\.fc|classifier": "head",
    }
    norms = {
        rf"patch_embed\.norm|features\.0\.2|{embeddings}norm": "patch_norm",
        r"norm|swin\.layernorm": "norm",
    }
    tables = {}
    for i in range(len(config.depths)):
        # torchvision counts the embedding, stages and what lies between them as one list.
        block = rf"layers\.{i}\.blocks|features\.{2 * i + 1}|swin\.encoder\.layers\.{i}\.blocks"
        block, to = rf"(?:{block})\.(\d+)", rf"layers_{i}/blocks_\1"
        norms[rf"{block}\.(?:norm1|layernorm_before)"] = f"{to}/norm1"
        norms[rf"{block}\.(?:norm2|layernorm_after)"] = f"{to}/norm2"
        kernels[rf"{block}\.(?:attn|attention|attention\.self)\.qkv"] = f"{to}/attn/qkv"
        proj = r"attn\.proj|attention\.o_proj|attention\.output\.dense"
        kernels[rf"{block}\.(?:{proj})"] = f"{to}/attn/proj"
        kernels[rf"{block}\.(?:mlp\.fc1|mlp\.0|intermediate\.dense)"] = f"{to}/mlp/fc1"
        kernels[rf"{block}\.(?:mlp\.fc2|mlp\.3|output\.dense)"] = f"{to}/mlp/fc2"
        attention = r"attn|attention\.self|attention\.relative_position_bias"
        table = "relative_position_bias_table"
        tables[rf"{block}\.(?:{attention})\.{table}"] = f"{to}/attn/{table}"
    for i in range(1, len(config.depths)):
        layer = i - 1 if merged_after else i
        merging = rf"layers\.{layer}\.downsample|features\.{2 * i}"
        merging = rf"(?:{merging}|swin\.encoder\.layers\.{i - 1}\.downsample)"
        norms[rf"{merging}\.norm"] = f"layers_{i}/downsample/norm"
        kernels[rf"{merging}\.reduction"] = f"layers_{i}/downsample/reduction"
    return [
        # What follows from the sizes alone.
        Renaming(r".*\.(?:relative_position_index|attn_mask)", None),
        *[Renaming(name, f"params/{to}") for name, to in tables.items()],
        *[Renaming(rf"(?:{name})\.weight", f"params/{to}/kernel") for name, to in kernels.items()],
        *[Renaming(rf"(?:{name})\.weight", f"params/{to}/scale") for name, to in norms.items()],
        *[Renaming(rf"(?:{x})\.bias", f"params/{to}/bias") for x, to in (kernels | norms).items()],
    ]
