"""Flax models, by name or from a user's module, and weights for them."""

from ssvq_jax.models.loading import LoadedModel, load_model
from ssvq_jax.models.published import PUBLISHED, fetch, fetched
from ssvq_jax.models.registry import (
    REGISTRY,
    InputRecipe,
    create,
    import_weights,
    input_shapes,
    param_shapes,
    variable_shapes,
)
from ssvq_jax.models.tensor_files import SAFETENSORS, is_foreign, is_tensors, load_tensors
from ssvq_jax.models.vit import ViT, ViTConfig
from ssvq_jax.models.weights import fit_weights, load_weights

__all__ = [
    "PUBLISHED",
    "REGISTRY",
    "SAFETENSORS",
    "InputRecipe",
    "LoadedModel",
    "ViT",
    "ViTConfig",
    "create",
    "fetch",
    "fetched",
    "fit_weights",
    "import_weights",
    "input_shapes",
    "is_foreign",
    "is_tensors",
    "load_model",
    "load_tensors",
    "load_weights",
    "param_shapes",
    "variable_shapes",
]
