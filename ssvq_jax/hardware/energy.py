"""Energies of a 45 nm process, by what is done.

Sources: Horowitz, "Computing's energy problem", ISSCC 2014 (arithmetic; 10, 20 and 100 pJ for 64
bits of an SRAM of 8 KB, 32 KB and 1 MB); DRAM is the accelerator's own figure. Leakage, clocks and
the registers of the array are not modelled: compare energies, do not budget with them.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ssvq_jax.hardware.accelerator import Accelerator
from ssvq_jax.hardware.exact import Count
from ssvq_jax.hardware.layers import Layers
from ssvq_jax.hardware.memory import Edges, Traffic

# Of an entropy decoder, which looks up a row of a table for each number; ours, not published.
_CODER_TABLE_BYTES, _CODER_ROW_BITS = 4096.0, 32

_SRAM_BYTES = (8 * 1024, 32 * 1024, 1024 * 1024)
_SRAM_PJ_PER_BIT = (10 / 64, 20 / 64, 100 / 64)


class Energy(NamedTuple):
    """Energy in picojoule ``[layers]``.

    Attributes:
        mac_pj: multiplications and their additions.
        sram_pj: buffers: what the array reads and writes, and what DRAM fills and empties.
        dram_pj: transfers from and to DRAM.
        decode_pj: rows of codebooks that are looked up, and entropy decoding.
    """

    mac_pj: Count
    sram_pj: Count
    dram_pj: Count
    decode_pj: Count

    @property
    def total_pj(self) -> Count:
        """All parts."""
        return self.mac_pj + self.sram_pj + self.dram_pj + self.decode_pj


def energy(layers: Layers, moved: Traffic, a: Accelerator) -> Energy:
    """Counts the energy of every layer; arguments are float64.

    Args:
        layers: what is computed.
        moved: its traffic.
        a: the accelerator.

    Returns:
        Picojoules a layer.
    """
    columns = layers.columns
    count = columns["count"]
    macs = columns["m"] * columns["k"] * columns["n"] * count
    sram = _buffers_pj(
        moved.input_sram_bytes + moved.input_dram_bytes,
        moved.weight_sram_bytes + moved.weight_fill_bytes + moved.operand_dram_bytes,
        moved.output_sram_bytes + moved.output_dram_bytes,
        a,
    )
    # One look-up gives as many operands as a sub-vector has.
    lookups = jnp.maximum(columns["lookups"], 1.0)
    operand_bits = columns["k"] * columns["n"] * count / lookups * a.operand_bits
    decode = moved.lookups * operand_bits * sram_pj_per_bit(columns["largest_table_bytes"])
    coder = _CODER_ROW_BITS * sram_pj_per_bit(jnp.asarray(_CODER_TABLE_BYTES))
    return Energy(
        mac_pj=macs * a.mac_pj,
        sram_pj=sram,
        dram_pj=8 * moved.dram_bytes * a.dram_pj_per_bit,
        decode_pj=decode + moved.coded_numbers * coder,
    )


def edges_sram_pj(outside: Edges, a: Accelerator) -> Count:
    """Energy of the buffers for what a call moves besides its layers, in picojoule.

    Args:
        outside: the bytes.
        a: the accelerator.

    Returns:
        Picojoules of a call.
    """
    return _buffers_pj(outside.input_bytes, outside.other_weight_bytes, outside.output_bytes, a)


def _buffers_pj(
    input_bytes: Count, weight_bytes: Count, output_bytes: Count, a: Accelerator
) -> Count:
    return 8 * (
        input_bytes * sram_pj_per_bit(a.input_sram_bytes)
        + weight_bytes * sram_pj_per_bit(a.weight_sram_bytes)
        + output_bytes * sram_pj_per_bit(a.output_sram_bytes)
    )


def sram_pj_per_bit(size_bytes: Count) -> Count:
    """Energy of a bit of an SRAM: a power law between the published sizes, and beyond them.

    Args:
        size_bytes: of the SRAM, float64.

    Returns:
        Picojoules.
    """
    sizes, energies = jnp.log(jnp.array(_SRAM_BYTES)), jnp.log(jnp.array(_SRAM_PJ_PER_BIT))
    slopes = jnp.diff(energies) / jnp.diff(sizes)
    x = jnp.log(jnp.maximum(size_bytes, 1.0)) - sizes[1]
    return jnp.exp(energies[1] + x * jnp.where(x < 0, slopes[0], slopes[1]))
