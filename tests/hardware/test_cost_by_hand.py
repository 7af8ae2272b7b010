"""Costs of small networks on small accelerators, worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from small_networks import INT8, TINY

from ssvq_jax import Rule, SignSplit, Vector, make_plan
from ssvq_jax.hardware import Accelerator, Product, Workload, cost, with_bits, with_plan
from ssvq_jax.hardware.energy import sram_pj_per_bit

# By hand: folds 2·2 and 2·1 of 2 + 3 + 2 cycles; weights 16 and 8 bytes; input 12, output 6.
COMPUTE = (28.0, 14.0)


def test_a_chain_by_hand():
    found = cost(INT8, TINY)
    layers, network = found
    assert layers.compute_cycles.tolist() == list(COMPUTE)
    assert layers.load_cycles.tolist() == [8.0, 4.0]
    assert layers.drain_cycles.tolist() == [8.0, 4.0]
    assert layers.weight_dram_bytes.tolist() == [16.0, 8.0]
    assert layers.activation_dram_bytes.tolist() == [0.0, 0.0]
    assert layers.utilization.tolist() == [48 / (28 * 4), 24 / (14 * 4)]
    # First fill: the input and four weights; then 47 bytes in all, 42 cycles; then the output.
    assert network.first_fill_cycles == 12 + 4
    assert network.last_write_cycles == 6
    assert network.dram_cycles == 12 + 16 + 8 + 5 + 6
    assert network.latency_cycles == 16 + max(42, 47 - 16 - 6) + 6
    assert network.bound == "dram"
    assert network.macs == 72
    assert network.weight_dram_bytes == 16 + 8 + 5
    assert network.activation_dram_bytes == 12 + 6
    assert network.macs_per_dram_byte == 72 / 47
    assert network.ridge_macs_per_dram_byte == 4


def test_overlap_by_hand():
    serial = cost(INT8, dataclasses.replace(TINY, overlap="serial")).network
    assert serial.latency_cycles == 47 + 42
    # The input, all of a and what feeds nothing; a beside the weights of b; b; the output.
    ahead = cost(INT8, dataclasses.replace(TINY, overlap="one_ahead")).network
    assert ahead.latency_cycles == (12 + 16 + 5) + max(28, 8) + 14 + 6
    slow = dataclasses.replace(TINY, overlap="one_ahead", dram_bytes_per_s=0.25)
    assert cost(INT8, slow).network.latency_cycles == 4 * (12 + 16 + 5) + max(28, 32) + 14 + 24


def test_other_operations_take_time_of_their_own_line():
    slow = dataclasses.replace(TINY, vector_ops_per_cycle=0.1)
    assert cost(INT8, slow).network.vector_cycles == 100
    assert cost(INT8, slow).network.latency_cycles == 16 + 100 + 6
    assert cost(INT8, slow).network.bound == "vector"
    assert cost(INT8, dataclasses.replace(slow, overlap="serial")).network.latency_cycles == 189
    assert cost(INT8, TINY).network.vector_cycles == 0  # 0 operations a cycle: not modelled
    assert cost(INT8, TINY).network.vector_j == pytest.approx(10 * 0.4e-12)


def test_where_activations_and_weights_lie():
    spilled = cost(INT8, dataclasses.replace(TINY, activations="spilled"))
    # Inputs of 12 numbers, outputs of 12 and 6: the network's own are not counted twice.
    assert spilled.layers.activation_dram_bytes.tolist() == [24.0, 18.0]
    assert spilled.network.activation_dram_bytes == 42
    # A buffer of 22 bytes holds no two halves of 12: column folds read the input again.
    small = dataclasses.replace(TINY, activations="spilled", input_sram_bytes=22)
    assert cost(INT8, small).layers.activation_dram_bytes.tolist() == [2 * 12 + 12, 12 + 6]
    # By itself it spills what does not fit both of the buffers that it passes: here 12 bytes.
    for name in ("input_sram_bytes", "output_sram_bytes"):
        automatic = cost(INT8, dataclasses.replace(TINY, **{name: 11}))
        again = 12 if name == "input_sram_bytes" else 0  # half of 11 bytes: once a column fold
        assert automatic.layers.activation_dram_bytes.tolist() == [24 + again, 12]
        assert automatic.network.activation_dram_bytes == 24 + again + 12 + 6
    resident = cost(INT8, dataclasses.replace(TINY, weights="resident")).network
    assert resident.weight_dram_bytes == 0
    assert resident.dram_cycles == 12 + 6
    fits = dataclasses.replace(TINY, weights="automatic", weight_sram_bytes=16 + 8 + 5)
    assert cost(INT8, fits).network.weight_dram_bytes == 0
    too_small = dataclasses.replace(fits, weight_sram_bytes=16 + 8 + 4)
    assert cost(INT8, too_small).network.weight_dram_bytes == 29


def test_partial_sums_by_hand():
    # Two row folds: every output is written, read and written again, in 4 bytes at first.
    spilled = cost(INT8, dataclasses.replace(TINY, partial_sums="spilled"))
    assert spilled.layers.activation_dram_bytes.tolist() == [2 * 12 * 4, 2 * 6 * 4]
    assert spilled.network.activation_dram_bytes == 96 + 48 + 12 + 6
    kept = cost(INT8, TINY).layers
    assert spilled.layers.sram_bytes.tolist() == kept.sram_bytes.tolist()
    # Inputs 12 to each of 2 and 1 column folds, weights once, outputs 12 + 2·12·4 and 6 + 2·6·4.
    assert kept.sram_bytes.tolist() == [24 + 16 + 108, 12 + 8 + 54]


def test_input_stationary_fetches_weights_again():
    once = cost(INT8, dataclasses.replace(TINY, dataflow="is")).layers
    assert once.weight_dram_bytes.tolist() == [16.0, 8.0]
    small = dataclasses.replace(TINY, dataflow="is", weight_sram_bytes=20)  # half holds b alone
    assert cost(INT8, small).layers.weight_dram_bytes.tolist() == [32.0, 8.0]


def test_energy_by_hand():
    found = cost(INT8, TINY)
    with jax.enable_x64(True):
        pj_per_byte = 8 * float(sram_pj_per_bit(jnp.asarray(256 * 1024.0)))
    assert found.layers.mac_pj.tolist() == pytest.approx([48 * 0.3, 24 * 0.3])
    assert found.layers.dram_pj.tolist() == [16 * 8 * 8, 8 * 8 * 8]
    expected = [(24 + 16 + 16 + 108) * pj_per_byte, (12 + 8 + 8 + 54) * pj_per_byte]
    assert found.layers.sram_pj.tolist() == pytest.approx(expected)
    assert found.network.dram_j == pytest.approx(47 * 64e-12)
    edges = (12 + 5 + 6) * pj_per_byte  # through the buffers, as all that comes from DRAM
    assert found.network.sram_j == pytest.approx((sum(expected) + edges) * 1e-12)
    parts = ("mac_j", "sram_j", "dram_j", "decode_j", "vector_j")
    assert found.network.energy_j == pytest.approx(sum(getattr(found.network, x) for x in parts))


@pytest.mark.parametrize(
    ("size", "picojoule"), [(8 * 1024, 10 / 64), (32 * 1024, 20 / 64), (2**20, 100 / 64)]
)
def test_sram_energies_are_the_published_ones(size, picojoule):
    with jax.enable_x64(True):
        assert float(sram_pj_per_bit(jnp.asarray(float(size)))) == pytest.approx(picojoule)


def test_decoding_takes_a_look_up_a_sub_vector():
    shapes = {name: jax.ShapeDtypeStruct((16, 16), "float32") for name in ("a", "b")}
    plan = make_plan(shapes, [("a", SignSplit(codewords=4, dim=8)), ("b", Vector(8, 4))])
    both = (Product("a", 8, 16, 16, leaves=("a",)), Product("b", 8, 16, 16, leaves=("b",)))
    layers = with_plan(Workload(both, leaves={"a": 256, "b": 256}), plan)
    found = cost(layers, TINY).layers
    assert found.decode_cycles.tolist() == [32.0, 64.0]
    # Where outputs stay, each of the four row folds decodes everything again.
    again = cost(layers, dataclasses.replace(TINY, dataflow="os")).layers
    assert again.decode_cycles.tolist() == [4 * 32.0, 4 * 64.0]
    assert cost(layers, TINY).network.decode_j > 0
    # Codes of 2 bits and 256 signs; a codebook of 4 x 8 bytes and its scale of 2.
    assert found.weight_dram_bytes[0] == 32 * 2 / 8 + 256 / 8 + 32 + 2


# 3 x 4 PEs, two arrays, 16 bits, buffers of three sizes.
WIDE = Accelerator(
    "wide", 3, 4, "ws", arrays=2, operand_bits=16, clock_hz=1.0, dram_bytes_per_s=1.0,
    lookups_per_cycle=2, weights="streamed", activations="spilled", partial_sums="spilled",
    input_sram_bytes=2**13, weight_sram_bytes=2**15, output_sram_bytes=2**20,
)  # fmt: skip


def pj(bits, sram_bytes):
    with jax.enable_x64(True):
        return bits * float(sram_pj_per_bit(jnp.asarray(float(sram_bytes))))


def test_four_heads_by_hand():
    """Activations on both sides: K = 10 on 3 rows, N = 9 on 4 columns, M = 7."""
    heads = with_bits(Workload((Product("heads", 7, 10, 9, count=4),)), 8)
    layer = cost(heads, WIDE).layers
    # 4 heads of 4 x 3 folds, on two arrays.
    assert layer.compute_cycles == 24 * (3 + 7 + 5)
    assert (layer.load_cycles, layer.drain_cycles) == (24 * 3, 24 * 5)
    assert layer.utilization == 4 * 630 / (360 * 12 * 2)
    inputs, operands, outputs = 4 * 70 * 2, 4 * 90 * 2, 4 * 63 * 2
    sums = 4 * 63 * 4 * 3  # in 4 bytes, for all row folds but the first
    assert layer.activation_dram_bytes == inputs + operands + outputs + 2 * sums
    assert layer.weight_dram_bytes == 0
    assert layer.sram_bytes == 3 * inputs + operands + outputs + 2 * sums
    assert layer.cycles == layer.dram_cycles == layer.activation_dram_bytes
    expected = (
        pj(8 * (3 * inputs + inputs), 2**13)
        + pj(8 * (operands + operands), 2**15)
        + pj(8 * (outputs + 2 * sums + outputs + 2 * sums), 2**20)
    )
    assert layer.sram_pj.item() == pytest.approx(expected)
    # Half of a buffer holds one head's operand, not all four: what is asked of it is one.
    small = dataclasses.replace(WIDE, input_sram_bytes=2 * 140, weight_sram_bytes=2 * 180)
    assert cost(heads, small).layers.activation_dram_bytes == layer.activation_dram_bytes
    smaller = dataclasses.replace(WIDE, input_sram_bytes=2 * 139)
    more = cost(heads, smaller).layers.activation_dram_bytes
    assert more == layer.activation_dram_bytes + 2 * inputs  # three column folds
    still = dataclasses.replace(WIDE, dataflow="is", columns=3, weight_sram_bytes=2 * 179)
    kept = dataclasses.replace(still, weight_sram_bytes=2 * 180)
    less, more = (cost(heads, x).layers.activation_dram_bytes for x in (kept, still))
    assert more == less + 2 * operands
    # All four must fit to stay on chip.
    on_chip = dataclasses.replace(WIDE, activations="automatic", partial_sums="on_chip")
    assert cost(heads, on_chip).layers.activation_dram_bytes == 0
    without = dataclasses.replace(on_chip, weight_sram_bytes=operands - 1)
    assert cost(heads, without).layers.activation_dram_bytes == operands


def test_look_ups_by_hand():
    shapes = {"w": jax.ShapeDtypeStruct((4, 16, 16), "float32")}
    plan = make_plan(shapes, [Rule("w", SignSplit(codewords=4, dim=8), stacked=1)])
    layers = with_plan(Workload((Product("experts", 7, 16, 16, count=4, leaves=("w",)),)), plan)
    found = cost(layers, WIDE)
    stored, tables = 4 * (32 * 2 / 8 + 32), 4 * (32 + 2)
    assert found.layers.weight_dram_bytes == stored + tables
    assert found.layers.decode_cycles == 4 * 32 / 2
    assert found.layers.decode_pj.item() == pytest.approx(pj(4 * 32 * 8 * 16, 32))
    # The first fold is 24 of 1024 weights.
    inputs = 4 * 7 * 16 * 2
    assert found.network.first_fill_cycles == inputs + stored * 24 / 1024 + tables
    # A decoder that is slow is what takes longest.
    slow = dataclasses.replace(WIDE, lookups_per_cycle=0.001)
    assert cost(layers, slow).layers.cycles == 128_000
    # Where inputs stay, and a quarter of the weights does not fit half of the buffer, weights are
    # fetched for each of the four column folds, and the tables once.
    still = dataclasses.replace(WIDE, dataflow="is", columns=2, weight_sram_bytes=79)
    assert cost(layers, still).layers.weight_dram_bytes == 4 * stored + tables
    fits = dataclasses.replace(still, weight_sram_bytes=80)
    assert cost(layers, fits).layers.weight_dram_bytes == stored + tables
    assert cost(layers, fits).layers.decode_cycles == 4 * 4 * 32 / 2  # for every column fold


def test_rounds_follow_each_other():
    """No array takes two rounds at once, and a loop's weight is no larger for its rounds."""
    loop = with_bits(Workload((Product("w", 7, 9, 9, rounds=10, leaves=("w",)),)), 8)
    once = with_bits(Workload((Product("w", 7, 9, 9, leaves=("w",)),)), 8)
    for a in (TINY, WIDE, dataclasses.replace(WIDE, overlapped_load=True)):
        several, single = (cost(x, a).network for x in (loop, once))
        assert several.compute_cycles == 10 * single.compute_cycles
        assert several.first_fill_cycles == single.first_fill_cycles
    fits = dataclasses.replace(TINY, weights="automatic", weight_sram_bytes=81)
    assert cost(loop, fits).network.weight_dram_bytes == 0
    assert cost(loop, TINY).network.weight_dram_bytes == 810
