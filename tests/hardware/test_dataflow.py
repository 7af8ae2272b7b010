import csv
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax.hardware import Accelerator, gemm_cost, presets

GOLDEN = Path(__file__).parents[1] / "golden" / "scalesim_deit_tiny.csv"  # of SCALE-Sim 3.0.0
with GOLDEN.open() as file:
    ROWS = list(csv.DictReader(file))
sizes = st.integers(1, 3000)
arrays = st.builds(
    Accelerator,
    name=st.just("any"),
    rows=st.integers(1, 256),
    columns=st.integers(1, 256),
    dataflow=st.sampled_from(["ws", "is", "os"]),
)


def test_the_golden_file_is_whole():
    assert len(ROWS) == 48


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['rows']}-{row['dataflow']}-{row['layer']}"
)
def test_as_scalesim_counts(row):
    number = {name: int(x) for name, x in row.items() if x.isdigit()}
    accelerator = dataclasses.replace(
        presets["scalesim"],
        rows=number["rows"],
        columns=number["cols"],
        dataflow=row["dataflow"],
        input_sram_bytes=1024 * number["sram_kb_each"],
        weight_sram_bytes=1024 * number["sram_kb_each"],
    )
    cost = gemm_cost(number["M"], number["K"], number["N"], accelerator)
    assert cost.cycles == number["total_cycles"]
    assert 100 * cost.utilization == pytest.approx(float(row["overall_util_pct"]), rel=1e-12)
    assert cost.input_sram_reads == number["sram_ifmap_reads"]
    assert cost.weight_sram_reads == number["sram_filter_reads"]
    assert cost.output_sram_writes == number["sram_ofmap_writes"]
    assert cost.input_dram_reads == number["dram_ifmap_reads"]
    # The simulator writes up to a row of the array too much, and, where outputs stay, fetches up
    # to 31 % too many weights.
    assert 0 <= number["dram_ofmap_writes"] - cost.output_dram_writes < number["cols"]
    fetched = number["dram_filter_reads"] / float(cost.weight_dram_reads)
    assert 1 <= fetched <= (1.31 if row["dataflow"] == "os" else 1)


def test_by_hand():
    # [3, 4] x [4, 5] on 2 x 2 PEs: 2 x 3 folds of 2 cycles to load, 3 rows, and 2 to drain.
    cost = gemm_cost(3, 4, 5, Accelerator("tiny", 2, 2))
    assert cost.cycles == 6 * (2 + 3 + 2)
    assert cost.macs == 60
    assert cost.utilization == 60 / (42 * 4)
    assert (cost.input_sram_reads, cost.weight_sram_reads, cost.output_sram_writes) == (36, 20, 30)
    assert (cost.input_dram_reads, cost.weight_dram_reads, cost.output_dram_writes) == (12, 20, 15)
    # Two by two weights a PE: one fold by two; loading 2·2·2, computing 3·2·2, draining 2.
    wide = Accelerator("tiny", 2, 2, "ews", pe_rows=2, pe_columns=2)
    assert gemm_cost(3, 4, 5, wide).cycles == 2 * (8 + 12 + 2)


@given(m=sizes, k=sizes, n=sizes, accelerator=arrays)
def test_properties(m, k, n, accelerator):
    cost = gemm_cost(m, k, n, accelerator)
    assert cost.macs == m * n * k
    assert 0 < cost.utilization <= 1
    assert gemm_cost(2 * m, k, n, accelerator).cycles >= cost.cycles
    assert cost.input_dram_reads >= m * k
    assert cost.weight_dram_reads >= k * n
    enough = dataclasses.replace(accelerator, input_sram_bytes=2**40, weight_sram_bytes=2**40)
    assert gemm_cost(m, k, n, enough).input_dram_reads == m * k
    assert gemm_cost(m, k, n, enough).weight_dram_reads == k * n
    one_a_pe = dataclasses.replace(accelerator, dataflow="ews")
    stationary = dataclasses.replace(accelerator, dataflow="ws")
    for ews, ws in zip(gemm_cost(m, k, n, one_a_pe), gemm_cost(m, k, n, stationary), strict=True):
        assert ews == ws


