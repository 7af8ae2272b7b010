"""Models by name."""

import dataclasses

import jax
import jax.numpy as jnp

from ssvq_jax.models.vit import ViT, ViTConfig

CONFIGS: dict[str, ViTConfig] = {
    "deit_tiny": ViTConfig(width=192, heads=3),
    "deit_small": ViTConfig(width=384, heads=6),
    "deit_base": ViTConfig(width=768, heads=12),
    # For 32x32 colour images (CIFAR).
    "deit_cifar": ViTConfig(image_size=32, patch_size=4, width=192, depth=9, heads=3, classes=10),
    # For 28x28 digits: 16 patches of 7x7.
    "deit_digits": ViTConfig(
        image_size=28, channels=1, patch_size=7, width=48, depth=2, heads=3, classes=10
    ),
}


def create(name: str, *, classes: int | None = None, scan: bool = False) -> ViT:
    """Makes a model by name.

    Args:
        name: a key of `CONFIGS`.
        classes: number of classes, if not the name's own.
        scan: scan over stacked blocks.

    Returns:
        The module; its ``config`` tells the image size.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> create("deit_tiny").config.width
        192
    """
    if name not in CONFIGS:
        raise ValueError(f"model '{name}' is unknown: choose one of {sorted(CONFIGS)}")
    config = CONFIGS[name]
    if classes is not None:
        config = dataclasses.replace(config, classes=classes)
    return ViT(config, scan=scan)


def param_shapes(model: ViT) -> dict:
    """Shapes of a model's parameters, without computing any.

    Example:
        >>> shapes = param_shapes(create("deit_tiny"))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        5717416
    """
    size = model.config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, model.config.channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]
