"""DeepLab weights of transformers and segmentation-models-pytorch."""

from collections.abc import Iterable
from typing import Any

from ssvq_jax.models.deeplab import DeepLabConfig
from ssvq_jax.models.import_inverted_residual import Layers, conv_norm_rules, dense_rules
from ssvq_jax.models.import_mobilenet import torchvision_layers, transformers_layers
from ssvq_jax.models.import_state_dict import Renaming, Tensors, convert_state_dict


def import_deeplab(
    tensors: Tensors,
    shapes: Any,
    config: DeepLabConfig,
    *,
    source: str,
    keep: Iterable[str] = (),
) -> dict[str, Any]:
    """Gives a `DeepLab` published weights.

    Args:
        tensors: the weights by name: of transformers' ``MobileNetV2ForSemanticSegmentation``
            (head ``v3``) or segmentation-models-pytorch's ``DeepLabV3Plus`` with ``mobilenet_v2``
            (head ``v3plus``).
        shapes: variables of the model: arrays or shapes.
        config: sizes of the model.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values: ``head/classifier/.*``.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors and leaves that do not fit.
    """
    rules = (_plus_rules if config.head == "v3plus" else _v3_rules)(config)
    return convert_state_dict(tensors, shapes, rules, source=source, keep=keep)


def _v3_rules(config: DeepLabConfig) -> list[Renaming]:
    layers = _under("backbone", transformers_layers(config.backbone.stages))
    del layers["backbone/final"]
    for ours, theirs in {"pool": "pool", "aspp": "aspp", "project": "projection"}.items():
        name = f"segmentation_head.conv_{theirs}"
        layers[f"head/{ours}"] = (f"{name}.convolution", f"{name}.normalization")
    return [
        *conv_norm_rules(layers),
        # The backbone's last convolution is in the file, but the head does not read it.
        Renaming(r"mobilenet_v2\.conv_1x1\..*", None),
        *dense_rules("head/classifier", "segmentation_head.classifier.convolution"),
    ]


def _plus_rules(config: DeepLabConfig) -> list[Renaming]:
    backbone = _under("backbone", torchvision_layers(config.backbone.stages))
    layers = {path: (f"encoder.{a}", f"encoder.{b}") for path, (a, b) in backbone.items()}
    pyramid, rules = "decoder.aspp.0", []
    plain = {
        "aspp_0": f"{pyramid}.convs.0.",
        "pool": f"{pyramid}.convs.4.",
        "project": f"{pyramid}.project.",
        "fine": "decoder.block1.",
    }
    separable = {
        f"aspp_{i}": (f"{pyramid}.convs.{i}.0", f"{pyramid}.convs.{i}.1") for i in (1, 2, 3)
    }
    separable["refine"] = ("decoder.aspp.1", "decoder.aspp.2")
    separable["decode"] = ("decoder.block2.0", "decoder.block2.1")
    for path, name in plain.items():
        at = 1 if path == "pool" else 0
        layers[f"head/{path}"] = (f"{name}{at}", f"{name}{at + 1}")
    for path, (convs, norm) in separable.items():
        layers[f"head/{path}/mix"] = (f"{convs}.1", norm)
        rules += dense_rules(f"head/{path}/depthwise", f"{convs}.0")
    return [
        *conv_norm_rules(layers),
        *rules,
        *dense_rules("head/classifier", "segmentation_head.0"),
    ]


def _under(root: str, layers: Layers) -> Layers:
    return {f"{root}/{path}": names for path, names in layers.items()}
