"""ConvNeXt with the weights of timm's, torchvision's or transformers' models."""

from collections.abc import Iterable
from typing import Any

from ssvq_jax.models.convnext import ConvNeXtConfig
from ssvq_jax.models.import_blocks import convert_with_stacks
from ssvq_jax.models.import_state_dict import Renaming, Tensors


def import_convnext(
    tensors: Tensors, shapes: Any, config: ConvNeXtConfig, *, source: str, keep: Iterable[str] = ()
) -> dict[str, Any]:
    """Gives a `ConvNeXt` the weights of another implementation, blocks apart or stacked.

    Args:
        tensors: weights by name, of timm's or torchvision's ``convnext_*``, or of transformers'
            ``ConvNextForImageClassification``.
        shapes: variables of the model: arrays or shapes.
        config: sizes of the model.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values, as in `convert_state_dict`.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors or leaves that find no counterpart.
    """
    return convert_with_stacks(tensors, shapes, _rules(config), source=source, keep=keep)


def _rules(config: ConvNeXtConfig) -> list[Renaming]:
    embeddings = r"convnext\.embeddings\."
    kernels = {
        rf"stem\.0|features\.0\.0|{embeddings}patch_embeddings": "stem_conv",
        r"head\.fc|classifier\.2|classifier": "head",
    }
    norms = {
        rf"stem\.1|features\.0\.1|{embeddings}layernorm": "stem_norm",
        r"head\.norm|classifier\.0|convnext\.layernorm": "norm",
    }
    scales = {}
    # torchvision counts the stem, stages and what lies between them as one list.
    for i in range(1, len(config.depths)):
        before = rf"stages\.{i}\.downsample|features\.{2 * i}"
        before = rf"(?:{before}|convnext\.encoder\.stages\.{i}\.downsampling_layer)"
        norms[rf"{before}\.0"] = f"stages_{i}/downsample_norm"
        kernels[rf"{before}\.1"] = f"stages_{i}/downsample_conv"
    for i in range(len(config.depths)):
        block = rf"stages\.{i}\.blocks|features\.{2 * i + 1}|convnext\.encoder\.stages\.{i}\.layers"
        block, to = rf"(?:{block})\.(\d+)", rf"stages_{i}/blocks_\1"
        kernels[rf"{block}\.(?:conv_dw|block\.0|dwconv)"] = f"{to}/conv_dw"
        norms[rf"{block}\.(?:norm|block\.2|layernorm)"] = f"{to}/norm"
        kernels[rf"{block}\.(?:mlp\.fc1|block\.3|pwconv1)"] = f"{to}/mlp/fc1"
        kernels[rf"{block}\.(?:mlp\.fc2|block\.5|pwconv2)"] = f"{to}/mlp/fc2"
        scales[rf"{block}\.(?:gamma|layer_scale|layer_scale_parameter)"] = f"{to}/gamma"
    return [
        *[Renaming(rf"(?:{name})\.weight", f"params/{to}/kernel") for name, to in kernels.items()],
        *[Renaming(rf"(?:{name})\.weight", f"params/{to}/scale") for name, to in norms.items()],
        *[Renaming(rf"(?:{x})\.bias", f"params/{to}/bias") for x, to in (kernels | norms).items()],
        *[Renaming(name, f"params/{to}") for name, to in scales.items()],
    ]
