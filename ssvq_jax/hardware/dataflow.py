"""How a matrix product runs on a systolic array: cycles and accesses in closed form.

A product ``[M, K] x [K, N]`` is cut into folds that fill the array; each runs on its own, and one
that fills it in part costs as much as a whole one. With R rows, C columns, c x d weights a PE (one
but for ``ews``), ceil for rounding up and the folds f = f_r·f_c:

| dataflow | f_r | f_c | cycles of a fold: load + stream + drain |
|---|---|---|---|
| ws, ews | ceil(K/(R·c)) | ceil(N/(C·d)) | R·c·d + M·c·d + R + C - 2 |
| is | ceil(K/R) | ceil(M/C) | R + N + R + C - 2 |
| os | ceil(M/R) | ceil(N/C) | 0 + K + R + C - 2 |

Where the next load is overlapped, all folds take load + f·max(stream, load) + drain together.

Sources: Samajdar et al., "SCALE-Sim", arXiv 1811.02883, whose cycles and SRAM counts these are;
overlapped loads as in ZigZag (Mei et al., IEEE Transactions on Computers 2021); enhanced weight
stationary is our reading of the description in arXiv 2503.08668, section 4.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ssvq_jax.hardware.accelerator import Accelerator
from ssvq_jax.hardware.checks import LARGEST, is_known
from ssvq_jax.hardware.exact import Count, Number, in_float64


class Mapping(NamedTuple):
    """How ``count`` equal products run on the arrays.

    Attributes:
        load_cycles: in which the arrays only take what stays in them.
        stream_cycles: in which numbers stream through.
        drain_cycles: in which the last results leave.
        input_reads: how often each input goes from its buffer to the array.
        weight_reads: how often each weight does.
        output_updates: how often each result is written, as a partial sum first.
        input_passes: how often an input is asked for by the loop around the folds: from DRAM, if
            it does not fit.
        weight_passes: likewise.
        drained: numbers that SCALE-Sim counts as written while outputs drain (compatibility).
    """

    load_cycles: Count
    stream_cycles: Count
    drain_cycles: Count
    input_reads: Count
    weight_reads: Count
    output_updates: Count
    input_passes: Count
    weight_passes: Count
    drained: Count

    @property
    def cycles(self) -> Count:
        """Cycles of computing."""
        return self.load_cycles + self.stream_cycles + self.drain_cycles


class GemmCost(NamedTuple):
    """Cost of one matrix product; accesses are counted in elements.

    Attributes:
        cycles: of computing, with filling and draining the array, without waiting for DRAM.
        macs: multiplications, M·N·K.
        utilization: share of the array's multiplications that are real ones, 0 to 1.
        input_sram_reads: of inputs into the array.
        weight_sram_reads: of weights into the array.
        output_sram_writes: of results, partial ones included.
        input_dram_reads: of inputs into their buffer.
        weight_dram_reads: of weights into their buffer.
        output_dram_writes: of results, and of partial sums where they are spilled.
        partial_sum_dram_reads: of spilled partial sums.
    """

    cycles: Count
    macs: Count
    utilization: Count
    input_sram_reads: Count
    weight_sram_reads: Count
    output_sram_writes: Count
    input_dram_reads: Count
    weight_dram_reads: Count
    output_dram_writes: Count
    partial_sum_dram_reads: Count


def gemm_cost(M: Number, K: Number, N: Number, accelerator: Accelerator) -> GemmCost:
    """Counts the cycles and accesses of one product ``[M, K] x [K, N]`` by itself.

    All operands begin and end in DRAM, and have the multipliers' precision. An operand comes from
    DRAM once if it fits half of its buffer, or once for every fold of the outer loop that needs all
    of it again. jit-able, and vmap-able over the sizes and the accelerator's numbers.

    Args:
        M: rows of the input (tokens, or pixels of a convolution).
        K: length of the sums.
        N: outputs.
        accelerator: the array.

    Returns:
        Counts in float64, exact to 2^53.

    Raises:
        ValueError: for sizes or an accelerator out of range.

    Example:
        >>> from ssvq_jax.hardware import presets
        >>> cost = gemm_cost(197, 192, 576, presets["scalesim"])  # queries, keys, values of DeiT
        >>> int(cost.cycles), round(float(cost.utilization), 4)
        (104975, 0.8107)
    """
    accelerator.check()
    known = {name: x for name, x in (("M", M), ("K", K), ("N", N)) if is_known(x)}
    for name, size in known.items():
        if not np.all((np.asarray(size) >= 1) & (np.asarray(size) <= LARGEST)):
            raise ValueError(f"{name}={size}: a product needs sizes of at least 1, at most 2^53")
    macs = math.prod(float(np.max(size)) for size in known.values())
    if macs > LARGEST:
        raise ValueError(f"M·N·K={macs:.3g}: counts are exact to 2^53 only; cut the product")
    return _gemm_cost(M, K, N, accelerator)


@in_float64
def _gemm_cost(m: Count, k: Count, n: Count, a: Accelerator) -> GemmCost:
    runs = map_product(m, k, n, jnp.ones_like(m), a)
    inputs, weights, outputs, macs = m * k, k * n, m * n, m * n * k
    operand_bytes = a.operand_bits / 8
    spilled = a.partial_sums == "spilled"
    return GemmCost(
        cycles=runs.cycles,
        macs=macs,
        utilization=macs / (runs.cycles * a.rows * a.columns * a.arrays),
        input_sram_reads=inputs * runs.input_reads,
        weight_sram_reads=weights * runs.weight_reads,
        output_sram_writes=outputs * runs.output_updates + runs.drained,
        input_dram_reads=inputs
        * fetches(inputs * operand_bytes, runs.input_passes, a.input_sram_bytes),
        weight_dram_reads=weights
        * fetches(weights * operand_bytes, runs.weight_passes, a.weight_sram_bytes),
        output_dram_writes=outputs * (runs.output_updates if spilled else 1.0),
        partial_sum_dram_reads=outputs
        * (runs.output_updates - 1.0 if spilled and not a.as_scalesim else 0.0),
    )


def map_product(
    m: Count, k: Count, n: Count, count: Count, a: Accelerator, sharpness: Any = None
) -> Mapping:
    """Maps ``count`` products ``[M, K] x [K, N]``; arguments are float64.

    Args:
        m: M.
        k: K.
        n: N.
        count: how many equal products there are.
        a: the accelerator.
        sharpness: None for exact ceilings; else see `smooth_ceil`.

    Returns:
        Cycles of all products, and what happens to each operand.
    """

    def ceil(size: Count, step: Count) -> Count:
        return jnp.ceil(size / step) if sharpness is None else smooth_ceil(size, step, sharpness)

    several = a.dataflow == "ews"
    pe_rows, pe_columns = (a.pe_rows, a.pe_columns) if several else (1.0, 1.0)
    held = pe_rows * pe_columns
    # Sizes along the array's rows and columns, and over time; cycles to load what stays.
    across, along, stream, load = {
        "ws": (k, n, m, a.rows),
        "ews": (k, n, m * held, a.rows * held),
        "is": (k, m, n, a.rows),
        "os": (m, n, k, jnp.zeros_like(a.rows)),
    }[a.dataflow]
    row_folds = ceil(across, a.rows * pe_rows)
    column_folds = ceil(along, a.columns * pe_columns)
    folds = count * row_folds * column_folds / a.arrays
    # Smooth folds are smooth enough: of their share only what is less than one is rounded.
    folds = jnp.ceil(folds) if sharpness is None else jnp.maximum(folds, 1.0)
    drain = a.rows + a.columns - 2
    one = jnp.ones_like(row_folds * column_folds)
    if a.overlapped_load:
        loads, streams, drains = load, folds * jnp.maximum(stream, load), drain
    else:
        loads, streams, drains = folds * load, folds * stream, folds * drain
    if a.as_scalesim:
        drains = drains - count
    return Mapping(
        load_cycles=loads * one,
        stream_cycles=streams * one,
        drain_cycles=drains * one,
        input_reads=one if a.dataflow == "is" else column_folds * one,
        weight_reads={"is": column_folds, "os": row_folds}.get(a.dataflow, one) * one,
        output_updates=one if a.dataflow == "os" else row_folds * one,
        input_passes=one if a.dataflow == "is" else column_folds * one,
        weight_passes=column_folds * one if a.dataflow == "is" else one,
        drained=folds * (a.rows + a.columns) * float(a.as_scalesim and a.dataflow == "os") * one,
    )


def fetches(size_bytes: Count, passes: Count, sram_bytes: Count) -> Count:
    """How often an operand comes from DRAM: half of its buffer is filled while the other is used.

    One that fits the half comes once.
    """
    return jnp.where(size_bytes <= sram_bytes / 2, jnp.ones_like(passes), passes)


def smooth_ceil(size: Count, step: Count, sharpness: Any) -> Count:
    """A differentiable staircase that rises with size/step, near ceil(size/step).

    Its slope in x = (size - 1/2)/step is the Poisson kernel (1 - r²)/(1 - 2r·cos 2πx + r²), which
    is positive and averages 1: with sharpness r = 0 the stairs are a ramp, towards 1 they become
    those of the ceiling of whole sizes. At least 1, as there is no product without a fold.

    Args:
        size: whole numbers.
        step: what one fold takes.
        sharpness: r, 0 to 1, 1 excluded.
    """
    x = (size - 0.5) / step
    angle = 2 * jnp.pi * x
    wave = jnp.arctan2(sharpness * jnp.sin(angle), 1 - sharpness * jnp.cos(angle)) / jnp.pi
    return jnp.maximum(x + 0.5 + wave, 1.0)
