"""ResNet with the weights of timm's, torchvision's or transformers' models."""

from collections.abc import Iterable
from typing import Any

from ssvq_jax.models.import_state_dict import Renaming, Tensors, convert_state_dict
from ssvq_jax.models.resnet import ResNetConfig


def import_resnet(
    tensors: Tensors, shapes: Any, config: ResNetConfig, *, source: str, keep: Iterable[str] = ()
) -> dict[str, Any]:
    """Gives a `ResNet` the weights of another implementation.

    Args:
        tensors: weights by name, of timm's or torchvision's ``resnet*``, or of transformers'
            ``ResNetForImageClassification``.
        shapes: variables of the model, ``params`` and ``batch_stats``: arrays or shapes.
        config: sizes of the model.
        source: what the tensors are of, for messages.
        keep: regular expressions of leaves that keep their values, as in `convert_state_dict`.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors or leaves that find no counterpart.
    """
    return convert_state_dict(tensors, shapes, _rules(config), source=source, keep=keep)


def _rules(config: ResNetConfig) -> list[Renaming]:
    rules = [
        Renaming(r".*\.num_batches_tracked", None),
        Renaming(r"(?:fc|classifier\.1)\.weight", "params/head/kernel"),
        Renaming(r"(?:fc|classifier\.1)\.bias", "params/head/bias"),
        *_pair(r"conv1", r"bn1", "conv1", "bn1"),
        *_pair(
            r"layer(\d+)\.(\d+)\.conv(\d+)", r"layer(\d+)\.(\d+)\.bn(\d+)",
            r"layer\1_\2/conv\3", r"layer\1_\2/bn\3",
        ),
        *_pair(
            r"layer(\d+)\.(\d+)\.downsample\.0", r"layer(\d+)\.(\d+)\.downsample\.1",
            r"layer\1_\2/downsample_conv", r"layer\1_\2/downsample_bn",
        ),
        *_transformers(r"embedder\.embedder", "conv1", "bn1"),
    ]  # fmt: skip
    # transformers counts stages and the convolutions of a block from 0.
    for stage in range(len(config.depths)):
        block = rf"encoder\.stages\.{stage}\.layers\.(\d+)"
        to = rf"layer{stage + 1}_\1"
        rules += _transformers(
            rf"{block}\.shortcut", f"{to}/downsample_conv", f"{to}/downsample_bn"
        )
        for i in range(3):
            rules += _transformers(rf"{block}\.layer\.{i}", f"{to}/conv{i + 1}", f"{to}/bn{i + 1}")
    return rules


def _transformers(name: str, conv: str, norm: str) -> list[Renaming]:
    start = rf"resnet\.{name}\."
    return _pair(f"{start}convolution", f"{start}normalization", conv, norm)


def _pair(conv: str, norm: str, to_conv: str, to_norm: str) -> list[Renaming]:
    return [
        Renaming(rf"{conv}\.weight", f"params/{to_conv}/kernel"),
        Renaming(rf"{norm}\.weight", f"params/{to_norm}/scale"),
        Renaming(rf"{norm}\.bias", f"params/{to_norm}/bias"),
        Renaming(rf"{norm}\.running_mean", f"batch_stats/{to_norm}/mean"),
        Renaming(rf"{norm}\.running_var", f"batch_stats/{to_norm}/var"),
    ]
