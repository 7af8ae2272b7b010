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
from ssvq_jax.hardware.memory import Traffic

_SRAM_BYTES = (8 * 1024, 32 * 1024, 1024 * 1024)
_SRAM_PJ_PER_BIT = (10 / 64, 20 / 64, 100 / 64)


class Energy(NamedTuple):
    """Energy in picojoule ``[layers]``.

    Attributes:
        mac_pj: multiplications and their additions.
        sram_pj: buffers: what the array reads and writes, and what DRAM fills and empties.
        dram_pj: transfers from and to DRAM.
        decode_pj: rows of codebooks that are looked up.
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
    """Counts the energy of every layer; arguments are float64."""
    columns = layers.columns
    count = columns["count"]
    macs = columns["m"] * columns["k"] * columns["n"] * count
    read_input, read_weight, used_output = (
        8 * sram_pj_per_bit(size)
        for size in (a.input_sram_bytes, a.weight_sram_bytes, a.output_sram_bytes)
    )
    sram = (
        (moved.input_sram_bytes + moved.input_dram_bytes) * read_input
        + (moved.weight_sram_bytes + moved.weight_dram_bytes) * read_weight
        + (moved.output_sram_bytes + moved.output_dram_bytes) * used_output
    )
    # One look-up gives as many operands as a sub-vector has.
    lookups = jnp.maximum(columns["lookups"], 1.0)
    operand_bits = columns["k"] * columns["n"] * count / lookups * a.operand_bits
    decode = moved.lookups * operand_bits * sram_pj_per_bit(columns["largest_table_bytes"])
    return Energy(
        mac_pj=macs * a.mac_pj,
        sram_pj=sram,
        dram_pj=8 * moved.dram_bytes * a.dram_pj_per_bit,
        decode_pj=jnp.where(columns["lookups"] > 0, decode, 0.0),
    )


def sram_pj_per_bit(size_bytes: Count) -> Count:
    """Energy of a bit of an SRAM: a power law between the published sizes, and beyond them."""
    sizes, energies = jnp.log(jnp.array(_SRAM_BYTES)), jnp.log(jnp.array(_SRAM_PJ_PER_BIT))
    slopes = jnp.diff(energies) / jnp.diff(sizes)
    x = jnp.log(jnp.maximum(size_bytes, 1.0)) - sizes[1]
    return jnp.exp(energies[1] + x * jnp.where(x < 0, slopes[0], slopes[1]))
