"""What moves between DRAM, buffers and array, and what of it computing hides."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ssvq_jax.hardware.accelerator import Accelerator
from ssvq_jax.hardware.dataflow import Mapping, fetches
from ssvq_jax.hardware.exact import Count
from ssvq_jax.hardware.layers import Layers


class Traffic(NamedTuple):
    """Bytes of every layer ``[layers]``, of all its ``count`` products.

    Attributes:
        weight_dram_bytes: weights as they are stored (entropy-coded, if they are), with tables.
        input_dram_bytes: inputs, and operands ``[K, N]`` that are activations.
        output_dram_bytes: outputs and partial sums, written and read.
        input_sram_bytes: inputs from their buffer into the array.
        weight_sram_bytes: weights (or activations ``[K, N]``) from theirs, as they are stored.
        output_sram_bytes: outputs into theirs, partial sums written and read.
        lookups: what the decoder looks up or works off.
        first_weight_bytes: what must be there before the first fold can begin.
    """

    weight_dram_bytes: Count
    input_dram_bytes: Count
    output_dram_bytes: Count
    input_sram_bytes: Count
    weight_sram_bytes: Count
    output_sram_bytes: Count
    lookups: Count
    first_weight_bytes: Count

    @property
    def dram_bytes(self) -> Count:
        """All bytes from and to DRAM."""
        return self.weight_dram_bytes + self.input_dram_bytes + self.output_dram_bytes


def resident(layers: Layers, a: Accelerator) -> Bool[Array | np.ndarray, ""]:
    """Whether all weights of the network stay in the weight buffer between calls."""
    if a.weights != "automatic":
        return jnp.asarray(a.weights == "resident")
    held = layers.columns["weight_bytes"] + layers.columns["table_bytes"]
    total = jnp.sum(layers.repeats * held) + layers.other_weight_bytes
    return total <= a.weight_sram_bytes


def traffic(layers: Layers, runs: Mapping, a: Accelerator) -> Traffic:
    """Counts bytes; arguments are float64.

    Args:
        layers: what is computed.
        runs: how it runs on the array.
        a: the accelerator.

    Returns:
        Bytes a layer.
    """
    columns = layers.columns
    m, k, n, count = (columns[name] for name in ("m", "k", "n", "count"))
    operand, accumulator = a.operand_bits / 8, a.accumulator_bits / 8
    is_weight = columns["is_weight"] > 0
    streamed = is_weight & ~resident(layers, a)

    # A single product's operands decide what fits.
    stored = columns["weight_bytes"] / count
    weight_fetches = fetches(stored, runs.weight_passes, a.weight_sram_bytes)
    moving = k * n * operand  # [K, N] where it is an activation
    moving_fetches = fetches(moving, runs.weight_passes, a.weight_sram_bytes)
    input_fetches = fetches(columns["inputs"] * operand, runs.input_passes, a.input_sram_bytes)

    input_bytes, output_bytes = _input_bytes(layers, a), _output_bytes(layers, a)
    input_spilled = _spilled(input_bytes, a.input_sram_bytes, a)
    output_spilled = _spilled(output_bytes, a.output_sram_bytes, a)
    moving_spilled = _spilled(moving * count, a.weight_sram_bytes, a) & ~is_weight

    updates = m * n * count * accumulator * (runs.output_updates - 1)  # of partial sums
    spilled_sums = jnp.zeros_like(updates)
    if a.partial_sums == "spilled":
        spilled_sums = updates if a.as_scalesim else 2 * updates
    kept_sums = 2 * updates if a.partial_sums == "on_chip" else 2 * spilled_sums
    weight_dram = weight_fetches * columns["coded_bytes"] + columns["table_bytes"]
    return Traffic(
        weight_dram_bytes=jnp.where(streamed, weight_dram, 0.0),
        input_dram_bytes=jnp.where(input_spilled, input_fetches * input_bytes, 0.0)
        + jnp.where(moving_spilled, moving_fetches * moving * count, 0.0),
        output_dram_bytes=jnp.where(output_spilled, output_bytes, 0.0) + spilled_sums,
        input_sram_bytes=m * k * count * operand * runs.input_reads,
        weight_sram_bytes=jnp.where(is_weight, columns["weight_bytes"], moving * count)
        * runs.weight_reads,
        output_sram_bytes=output_bytes + kept_sums,
        lookups=columns["lookups"] * runs.weight_reads
        + jnp.where(streamed, columns["coded_numbers"] * weight_fetches, 0.0),
        first_weight_bytes=jnp.where(
            streamed, jnp.minimum(weight_dram, _first_fold(layers, a) + columns["table_bytes"]), 0.0
        ),
    )


def _spilled(
    size_bytes: Count, sram_bytes: Count, a: Accelerator
) -> Bool[Array | np.ndarray, "..."]:
    if a.activations == "automatic":
        return size_bytes > sram_bytes
    return jnp.broadcast_to(a.activations == "spilled", jnp.shape(size_bytes))


def _first_fold(layers: Layers, a: Accelerator) -> Count:
    """Stored bytes of the weights that fill the array once."""
    columns = layers.columns
    held = a.rows * a.columns * a.pe_rows * a.pe_columns * a.arrays
    return columns["coded_bytes"] * jnp.minimum(held / (columns["k"] * columns["n"]), 1.0)


class Edges(NamedTuple):
    """Bytes that a call moves besides those of its layers.

    Attributes:
        input_bytes: the network's input, if it is not counted as spilled.
        output_bytes: its output, likewise: both come from outside, wherever activations lie.
        other_weight_bytes: parameters that feed no product.
    """

    input_bytes: Count
    output_bytes: Count
    other_weight_bytes: Count

    @property
    def dram_bytes(self) -> Count:
        """All of them."""
        return self.input_bytes + self.output_bytes + self.other_weight_bytes


def edges(layers: Layers, moved: Traffic, a: Accelerator) -> Edges:
    """Counts what the layers' own traffic leaves out."""
    first, last = _input_bytes(layers, a)[0], _output_bytes(layers, a)[layers.last]
    return Edges(
        jnp.where(moved.input_dram_bytes[0] > 0, 0.0, first),
        jnp.where(moved.output_dram_bytes[layers.last] > 0, 0.0, last),
        jnp.where(resident(layers, a), 0.0, layers.other_weight_bytes),
    )


