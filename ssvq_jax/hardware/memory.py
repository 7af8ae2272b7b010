"""What moves between DRAM, buffers and array, and what of it computing hides."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ssvq_jax.hardware.accelerator import Accelerator
from ssvq_jax.hardware.dataflow import Mapping, fetches
from ssvq_jax.hardware.exact import Count
from ssvq_jax.hardware.layers import Layers

Flag = Bool[Array | np.ndarray, "..."]


class Traffic(NamedTuple):
    """Bytes of every layer ``[layers]``, of all its ``count`` products in one round.

    Attributes:
        weight_dram_bytes: weights as they are stored (entropy-coded, if they are), with tables.
        operand_dram_bytes: operands ``[K, N]`` that are activations.
        input_dram_bytes: inputs.
        output_dram_bytes: outputs and partial sums, written and read.
        weight_fill_bytes: weights as they arrive in their buffer.
        input_sram_bytes: inputs from their buffer into the array.
        weight_sram_bytes: weights (or activations ``[K, N]``) from theirs, as they are stored.
        output_sram_bytes: outputs into theirs, partial sums written and read.
        lookups: what the decoder looks up or works off for the array.
        coded_numbers: what is entropy-decoded on the way from DRAM.
        first_weight_bytes: what must be there before the first fold can begin.
        input_spilled: whether the inputs come from DRAM.
        output_spilled: whether the outputs go there.
    """

    weight_dram_bytes: Count
    operand_dram_bytes: Count
    input_dram_bytes: Count
    output_dram_bytes: Count
    weight_fill_bytes: Count
    input_sram_bytes: Count
    weight_sram_bytes: Count
    output_sram_bytes: Count
    lookups: Count
    coded_numbers: Count
    first_weight_bytes: Count
    input_spilled: Flag
    output_spilled: Flag

    @property
    def activation_dram_bytes(self) -> Count:
        """All bytes from and to DRAM that are not weights."""
        return self.operand_dram_bytes + self.input_dram_bytes + self.output_dram_bytes

    @property
    def dram_bytes(self) -> Count:
        """All bytes from and to DRAM."""
        return self.weight_dram_bytes + self.activation_dram_bytes


def resident(layers: Layers, a: Accelerator) -> Flag:
    """Whether all weights of the network stay in the weight buffer between calls."""
    if a.weights != "automatic":
        return jnp.asarray(a.weights == "resident")
    return layers.all_weight_bytes <= a.weight_sram_bytes


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

    # A single product's operands decide what fits half of a buffer and comes once.
    weight_fetches = fetches(
        columns["weight_bytes"] / count, runs.weight_passes, a.weight_sram_bytes
    )
    moving = k * n * operand  # [K, N] where it is an activation
    moving_fetches = fetches(moving, runs.weight_passes, a.weight_sram_bytes)
    input_fetches = fetches(columns["inputs"] * operand, runs.input_passes, a.input_sram_bytes)

    # What passes two buffers stays on chip if both hold it.
    between = jnp.minimum(a.input_sram_bytes, a.output_sram_bytes)
    input_bytes, output_bytes = _input_bytes(layers, a), _output_bytes(layers, a)
    input_spilled = _spilled(input_bytes, between, a)
    output_spilled = _spilled(output_bytes, between, a)
    beside = jnp.minimum(a.weight_sram_bytes, a.output_sram_bytes)
    moving_spilled = _spilled(moving * count, beside, a) & ~is_weight

    updates = m * n * count * accumulator * (runs.output_updates - 1)  # of partial sums
    spilled_sums = jnp.zeros_like(updates)
    if a.partial_sums == "spilled":
        spilled_sums = updates if a.as_scalesim else 2 * updates
    weight_dram = weight_fetches * columns["coded_bytes"] + columns["table_bytes"]
    weight_fill = weight_fetches * columns["weight_bytes"] + columns["table_bytes"]
    held = a.rows * a.columns * a.pe_rows * a.pe_columns * a.arrays
    first_fold = columns["coded_bytes"] * jnp.minimum(held / (k * n * count), 1.0)
    return Traffic(
        weight_dram_bytes=jnp.where(streamed, weight_dram, 0.0),
        operand_dram_bytes=jnp.where(moving_spilled, moving_fetches * moving * count, 0.0),
        input_dram_bytes=jnp.where(input_spilled, input_fetches * input_bytes, 0.0),
        output_dram_bytes=jnp.where(output_spilled, output_bytes, 0.0) + spilled_sums,
        weight_fill_bytes=jnp.where(streamed, weight_fill, 0.0),
        input_sram_bytes=m * k * count * operand * runs.input_reads,
        weight_sram_bytes=jnp.where(is_weight, columns["weight_bytes"], moving * count)
        * runs.weight_reads,
        output_sram_bytes=output_bytes + 2 * updates + runs.drained * operand,
        lookups=columns["lookups"] * runs.weight_reads,
        coded_numbers=jnp.where(streamed, columns["coded_numbers"] * weight_fetches, 0.0),
        first_weight_bytes=jnp.where(streamed, first_fold + columns["table_bytes"], 0.0),
        input_spilled=input_spilled,
        output_spilled=output_spilled,
    )


def _spilled(size_bytes: Count, sram_bytes: Count, a: Accelerator) -> Flag:
    if a.activations == "automatic":
        return size_bytes > sram_bytes
    return jnp.broadcast_to(a.activations == "spilled", jnp.shape(size_bytes))


class Edges(NamedTuple):
    """Bytes that a call moves besides those of its layers.

    Attributes:
        input_bytes: the network's input, which comes from outside wherever activations lie; 0 if
            the first layer's traffic has it.
        output_bytes: its output, likewise.
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
    """Counts what the layers' own traffic leaves out.

    Args:
        layers: what is computed.
        moved: its traffic.
        a: the accelerator.

    Returns:
        Bytes of a call.
    """
    first, last = _input_bytes(layers, a)[0], _output_bytes(layers, a)[layers.last]
    return Edges(
        jnp.where(moved.input_spilled[0], 0.0, first),
        jnp.where(moved.output_spilled[layers.last], 0.0, last),
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
    operations, the network's input I and output O, and W those of the first layer's weights and of
    the parameters that feed no product:

    - ``ideal``: F + max(sum C, sum D - F - O, sum L, V) + O, where the first fill F is I and the
      weights of the first fold;
    - ``one_ahead``: I + W, then of every layer max(C, L, transfer of its activations and of the
      next layer's weights), then O and V;
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
    read = _input_bytes(layers, a)[0] * per_byte
    write = _output_bytes(layers, a)[last] * per_byte
    busy = jnp.maximum(compute_cycles, decode_cycles)
    if a.overlap == "ideal":
        fill = read + moved.first_weight_bytes[0] * per_byte
        hidden = jnp.maximum(total - fill - write, vector_cycles)
        for cycles in (compute_cycles, decode_cycles):
            hidden = jnp.maximum(hidden, jnp.sum(repeats * cycles))
        return Latency(fill + hidden + write, fill, write)
    weights = moved.weight_dram_bytes * per_byte
    fill = read + weights[0] + outside.other_weight_bytes * per_byte
    if a.overlap == "serial":
        return Latency(total + jnp.sum(repeats * busy) + vector_cycles, fill, write)

    own = moved.activation_dram_bytes * per_byte
    now, after = (layers.pairs[:, i].astype(int) for i in (0, 1))
    steps = jnp.maximum(busy[now], own[now] + weights[after])
    # What the first layer reads and the last one writes goes by itself, not beside their work.
    given = jnp.where(moved.input_spilled[0], read, 0.0)
    taken = jnp.where(moved.output_spilled[last], write, 0.0)
    if len(layers.pairs):
        first = jnp.maximum(busy[0], own[0] - given + weights[after[0]]) - steps[0]
        final = jnp.maximum(busy[last], own[last] - taken)
    else:
        first = 0.0
        final = jnp.maximum(busy[last], own[last] - given - taken)
    cycles = jnp.sum(layers.pairs[:, 2] * steps) + first + final
    return Latency(fill + cycles + write + vector_cycles, fill, write)


def _input_bytes(layers: Layers, a: Accelerator) -> Count:
    return layers.columns["inputs"] * layers.columns["count"] * a.operand_bits / 8


def _output_bytes(layers: Layers, a: Accelerator) -> Count:
    columns = layers.columns
    return columns["m"] * columns["n"] * columns["count"] * a.operand_bits / 8
