"""What holds of any accelerator: bounds, what is monotone, what is equal."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import deit_tiny, deit_tiny_shapes
from small_networks import FORMATS, SHAPES, chain

from ssvq_jax import SignSplit, Uniform, hardware, load_recipe, make_plan
from ssvq_jax.hardware import (
    Accelerator,
    cost,
    merge_equal,
    presets,
    with_bits,
    with_plan,
)


@pytest.mark.parametrize("overlap", ["ideal", "one_ahead", "serial"])
@pytest.mark.parametrize("name", sorted(presets))
def test_a_scanned_network_costs_what_its_layers_do(name, overlap):
    a = dataclasses.replace(presets[name], overlap=overlap)

    def network(scan):
        recipe = load_recipe("ssvq-21x-scanned" if scan else "ssvq-21x")
        plan = make_plan(deit_tiny_shapes(scan), recipe)
        return cost(with_plan(deit_tiny(scan), plan), a).network

    for name, x, y in zip(hardware.NetworkCost._fields, network(True), network(False), strict=True):
        assert float(x) == pytest.approx(float(y), rel=1e-9), name


# Checked annotations would take half of the time of so many costs.
pytestmark = pytest.mark.usefixtures("as_installed")

PLAIN = st.sampled_from(["ws", "is", "os", "ews"])
CHOICES = st.fixed_dictionaries(
    {
        "dataflow": PLAIN,
        "rows": st.integers(1, 200),
        "columns": st.integers(1, 200),
        "dram_bytes_per_s": st.floats(1e7, 1e12),
        "lookups_per_cycle": st.integers(1, 64),
        "overlap": st.sampled_from(["ideal", "one_ahead", "serial"]),
        "activations": st.sampled_from(["automatic", "on_chip", "spilled"]),
        "weights": st.sampled_from(["automatic", "streamed"]),
        "partial_sums": st.sampled_from(["on_chip", "spilled"]),
        "vector_ops_per_cycle": st.sampled_from([0, 4, 64]),
        "arrays": st.integers(1, 5),
        **{
            f"{name}_sram_bytes": st.sampled_from([4, 500, 2000, 10_000, 2**18])
            for name in ("input", "weight", "output")
        },
    }
)


def any_array(choices):
    """With weights a PE and overlapped loads where the dataflow has them."""
    a = Accelerator("any", **choices)
    if a.dataflow == "ews":
        a = dataclasses.replace(a, pe_rows=2, pe_columns=3)
    return dataclasses.replace(a, overlapped_load=a.dataflow != "os" and a.rows % 2 == 0)


@given(choices=CHOICES, faster=st.floats(1.01, 100))
def test_monotone_and_additive(choices, faster):
    a = any_array(choices)
    doubled = with_plan(chain(16), make_plan(SHAPES, [(".*", SignSplit(codewords=16, dim=8))]))
    found = cost(FORMATS["ssvq"], a)
    latency = found.network.latency_s * (1 + 1e-12)
    for name in ("dram_bytes_per_s", "lookups_per_cycle", "clock_hz"):
        better = dataclasses.replace(a, **{name: getattr(a, name) * faster})
        assert cost(FORMATS["ssvq"], better).network.latency_s <= latency, name
    assert cost(doubled, a).network.latency_cycles >= found.network.latency_cycles
    for name in ("macs", "compute_cycles", "decode_cycles", "sram_bytes"):
        assert getattr(found.network, name) == pytest.approx(getattr(found.layers, name).sum())
    # What nobody hides is no less than the longest of the parts, nor more than their sum.
    parts = [getattr(found.network, f"{x}_cycles") for x in ("compute", "dram", "decode", "vector")]
    assert max(parts) <= found.network.latency_cycles * (1 + 1e-12)
    assert found.network.latency_cycles <= sum(parts) * (1 + 1e-12)


@given(choices=CHOICES, m=st.integers(1, 40))
def test_what_waits_more_takes_longer(choices, m):
    a = any_array(choices)
    layers = with_bits(chain(m), 8)

    def cycles(**changes):
        return cost(layers, dataclasses.replace(a, **changes)).network.latency_cycles

    slack = 1 + 1e-12
    assert cycles(overlap="ideal") <= slack * cycles(overlap="one_ahead")
    assert cycles(overlap="one_ahead") <= slack * cycles(overlap="serial")
    assert cycles(activations="on_chip") <= slack * cycles(activations="automatic")
    assert cycles(activations="automatic") <= slack * cycles(activations="spilled")
    assert cycles(partial_sums="on_chip") <= slack * cycles(partial_sums="spilled")
    assert cycles(weights="resident") <= slack * cycles(weights="streamed")
    twice = cost(with_bits(chain(2 * m), 8), a).network.latency_cycles
    assert cycles() <= slack * twice


@given(choices=CHOICES)
def test_speed_up_is_bound_by_the_bits(choices):
    a = any_array(choices | {"weights": "streamed"})
    base = cost(FORMATS["int8"], a).network
    for name in ("ssvq", "vq", "uniform"):
        found = cost(FORMATS[name], a).network
        bits = base.weight_dram_bytes / found.weight_dram_bytes
        assert base.latency_s / found.latency_s <= bits * (1 + 1e-9)


@given(choices=CHOICES)
def test_nine_bits_cost_at_least_eight(choices):
    plan = make_plan(SHAPES, [(".*", SignSplit(codewords=256, dim=1))])
    a = any_array(choices)
    found, base = cost(with_plan(chain(8), plan), a), cost(FORMATS["int8"], a)
    assert found.network.latency_s >= base.network.latency_s * (1 - 1e-12)
    assert found.network.energy_j >= base.network.energy_j * (1 - 1e-12)


@given(choices=CHOICES)
def test_equal_layers_are_merged_at_no_cost(choices):
    a = any_array(choices)
    merged = merge_equal(FORMATS["ssvq"])
    assert merged.names == ("0", "attention")
    assert merged.repeats.tolist() == [3.0, 1.0]
    whole, once = cost(FORMATS["ssvq"], a).network, cost(merged, a).network
    for name, x, y in zip(whole._fields, whole, once, strict=True):
        assert y == pytest.approx(float(x), rel=1e-12), name


def test_eight_bits_without_a_codebook_are_int8():
    plan = make_plan(SHAPES, [(".*", Uniform(bits=8, per_channel=False))])
    found, base = (
        cost(x, presets["edge-ews-64"]) for x in (with_plan(chain(8), plan), FORMATS["int8"])
    )
    # But for a scale of 16 bits a leaf.
    assert found.network.weight_dram_bytes == base.network.weight_dram_bytes + 3 * 2
    assert found.network.compute_cycles == base.network.compute_cycles
    assert found.network.decode_cycles == 0
