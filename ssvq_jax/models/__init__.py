"""Flax models, by name."""

from ssvq_jax.models.registry import CONFIGS, create, param_shapes
from ssvq_jax.models.vit import ViT, ViTConfig

__all__ = ["CONFIGS", "ViT", "ViTConfig", "create", "param_shapes"]
