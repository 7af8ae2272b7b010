"""Names that other implementations of MobileNets and EfficientNets give their layers."""

import re
from collections.abc import Mapping

from ssvq_jax.models.import_state_dict import Renaming
from ssvq_jax.models.inverted_residual import Stages, block_paths

# Path of a layer of ours, and the names of the convolution and batch norm that it is of.
Layers = dict[str, tuple[str, str]]


def conv_norm_rules(layers: Mapping[str, tuple[str, str]]) -> list[Renaming]:
    """Returns the rules for convolutions with batch norm, and one for PyTorch's counts of steps."""
    rules = [Renaming(r".*\.num_batches_tracked", None)]
    for path, (conv, norm) in layers.items():
        conv, norm = re.escape(conv), re.escape(norm)
        rules += [
            Renaming(rf"{conv}\.weight", f"params/{path}/conv/kernel"),
            Renaming(rf"{norm}\.weight", f"params/{path}/bn/scale"),
            Renaming(rf"{norm}\.bias", f"params/{path}/bn/bias"),
            Renaming(rf"{norm}\.running_mean", f"batch_stats/{path}/bn/mean"),
            Renaming(rf"{norm}\.running_var", f"batch_stats/{path}/bn/var"),
        ]
    return rules


def dense_rules(path: str, name: str) -> list[Renaming]:
    """Returns the rules for a layer with a bias."""
    name = re.escape(name)
    return [
        Renaming(rf"{name}\.weight", f"params/{path}/kernel"),
        Renaming(rf"{name}\.bias", f"params/{path}/bias"),
    ]


def timm_blocks(stages: Stages) -> Layers:
    """Names of the blocks' layers in timm."""
    layers: Layers = {}
    for path, spec in block_paths(stages):
        at = path.replace("_", ".") + "."
        if spec.expands:
            layers[f"{path}/expand"] = (f"{at}conv_pw", f"{at}bn1")
            layers[f"{path}/depthwise"] = (f"{at}conv_dw", f"{at}bn2")
            layers[f"{path}/project"] = (f"{at}conv_pwl", f"{at}bn3")
        else:
            layers[f"{path}/depthwise"] = (f"{at}conv_dw", f"{at}bn1")
            layers[f"{path}/project"] = (f"{at}conv_pw", f"{at}bn2")
    return layers
