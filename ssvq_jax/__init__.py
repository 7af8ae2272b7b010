"""Vector quantization of trained JAX models as pure transforms over parameter pytrees.

Bind rules to a tree with `make_plan`, encode the weights with `Plan.init`, train what `split` calls
learned with any optax optimizer inside `freeze_signs`, and `Plan.finalize` the result.
"""

from importlib.metadata import version

from ssvq_jax.packing import PackedFile, PackedFileError, load, save
from ssvq_jax.plan import Packed, Plan, make_plan
from ssvq_jax.quantizers import (
    Calibration,
    ChannelRelaxed,
    ChannelRelaxedSignSplit,
    InputMoments,
    Masked,
    MaskedSignSplit,
    Pyramid,
    SignSplit,
    Uniform,
    Vector,
)
from ssvq_jax.recipe import PRESETS, Rule, load_recipe
from ssvq_jax.training.freezing import cosine_threshold, freeze_signs
from ssvq_jax.tree import LeafSpec, split

__version__ = version("ssvq_jax")

__all__ = [
    "PRESETS",
    "Calibration",
    "ChannelRelaxed",
    "ChannelRelaxedSignSplit",
    "InputMoments",
    "LeafSpec",
    "Masked",
    "MaskedSignSplit",
    "Packed",
    "PackedFile",
    "PackedFileError",
    "Plan",
    "Pyramid",
    "Rule",
    "SignSplit",
    "Uniform",
    "Vector",
    "__version__",
    "cosine_threshold",
    "freeze_signs",
    "load",
    "load_recipe",
    "make_plan",
    "save",
    "split",
]