class Latency(NamedTuple):
    """Cycles of one call of the network; see `Accelerator.overlap`.

    Attributes:
        cycles: of the whole.
        first_fill_cycles: before the first product can begin.
        last_write_cycles: for the network's output.
    """

    cycles: Count
    first_fill_cycles: Count
    last_write_cycles: Count


def latency(
    layers: Layers,
    moved: Traffic,
    outside: Edges,
    compute_cycles: Count,
    decode_cycles: Count,
    vector_cycles: Count,
    a: Accelerator,
) -> Latency:
    """Adds up what cannot be hidden.

    With C, D and L cycles of computing, transfers and look-ups of a layer, V those of other
    operations, the first fill F and the last write E:

    - ``ideal``: F + max(sum C, sum D - F - E, sum L, V) + E; F is the network's input and the
      weights of the first fold;
    - ``one_ahead``: F, then of every layer max(C, L, transfer of its activations and of the next
      layer's weights), then V and E; F has all weights of the first layer and of no layer;
    - ``serial``: of every layer D + max(C, L), and V.

    Args:
        layers: what is computed.
        moved: bytes of the layers.
        outside: bytes besides.
        compute_cycles: C ``[layers]``.
        decode_cycles: L ``[layers]``.
        vector_cycles: V.
        a: the accelerator.

    Returns:
        Cycles.
    """
    per_byte = a.clock_hz / a.dram_bytes_per_s
    repeats, last = layers.repeats, layers.last
    total = (jnp.sum(repeats * moved.dram_bytes) + outside.dram_bytes) * per_byte
    write = _output_bytes(layers, a)[last] * per_byte
    given = _input_bytes(layers, a)[0] * per_byte
    busy = jnp.maximum(compute_cycles, decode_cycles)
    if a.overlap == "ideal":
        fill = given + moved.first_weight_bytes[0] * per_byte
        hidden = jnp.maximum(total - fill - write, vector_cycles)
        for cycles in (compute_cycles, decode_cycles):
            hidden = jnp.maximum(hidden, jnp.sum(repeats * cycles))
        return Latency(fill + hidden + write, fill, write)
    if a.overlap == "serial":
        fill = given + moved.weight_dram_bytes[0] * per_byte
        return Latency(total + jnp.sum(repeats * busy) + vector_cycles, fill, write)
    before = outside.input_bytes + moved.weight_dram_bytes[0] + outside.other_weight_bytes
    own = (moved.dram_bytes - moved.weight_dram_bytes) * per_byte
    now, after = (layers.pairs[:, i].astype(int) for i in (0, 1))
    ahead = own[now] + moved.weight_dram_bytes[after] * per_byte
    cycles = (
        (before + outside.output_bytes) * per_byte
        + jnp.sum(layers.pairs[:, 2] * jnp.maximum(busy[now], ahead))
        + jnp.maximum(busy[last], own[last])
        + vector_cycles
    )
    return Latency(cycles, before * per_byte, write)


def _input_bytes(layers: Layers, a: Accelerator) -> Count:
    return layers.columns["inputs"] * layers.columns["count"] * a.operand_bits / 8


def _output_bytes(layers: Layers, a: Accelerator) -> Count:
    columns = layers.columns
    return columns["m"] * columns["n"] * columns["count"] * a.operand_bits / 8
