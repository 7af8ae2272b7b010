"""MobileNet weights of transformers, timm and torchvision."""

from collections.abc import Iterable
from typing import Any

from ssvq_jax.models.import_inverted_residual import (
    Layers,
    conv_norm_rules,
    dense_rules,
    timm_blocks,
)
from ssvq_jax.models.import_state_dict import Renaming, Tensors, convert_state_dict
from ssvq_jax.models.inverted_residual import Stages, block_paths
from ssvq_jax.models.mobilenet import MobileNetV2Config
from ssvq_jax.models.mobilenet_v3 import MobileNetV3Config


def import_mobilenet_v2(
    tensors: Tensors,
    shapes: Any,
    config: MobileNetV2Config,
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Gives a `MobileNetV2` published weights.

    Args:
        tensors: the weights by name: of transformers' ``MobileNetV2ForImageClassification``,
            timm's ``mobilenetv2_*`` or torchvision's ``mobilenet_v2``.
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
    rules = [
        *conv_norm_rules(timm | timm_blocks(config.stages)),
        *conv_norm_rules(torchvision_layers(config.stages)),
        *conv_norm_rules(transformers_layers(config.stages)),
        *dense_rules("classifier", "classifier"),
        *dense_rules("classifier", "classifier.1"),
    ]
    return convert_state_dict(tensors, shapes, rules, source=source, keep=keep)


def torchvision_layers(stages: Stages) -> Layers:
    """Names of MobileNetV2's convolutions and batch norms in torchvision."""
    layers: Layers = {"stem": ("features.0.0", "features.0.1")}
    blocks = list(block_paths(stages))
    for i, (path, spec) in enumerate(blocks, 1):
        at, k = f"features.{i}.conv.", 0
        if spec.expands:
            layers[f"{path}/expand"], k = (f"{at}0.0", f"{at}0.1"), 1
        layers[f"{path}/depthwise"] = (f"{at}{k}.0", f"{at}{k}.1")
        layers[f"{path}/project"] = (f"{at}{k + 1}", f"{at}{k + 2}")
    last = f"features.{len(blocks) + 1}"
    return layers | {"final": (f"{last}.0", f"{last}.1")}


def transformers_layers(stages: Stages) -> Layers:
    """Names of MobileNetV2's convolutions and batch norms in transformers."""
    root = "mobilenet_v2."
    names = {"stem": f"{root}conv_stem.first_conv", "final": f"{root}conv_1x1"}
    for i, (path, spec) in enumerate(block_paths(stages)):
        at = f"{root}layer.{i - 1}." if i else f"{root}conv_stem."
        if spec.expands:
            names[f"{path}/expand"] = f"{at}expand_1x1"
        names[f"{path}/depthwise"] = f"{at}conv_3x3"
        names[f"{path}/project"] = f"{at}reduce_1x1"
    return {path: (f"{name}.convolution", f"{name}.normalization") for path, name in names.items()}


def import_mobilenet_v3(
    tensors: Tensors,
    shapes: Any,
    config: MobileNetV3Config,
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Gives a `MobileNetV3` published weights.

    Args:
        tensors: the weights by name: of timm's ``mobilenetv3_large_100`` or torchvision's
            ``mobilenet_v3_large``.
        shapes: variables of the model: arrays or shapes.
        config: sizes of the model.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values: ``classifier/.*``.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors and leaves that do not fit.
    """
    last = f"blocks.{len(config.stages)}.0"
    timm: Layers = {"stem": ("conv_stem", "bn1"), "final": (f"{last}.conv", f"{last}.bn1")}
    layers, squeezes = _torchvision_v3_layers(config.stages)
    for path, spec in block_paths(config.stages):
        if spec.squeeze:
            at = path.replace("_", ".")
            squeezes += dense_rules(f"{path}/se/reduce", f"{at}.se.conv_reduce")
            squeezes += dense_rules(f"{path}/se/expand", f"{at}.se.conv_expand")
    rules = [
        *conv_norm_rules(timm | timm_blocks(config.stages)),
        *conv_norm_rules(layers),
        *squeezes,
        *dense_rules("hidden", "conv_head"),
        *dense_rules("classifier", "classifier"),
        *dense_rules("hidden", "classifier.0"),
        *dense_rules("classifier", "classifier.3"),
    ]
    return convert_state_dict(tensors, shapes, rules, source=source, keep=keep)


def _torchvision_v3_layers(stages: Stages) -> tuple[Layers, list[Renaming]]:
    """Names of convolutions and batch norms, and rules of squeeze and excitation."""
    layers: Layers = {"stem": ("features.0.0", "features.0.1")}
    squeezes: list[Renaming] = []
    blocks = list(block_paths(stages))
    for i, (path, spec) in enumerate(blocks, 1):
        at, k = f"features.{i}.block", 0
        for layer in ("expand", "depthwise", "se", "project"):
            if (layer == "expand" and not spec.expands) or (layer == "se" and not spec.squeeze):
                continue
            if layer == "se":
                squeezes += dense_rules(f"{path}/se/reduce", f"{at}.{k}.fc1")
                squeezes += dense_rules(f"{path}/se/expand", f"{at}.{k}.fc2")
            else:
                layers[f"{path}/{layer}"] = (f"{at}.{k}.0", f"{at}.{k}.1")
            k += 1
    last = f"features.{len(blocks) + 1}"
    return layers | {"final": (f"{last}.0", f"{last}.1")}, squeezes