def test_exact_beyond_32_bits_within_jit_and_vmap():
    # Were this computed in float32, or in 32-bit integers, the counts would be off.
    assert not jax.config.jax_enable_x64
    m, k, n = 100_003, 4_099, 8_209
    cost = gemm_cost(m, k, n, presets["scalesim"])
    assert int(cost.macs) == m * k * n
    rows = jnp.array([16, 32, 128])

    @jax.jit
    @jax.vmap
    def cycles(rows):
        return gemm_cost(m, k, n, dataclasses.replace(presets["scalesim"], rows=rows)).cycles

    expected = [-(-k // r) * -(-n // 16) * (2 * r + 16 + m - 2) - 1 for r in (16, 32, 128)]
    assert np.array_equal(cycles(rows), expected)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (0, {}, "K=0: a product needs sizes of at least 1"),
        (2**54, {}, "at most 2"),
        (4, {"rows": 0}, "accelerator 'scalesim': rows=0: give at least 1"),
        (4, {"dataflow": "xs"}, "dataflow='xs': choose one of"),
        (4, {"pe_rows": 2}, "pe_rows=2 is for dataflow='ews', this one is 'ws'"),
        (4, {"weight_sram_bytes": -1}, "weight_sram_bytes=-1"),
    ],
)
def test_what_is_refused(size, changes, message):
    with pytest.raises(ValueError, match=message):
        gemm_cost(4, size, 4, dataclasses.replace(presets["scalesim"], **changes))


@pytest.mark.usefixtures("as_installed")
def test_arrays_and_large_products_that_are_refused():
    with pytest.raises(ValueError, match="M=.*a product needs sizes of at least 1"):
        gemm_cost(np.array([4, -3]), 4, 4, presets["scalesim"])
    with pytest.raises(ValueError, match=r"M·N·K=9.01e\+15: counts are exact to 2\^53 only"):
        gemm_cost(2**53, 1, 1.000001, presets["scalesim"])
    assert gemm_cost(2**53, 1, 1, presets["scalesim"]).macs == 2**53


def test_overlapped_loads_and_several_arrays_by_hand():
    # K = 10 on 3 rows, N = 9 on 4 columns: 4 x 3 folds; three arrays do four each, one after the
    # other. Loading takes 3 cycles, streaming 7, draining 5.
    several = Accelerator("t", 3, 4, "ws", arrays=3)
    assert gemm_cost(7, 10, 9, several).cycles == 4 * (3 + 7 + 5)
    assert gemm_cost(7, 10, 9, several).utilization == 7 * 10 * 9 / (60 * 12 * 3)
    hidden = dataclasses.replace(several, overlapped_load=True)
    assert gemm_cost(7, 10, 9, hidden).cycles == 3 + 4 * 7 + 5
    assert gemm_cost(2, 10, 9, hidden).cycles == 3 + 4 * 3 + 5  # loading takes longer
    five = dataclasses.replace(several, arrays=5)  # 12 folds: 3 rounds
    assert gemm_cost(7, 10, 9, five).cycles == 3 * (3 + 7 + 5)
    wide = Accelerator("t", 3, 4, "ews", pe_rows=2, pe_columns=3, overlapped_load=True)
    # 2 x 1 folds of 18 cycles to load and 42 to stream.
    assert gemm_cost(7, 10, 9, wide).cycles == 18 + 2 * 42 + 5


def test_partial_sums_and_precision_by_hand():
    spilled = Accelerator("t", 3, 4, "ws", partial_sums="spilled")
    cost = gemm_cost(7, 10, 9, spilled)  # four row folds
    assert cost.output_dram_writes == 4 * 63
    assert cost.partial_sum_dram_reads == 3 * 63
    kept = gemm_cost(7, 10, 9, dataclasses.replace(spilled, partial_sums="on_chip"))
    assert (kept.output_dram_writes, kept.partial_sum_dram_reads) == (63, 0)
    # Half of 280 bytes hold 70 inputs of 16 bits, half of 276 do not: three column folds.
    wide = dataclasses.replace(spilled, operand_bits=16, input_sram_bytes=280)
    assert gemm_cost(7, 10, 9, wide).input_dram_reads == 70
    assert (
        gemm_cost(7, 10, 9, dataclasses.replace(wide, input_sram_bytes=276)).input_dram_reads == 210
    )
    # The same of the 90 weights, for the three column folds of a stationary input.
    still = dataclasses.replace(wide, dataflow="is", columns=3, weight_sram_bytes=360)
    assert gemm_cost(7, 10, 9, still).weight_dram_reads == 90
    assert (
        gemm_cost(7, 10, 9, dataclasses.replace(still, weight_sram_bytes=356)).weight_dram_reads
        == 270
    )


def test_weights_a_pe_matter_to_ews_alone():
    """Also where they are traced, and so cannot be refused."""
    several = jax.vmap(
        lambda c: gemm_cost(7, 10, 9, Accelerator("t", 3, 4, "ws", pe_rows=c)).cycles
    )(jnp.array([1, 2]))
    assert np.array_equal(several, [several[0]] * 2)
