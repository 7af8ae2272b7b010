"""DeiT and ViT with the weights of timm's or transformers' models."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ssvq_jax.models.import_blocks import convert_with_stacks, join_qkv
from ssvq_jax.models.import_state_dict import Renaming, Tensors

# `\1` is the number of a block. transformers has one set of names in files, another in memory.
_BLOCK = r"(?:blocks|(?:deit|vit)\.(?:encoder\.layer|layers))\.(\d+)\."
_MODEL = r"(?:(?:deit|vit)\.)?"
_EMBEDDINGS = r"(?:(?:deit|vit)\.embeddings\.)?"
# What a module is called in the sources, and here.
_DENSE = {
    _EMBEDDINGS + r"patch_embed(?:dings)?\.proj(?:ection)?": "patch_embed",
    _BLOCK + r"(?:attn|attention|attention\.attention)\.qkv": r"blocks_\1/attn/qkv",
    _BLOCK + r"(?:attn\.proj|attention\.o_proj|attention\.output\.dense)": r"blocks_\1/attn/proj",
    _BLOCK + r"(?:mlp\.fc1|intermediate\.dense)": r"blocks_\1/mlp/fc1",
    _BLOCK + r"(?:mlp\.fc2|output\.dense)": r"blocks_\1/mlp/fc2",
    r"head|classifier|cls_classifier": "head",
    r"head_dist|distillation_classifier": "head_dist",
}
_NORM = {
    _BLOCK + r"(?:norm1|layernorm_before)": r"blocks_\1/norm1",
    _BLOCK + r"(?:norm2|layernorm_after)": r"blocks_\1/norm2",
    _MODEL + r"(?:norm|layernorm)": "norm",
}
RULES = [
    Renaming(_EMBEDDINGS + r"cls_token", "params/cls_token"),
    Renaming(_EMBEDDINGS + r"(?:dist|distillation)_token", "params/dist_token"),
    Renaming(_EMBEDDINGS + r"(?:pos_embed|position_embeddings)", "params/pos_embed"),
    *[Renaming(rf"(?:{name})\.weight", f"params/{to}/kernel") for name, to in _DENSE.items()],
    *[Renaming(rf"(?:{name})\.weight", f"params/{to}/scale") for name, to in _NORM.items()],
    *[Renaming(rf"(?:{x})\.bias", f"params/{to}/bias") for x, to in (_DENSE | _NORM).items()],
]


def import_deit(
    tensors: Tensors, shapes: Any, *, source: str, keep: Iterable[str] = ()
) -> dict[str, Any]:
    """Gives a `ViT` the weights of another implementation, blocks apart or stacked.

    Args:
        tensors: weights by name, of timm's ``deit_*`` or ``vit_*`` (and the authors' files), or of
            transformers' ``ViTForImageClassification``, ``DeiTForImageClassification`` or
            ``DeiTForImageClassificationWithTeacher``. The last two need ``distilled=True``. The
            second has a head for the class token alone; here it becomes twice itself, beside a
            head of zeros, so that their mean is its logits.
        shapes: variables of the model: arrays or shapes.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values, as in `convert_state_dict`.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors or leaves that find no counterpart.
    """
    tensors = _with_two_heads(join_qkv(tensors, source=source))
    return convert_with_stacks(tensors, shapes, RULES, source=source, keep=keep)


def _with_two_heads(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "deit.embeddings.distillation_token" not in tensors or "classifier.weight" not in tensors:
        return tensors
    heads = {name: x for name, x in tensors.items() if name.startswith("classifier.")}
    rest = {name: x for name, x in tensors.items() if name not in heads}
    doubled = {f"cls_{name}": 2 * x for name, x in heads.items()}
    return rest | doubled | {f"distillation_{name}": 0 * x for name, x in heads.items()}
