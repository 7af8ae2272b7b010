"""What a network costs on an accelerator, layer by layer and altogether."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ssvq_jax.hardware.accelerator import NUMBERS, Accelerator
from ssvq_jax.hardware.checks import is_known
from ssvq_jax.hardware.dataflow import map_product
from ssvq_jax.hardware.energy import edges_sram_pj, energy
from ssvq_jax.hardware.exact import Count, in_float64
from ssvq_jax.hardware.layers import Layers
from ssvq_jax.hardware.memory import Traffic, edges, latency, traffic

BOUNDS = ("compute", "dram", "decode", "vector")


class LayerCosts(NamedTuple):
    """Costs of every layer ``[layers]``, of all its ``count`` products in one round.

    Attributes:
        macs: multiplications.
        compute_cycles: of the array: those of loading, streaming and draining together.
        load_cycles: in which the array only takes what stays in it.
        drain_cycles: in which the last results leave it.
        dram_cycles: of transfers.
        decode_cycles: of look-ups.
        cycles: the longest of compute, dram and decode: the layer by itself, all overlapped.
        utilization: share of the array's multiplications, while it computes, that are real ones.
        weight_dram_bytes: weights from DRAM.
        activation_dram_bytes: inputs, outputs and partial sums from and to DRAM.
        sram_bytes: between buffers and array.
        mac_pj: energy of multiplications, in picojoule.
        sram_pj: of the buffers.
        dram_pj: of transfers.
        decode_pj: of look-ups.
    """

    macs: Count
    compute_cycles: Count
    load_cycles: Count
    drain_cycles: Count
    dram_cycles: Count
    decode_cycles: Count
    cycles: Count
    utilization: Count
    weight_dram_bytes: Count
    activation_dram_bytes: Count
    sram_bytes: Count
    mac_pj: Count
    sram_pj: Count
    dram_pj: Count
    decode_pj: Count


class NetworkCost(NamedTuple):
    """Costs of one call of the network.

    Attributes:
        latency_s: seconds.
        latency_cycles: cycles.
        compute_cycles: of the arrays, over all layers.
        dram_cycles: of all transfers, the network's input and output included.
        decode_cycles: of all look-ups.
        vector_cycles: of operations outside of products.
        first_fill_cycles: before the first product can begin.
        last_write_cycles: for the last output.
        macs: multiplications.
        utilization: share of the arrays' multiplications over the latency that are real ones.
        weight_dram_bytes: weights from DRAM, those that feed no product included.
        activation_dram_bytes: activations from and to DRAM, the network's input and output too.
        sram_bytes: between buffers and array.
        macs_per_dram_byte: arithmetic intensity: where the network stands on the roofline.
        ridge_macs_per_dram_byte: intensity from which on the arrays' peak is the limit.
        mac_j: energy of multiplications, in joule.
        sram_j: of the buffers.
        dram_j: of transfers.
        decode_j: of look-ups.
        vector_j: of operations outside of products.
        energy_j: of everything.
    """

    latency_s: Count
    latency_cycles: Count
    compute_cycles: Count
    dram_cycles: Count
    decode_cycles: Count
    vector_cycles: Count
    first_fill_cycles: Count
    last_write_cycles: Count
    macs: Count
    utilization: Count
    weight_dram_bytes: Count
    activation_dram_bytes: Count
    sram_bytes: Count
    macs_per_dram_byte: Count
    ridge_macs_per_dram_byte: Count
    mac_j: Count
    sram_j: Count
    dram_j: Count
    decode_j: Count
    vector_j: Count
    energy_j: Count

    @property
    def bound(self) -> Any:
        """What takes longest: ``compute``, ``dram``, ``decode`` or ``vector``."""
        cycles = np.stack([np.asarray(getattr(self, f"{name}_cycles")) for name in BOUNDS])
        names = np.array(BOUNDS)[np.argmax(cycles, axis=0)]
        return names if np.ndim(names) else str(names)


class Cost(NamedTuple):
    """What `cost` returns.

    Attributes:
        layers: of every layer.
        network: of the whole.
    """

    layers: LayerCosts
    network: NetworkCost


def cost(layers: Layers, accelerator: Accelerator, *, sharpness: int | float | None = None) -> Cost:
    """Counts what a network costs; jit-able, vmap-able, differentiable in the numbers.

    Args:
        layers: the network and the formats of its weights, from `with_plan` or `with_bits`.
        accelerator: a single one that it runs on; for several, `sweep` or `jax.vmap`.
        sharpness: None for exact counts; 0 to below 1 rounds smoothly instead
            (`ssvq_jax.hardware.dataflow.smooth_ceil`), so that gradients for array sizes are not
            zero. What fits a buffer is decided exactly in either case.

    Returns:
        Costs in float64; counts are exact to 2^53 without ``sharpness``.

    Raises:
        ValueError: for an accelerator or a sharpness out of range.

    Example:
        >>> from ssvq_jax.hardware import Product, Workload, presets, with_bits
        >>> layers = with_bits(Workload((Product("fc", 1, 1024, 1024, leaves=("w",)),)), 8)
        >>> found = cost(layers, presets["ethos-u65-512"]).network
        >>> found.bound, f"{found.latency_s:.6f}"
        ('dram', '0.000280')
    """
    accelerator.check()
    several = [name for name in NUMBERS if np.ndim(getattr(accelerator, name))]
    if several or np.ndim(layers.repeats) != 1:
        what = f"{several} of accelerator '{accelerator.name}'" if several else "the layers"
        raise ValueError(f"{what} have an axis too many: use sweep, or jax.vmap over it")
    if sharpness is not None and is_known(sharpness) and not 0 <= sharpness < 1:
        raise ValueError(f"sharpness={sharpness}: give 0 to below 1, or None for exact counts")
    return _cost(layers, accelerator, sharpness)


@in_float64
def _cost(layers: Layers, a: Accelerator, sharpness: Any) -> Cost:
    columns = layers.columns
    m, k, n, count = (columns[name] for name in ("m", "k", "n", "count"))
    runs = map_product(m, k, n, count, a, sharpness)
    moved = traffic(layers, runs, a)
    spent = energy(layers, moved, a)
    per_byte = a.clock_hz / a.dram_bytes_per_s
    macs = m * k * n * count
    peak = a.rows * a.columns * a.arrays
    decode_cycles = (moved.lookups + moved.coded_numbers) / a.lookups_per_cycle
    dram_cycles = moved.dram_bytes * per_byte
    each = LayerCosts(
        macs=macs,
        compute_cycles=runs.cycles,
        load_cycles=runs.load_cycles,
        drain_cycles=runs.drain_cycles,
        dram_cycles=dram_cycles,
        decode_cycles=decode_cycles,
        cycles=jnp.maximum(jnp.maximum(runs.cycles, dram_cycles), decode_cycles),
        utilization=macs / (runs.cycles * peak),
        weight_dram_bytes=moved.weight_dram_bytes,
        activation_dram_bytes=moved.activation_dram_bytes,
        sram_bytes=moved.input_sram_bytes + moved.weight_sram_bytes + moved.output_sram_bytes,
        mac_pj=spent.mac_pj,
        sram_pj=spent.sram_pj,
        dram_pj=spent.dram_pj,
        decode_pj=spent.decode_pj,
    )
    return Cost(each, _network(layers, each, moved, a))


def _network(layers: Layers, each: LayerCosts, moved: Traffic, a: Accelerator) -> NetworkCost:
    outside = edges(layers, moved, a)
    vector_cycles = jnp.where(
        a.vector_ops_per_cycle > 0,
        layers.operations / jnp.where(a.vector_ops_per_cycle > 0, a.vector_ops_per_cycle, 1.0),
        0.0,
    )
    spent = latency(
        layers, moved, outside, each.compute_cycles, each.decode_cycles, vector_cycles, a
    )

    def total(column: Count) -> Count:
        return jnp.sum(layers.repeats * column)

    macs, moved_bytes = total(each.macs), total(moved.dram_bytes) + outside.dram_bytes
    per_byte, peak = a.clock_hz / a.dram_bytes_per_s, a.rows * a.columns * a.arrays
    sram_pj = total(each.sram_pj) + edges_sram_pj(outside, a)
    dram_pj = total(each.dram_pj) + 8 * outside.dram_bytes * a.dram_pj_per_bit
    joules = {
        "mac_j": total(each.mac_pj) * 1e-12,
        "sram_j": sram_pj * 1e-12,
        "dram_j": dram_pj * 1e-12,
        "decode_j": total(each.decode_pj) * 1e-12,
        "vector_j": layers.operations * a.vector_op_pj * 1e-12,
    }
    return NetworkCost(
        latency_s=spent.cycles / a.clock_hz,
        latency_cycles=spent.cycles,
        compute_cycles=total(each.compute_cycles),
        dram_cycles=moved_bytes * per_byte,
        decode_cycles=total(each.decode_cycles),
        vector_cycles=vector_cycles,
        first_fill_cycles=spent.first_fill_cycles,
        last_write_cycles=spent.last_write_cycles,
        macs=macs,
        utilization=macs / (spent.cycles * peak),
        weight_dram_bytes=total(each.weight_dram_bytes) + outside.other_weight_bytes,
        activation_dram_bytes=total(each.activation_dram_bytes)
        + outside.input_bytes
        + outside.output_bytes,
        sram_bytes=total(each.sram_bytes),
        macs_per_dram_byte=macs / moved_bytes,
        ridge_macs_per_dram_byte=peak * per_byte,
        **joules,
        energy_j=jnp.sum(jnp.stack(list(joules.values()))),
    )
