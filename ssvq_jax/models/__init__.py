"""Flax models, by name or from a user's module, and weights for them."""

from ssvq_jax.models.loading import LoadedModel, load_model
from ssvq_jax.models.registry import CONFIGS, create, param_shapes
from ssvq_jax.models.vit import ViT, ViTConfig
from ssvq_jax.models.weights import SAFETENSORS, fit_weights, load_tensors, load_weights

__all__ = [
    "CONFIGS",
    "SAFETENSORS",
    "LoadedModel",
    "ViT",
    "ViTConfig",
    "create",
    "fit_weights",
    "load_model",
    "load_tensors",
    "load_weights",
    "param_shapes",
]
