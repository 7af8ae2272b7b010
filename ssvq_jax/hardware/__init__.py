"""What a model costs on an accelerator: closed forms that jit, vmap and grad go through."""

from ssvq_jax.hardware.accelerator import Accelerator
from ssvq_jax.hardware.cost import Cost, LayerCosts, NetworkCost, cost
from ssvq_jax.hardware.dataflow import GemmCost, gemm_cost
from ssvq_jax.hardware.layers import Layers, merge_equal, stack_formats, with_bits, with_plan
from ssvq_jax.hardware.presets import load_accelerator, presets, save_accelerator
from ssvq_jax.hardware.reader import read_workload
from ssvq_jax.hardware.sweep import sweep
from ssvq_jax.hardware.workload import Product, Workload

__all__ = [
    "Accelerator",
    "Cost",
    "GemmCost",
    "LayerCosts",
    "Layers",
    "NetworkCost",
    "Product",
    "Workload",
    "cost",
    "gemm_cost",
    "load_accelerator",
    "merge_equal",
    "presets",
    "read_workload",
    "save_accelerator",
    "stack_formats",
    "sweep",
    "with_bits",
    "with_plan",
]
