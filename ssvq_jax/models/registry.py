"""Models by name: how each is made, which images it takes, and whose weights it can be given."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssvq_jax.models import (
    convnext,
    deeplab,
    efficientnet,
    llama,
    mobilenet,
    mobilenet_v3,
    resnet,
    swin,
    vit,
)
from ssvq_jax.models.import_convnext import import_convnext
from ssvq_jax.models.import_deeplab import import_deeplab
from ssvq_jax.models.import_deit import import_deit
from ssvq_jax.models.import_efficientnet import import_efficientnet_lite
from ssvq_jax.models.import_llama import import_llama
from ssvq_jax.models.import_mobilenet import import_mobilenet_v2, import_mobilenet_v3
from ssvq_jax.models.import_resnet import import_resnet
from ssvq_jax.models.import_state_dict import Tensors
from ssvq_jax.models.import_swin import import_swin

Task = Literal["classification", "segmentation", "language"]
Importer = Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class InputRecipe:
    """How images are prepared for a model that was trained on ImageNet.

    Attributes:
        normalization: name of a normalization of `ssvq_jax.data`.
        crop_share: part of the short side that the middle crop keeps.
        interpolation: how images are resized.
    """

    normalization: str = "imagenet"
    crop_share: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @property
    def resizing(self) -> dict[str, Any]:
        """How they become squares, by argument of `ssvq_jax.data.ImageData`."""
        return {"crop_share": self.crop_share, "interpolation": self.interpolation}


@dataclasses.dataclass(frozen=True)
class Registered:
    """A model under a name.

    Attributes:
        module: its class, which takes ``config``.
        config: its sizes; has ``classes`` unless it is a language model.
        importer: gives it the weights of other implementations, see `import_weights`.
        inputs: how images are prepared, for models of the field.
        task: what it does.
    """

    module: type[nn.Module]
    config: Any
    importer: Importer
    inputs: InputRecipe | None = None
    task: Task = "classification"


# For 32x32 colour images (CIFAR), and for 28x28 digits: 16 patches of 7x7.
_SMALL = {
    "deit_cifar": vit.ViTConfig(
        image_size=32, patch_size=4, width=192, depth=9, heads=3, classes=10
    ),
    # 16 tokens after a stem of convolutions: trains on two CPU cores.
    "vit_cifar": vit.ViTConfig(
        image_size=32, patch_size=8, width=128, depth=6, heads=4, classes=10, stem=(32, 64, 128)
    ),
    "deit_digits": vit.ViTConfig(
        image_size=28, channels=1, patch_size=7, width=48, depth=2, heads=3, classes=10
    ),
}
_DEIT = {
    "deit_tiny": vit.ViTConfig(width=192, heads=3),
    "deit_small": vit.ViTConfig(width=384, heads=6),
    "deit_base": vit.ViTConfig(width=768, heads=12),
}
_DISTILLED = {
    f"{name}_distilled": dataclasses.replace(config, distilled=True)
    for name, config in _DEIT.items()
}
# timm's, but for the normalization: TensorFlow trained with (p - 127) / 128, which timm rounds to
# (p - 127.5) / 127.5.
_LITE_INPUTS = {
    "efficientnet_lite0": InputRecipe("lite", 0.875),
    "efficientnet_lite1": InputRecipe("lite", 0.882),
    "efficientnet_lite2": InputRecipe("lite", 0.890),
    "efficientnet_lite3": InputRecipe("lite", 0.904, "bilinear"),
    "efficientnet_lite4": InputRecipe("lite", 0.920, "bilinear"),
}


def _import_deit(
    tensors: Tensors, shapes: Any, config: Any, *, source: str, keep: Iterable[str] = ()
) -> dict[str, Any]:
    del config  # the shapes say it all
    return import_deit(tensors, shapes, source=source, keep=keep)


def _family(
    module: type[nn.Module],
    configs: Mapping[str, Any],
    importer: Importer,
    inputs: InputRecipe | Mapping[str, InputRecipe] | None = None,
    task: Task = "classification",
) -> dict[str, Registered]:
    """Entries of one module; ``inputs`` are those of all, or by name."""
    return {
        name: Registered(
            module, config, importer, inputs[name] if isinstance(inputs, Mapping) else inputs, task
        )
        for name, config in configs.items()
    }


_BICUBIC, _BILINEAR = InputRecipe(), InputRecipe(interpolation="bilinear")
_LARGER = InputRecipe(crop_share=0.9)
_GOOGLE = InputRecipe("half", 0.875, "bilinear")
_DEEPLAB_INPUTS = {
    "deeplabv3_mobilenetv2": InputRecipe("half", 513 / 545, "bilinear"),
    "deeplabv3_mobilenetv2_os8": InputRecipe("half", 513 / 545, "bilinear"),
    # segmentation-models-pytorch says no more than the normalization.
    "deeplabv3plus_mobilenetv2": InputRecipe("imagenet", 1.0, "bilinear"),
}

_V2_INPUTS = {name: _GOOGLE if name.startswith("tf_") else _BICUBIC for name in mobilenet.CONFIGS}
_V3_INPUTS = {
    name: _BILINEAR if name.startswith("torchvision_") else _BICUBIC
    for name in mobilenet_v3.CONFIGS
}

# Recipes of inputs are timm's (ResNet: of torchvision's weights there), transformers' for Google's
# weights (`tf_mobilenetv2`, `deeplabv3`), torchvision's for its own.
REGISTRY: Mapping[str, Registered] = {
    **_family(vit.ViT, _DEIT | _DISTILLED, _import_deit, _LARGER),
    **_family(vit.ViT, _SMALL, _import_deit),
    **_family(swin.Swin, swin.CONFIGS, import_swin, _LARGER),
    **_family(convnext.ConvNeXt, convnext.CONFIGS, import_convnext, _BICUBIC),
    **_family(resnet.ResNet, resnet.CONFIGS, import_resnet, _BILINEAR),
    **_family(resnet.ResNet, resnet.SMALL_CONFIGS, import_resnet),
    **_family(mobilenet.MobileNetV2, mobilenet.CONFIGS, import_mobilenet_v2, _V2_INPUTS),
    **_family(mobilenet_v3.MobileNetV3, mobilenet_v3.CONFIGS, import_mobilenet_v3, _V3_INPUTS),
    **_family(
        efficientnet.EfficientNetLite, efficientnet.CONFIGS, import_efficientnet_lite, _LITE_INPUTS
    ),
    **_family(deeplab.DeepLab, deeplab.CONFIGS, import_deeplab, _DEEPLAB_INPUTS, "segmentation"),
    **_family(llama.Llama, llama.CONFIGS, import_llama, task="language"),
}


def registered(name: str) -> Registered:
    """Finds a model.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> registered("efficientnet_lite0").inputs.normalization
        'lite'
    """
    if name not in REGISTRY:
        raise ValueError(unknown(name))
    return REGISTRY[name]


def unknown(name: str) -> str:
    """Says that there is no such model, what there is, and which names are nearest."""
    near = difflib.get_close_matches(name, REGISTRY, n=3)
    nearest = f" (nearest: {', '.join(near)})" if near else ""
    return f"model '{name}' is unknown: choose one of {sorted(REGISTRY)}{nearest}"


def create(
    name: str,
    *,
    num_classes: int | None = None,
    scan: bool = False,
    remat: bool = False,
    dtype: Any = jnp.float32,
) -> Any:
    """Makes a model by name.

    Args:
        name: a key of `REGISTRY`.
        num_classes: number of classes, if not the name's own.
        scan: scan over stacked blocks, for models of equal blocks.
        remat: compute blocks again for the backward pass, for models that have it.
        dtype: dtype of activations; parameters are float32.

    Returns:
        The module; its ``config`` tells the image size.

    Raises:
        ValueError: for an unknown name, or an option that the model does not have.

    Example:
        >>> create("deit_tiny").config.width
        192
    """
    found = registered(name)
    config = found.config
    if num_classes is not None:
        if found.task == "language":
            raise ValueError(f"num_classes={num_classes}: model '{name}' predicts tokens")
        config = dataclasses.replace(config, classes=num_classes)
    options: dict[str, Any] = {"scan": scan, "remat": remat}
    fields = {field.name for field in dataclasses.fields(found.module)}
    for option, wanted in options.items():
        if wanted and option not in fields:
            raise ValueError(f"{option}: model '{name}' has none; leave it out")
    chosen = {option: wanted for option, wanted in options.items() if option in fields}
    return found.module(config=config, dtype=dtype, **chosen)  # type: ignore[call-arg]


def import_weights(
    name: str,
    tensors: Tensors,
    variables: Any,
    *,
    source: str,
    new_head: bool = False,
) -> dict[str, Any]:
    """Gives a model of the registry the weights of another implementation of it.

    Args:
        name: a key of `REGISTRY`.
        tensors: the weights by name, of timm, torchvision, transformers, or as published.
        variables: the model's own: shapes, or arrays if the head is to stay.
        source: what the tensors are of, for messages.
        new_head: leave the classifier as it is in ``variables``: for other classes.

    Returns:
        The variables.

    Raises:
        ValueError: naming tensors and leaves that do not fit.
    """
    found = registered(name)
    keep = (r"(.*/)?(head|head_dist|classifier)/(kernel|bias)",) if new_head else ()
    return found.importer(tensors, variables, found.config, source=source, keep=keep)


def input_shapes(model: Any, batch: int = 1) -> jax.ShapeDtypeStruct:
    """Shape of what a model of the registry takes: images, or a full context of tokens."""
    if isinstance(model, llama.Llama):
        return jax.ShapeDtypeStruct((batch, model.config.context), jnp.int32)
    config = model.config
    shape = (batch, config.image_size, config.image_size, config.channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def variable_shapes(model: Any) -> dict[str, Any]:
    """Shapes of a model's variables, ``params`` among them, without computing any."""
    return dict(jax.eval_shape(model.init, jax.random.key(0), input_shapes(model)))


def param_shapes(model: Any) -> dict[str, Any]:
    """Shapes of a model's parameters, without computing any.

    Example:
        >>> shapes = param_shapes(create("deit_tiny"))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        5717416
    """
    return variable_shapes(model)["params"]
