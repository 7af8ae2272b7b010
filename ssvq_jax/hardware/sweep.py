"""Costs on a grid of accelerators."""

import dataclasses
from typing import Any

import jax
import numpy as np

from ssvq_jax.hardware.accelerator import NUMBERS, Accelerator
from ssvq_jax.hardware.cost import NetworkCost, cost
from ssvq_jax.hardware.exact import in_float64
from ssvq_jax.hardware.layers import Layers, merge_equal


def sweep(layers: Layers, accelerator: Accelerator, **values: Any) -> NetworkCost:
    """Counts what a network costs for every combination of an accelerator's numbers.

    It compiles by itself: call it outside of `jax.jit`.

    Args:
        layers: the network and the formats of its weights.
        accelerator: everything that is not swept.
        **values: fields of `Accelerator` and the values that they take ``[values]``.

    Returns:
        Costs, float64 ``[values of the first field, values of the second, ...]``.

    Raises:
        ValueError: for a field that is no number, or a value out of range.

    Example:
        >>> from ssvq_jax.hardware import Product, Workload, presets, with_bits
        >>> layers = with_bits(Workload((Product("fc", 1, 512, 512, leaves=("w",)),)), 8)
        >>> edge = presets["edge-ews-64"]
        >>> found = sweep(layers, edge, rows=[32, 64], dram_bytes_per_s=[1e9, 2e9])
        >>> (found.latency_s * 1e6).round().astype(int).tolist()
        [[263, 132], [263, 132]]
    """
    unknown = sorted(set(values) - set(NUMBERS))
    if unknown or not values:
        raise ValueError(f"cannot sweep over {unknown}: choose some of {list(NUMBERS)}")
    axes = {name: np.asarray(x, np.float64) for name, x in values.items()}
    for name, axis in axes.items():
        if axis.ndim != 1 or not axis.size:
            raise ValueError(f"{name}: give a list of values, not an array of {axis.shape}")
    dataclasses.replace(accelerator, **axes).check()
    grid = np.meshgrid(*axes.values(), indexing="ij")
    flat = {name: x.reshape(-1) for name, x in zip(axes, grid, strict=True)}
    found = _costs(merge_equal(layers), accelerator, flat)
    return NetworkCost(*(np.reshape(x, grid[0].shape) for x in found))


@in_float64
def _costs(layers: Layers, accelerator: Accelerator, values: dict[str, Any]) -> NetworkCost:
    return _compiled(layers, accelerator, values)


@jax.jit
def _compiled(layers: Layers, accelerator: Accelerator, values: dict[str, Any]) -> NetworkCost:
    def one(values: dict[str, Any]) -> NetworkCost:
        return cost(layers, dataclasses.replace(accelerator, **values)).network

    return jax.vmap(one)(values)
