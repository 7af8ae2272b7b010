import csv
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
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


@settings(deadline=None, max_examples=50)
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
