"""The cost model: exact against a simulator's outputs, and how fast it is.

    python benchmarks/cost_model.py [--configurations 1000000 --rounds 5]
    python benchmarks/cost_model.py --scalesim-python OTHER/bin/python   # also times the simulator

An evaluation is the latency and energy of the whole of DeiT-tiny (74 products, 144 counting heads)
as a recipe stores it, on one accelerator of its own: rows, columns, bandwidth and look-ups drawn at
random, under `jax.vmap`. Compilation is that of this sweep, from a cold start. The plain loop is
`cost` called from Python for one accelerator after the other.

The simulator SCALE-Sim (PyPI: scalesim, in an environment of its own, as it needs numpy < 2.4) runs
one layer, started by this process and timed within its own, imports aside; the ratios are to the
cost of that layer here, in a sweep and alone. The last line is one JSON object.
"""

import csv
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ssvq_jax as ssvq
from ssvq_jax.hardware import (
    Accelerator,
    Layers,
    Product,
    Workload,
    cost,
    gemm_cost,
    merge_equal,
    presets,
    read_workload,
    with_bits,
    with_plan,
)
from ssvq_jax.models import create, param_shapes

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "scalesim_deit_tiny.csv"
LAYER = (197, 192, 576)  # M, K, N: queries, keys and values of a block

_SIMULATE = """
import json, sys, time
from scalesim.scale_sim import scalesim
config, layout, topology, out = sys.argv[1:]
start = time.perf_counter()
runner = scalesim(
    save_disk_space=True, verbose=False, config=config, topology=topology, layout=layout,
    input_type_gemm=True,
)
runner.run_scale(top_path=out)
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
_CONFIG = """[general]
run_name = layer
[architecture_presets]
ArrayHeight: 16
ArrayWidth: 16
IfmapSramSzkB: 256
FilterSramSzkB: 256
OfmapSramSzkB: 256
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: ws
Bandwidth: 10
ReadRequestBuffer: 512
WriteRequestBuffer: 512
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 8
RandomNumberGeneratorSeed: 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        configurations: accelerators in a sweep.
        rounds: of which the median counts.
        scalesim_python: Python of an environment with scalesim; None leaves it out.
    """

    configurations: int = 1_000_000
    rounds: int = 5
    scalesim_python: Path | None = None


def main(config: Config) -> None:
    rows, mismatches = compare_golden()
    print(f"golden rows: {rows}, counts that differ: {mismatches}")
    layers = merge_equal(deit_tiny())
    compile_s, rate = sweep_rate(layers, config)
    print(f"whole DeiT-tiny: {rate:,.0f} evaluations/s after {compile_s:.2f} s of compiling")
    eager = rate_of(lambda: cost(layers, presets["edge-ews-64"]).network.latency_s)
    print(
        f"one after the other from Python: {eager:.1f} evaluations/s, {rate / eager:,.0f}x slower"
    )
    figures: dict[str, Any] = {
        "evaluations_per_s": rate,
        "compile_s": compile_s,
        "golden_rows": rows,
        "golden_mismatches": mismatches,
        "configurations": config.configurations,
        "eager_evaluations_per_s": eager,
        "cores": os.cpu_count(),
    }
    if config.scalesim_python is not None:
        figures |= against_scalesim(config)
        print(
            f"one layer: scalesim {figures['scalesim_s']:.2f} s, this model "
            f"{1e9 * figures['layer_s']:.0f} ns in a sweep ({figures['scalesim_ratio']:,.0f}x) and "
            f"{1e3 * figures['layer_eager_s']:.1f} ms by itself "
            f"({figures['scalesim_eager_ratio']:,.0f}x); cycles {figures['scalesim_cycles']:,} and "
            f"{figures['layer_cycles']:,}"
        )
    print(json.dumps(figures))


def compare_golden() -> tuple[int, int]:
    """Compares cycles, SRAM and exact DRAM counts with the simulator's outputs.

    Returns:
        How many rows there are, and how many counts differ.
    """
    with GOLDEN.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mismatches = 0
    for row in rows:
        number = {name: int(x) for name, x in row.items() if x.isdigit()}
        accelerator = dataclasses.replace(
            presets["scalesim"],
            rows=number["rows"],
            columns=number["cols"],
            dataflow=row["dataflow"],
            input_sram_bytes=1024 * number["sram_kb_each"],
            weight_sram_bytes=1024 * number["sram_kb_each"],
        )
        found = gemm_cost(number["M"], number["K"], number["N"], accelerator)
        pairs = [
            (found.cycles, number["total_cycles"]),
            (found.input_sram_reads, number["sram_ifmap_reads"]),
            (found.weight_sram_reads, number["sram_filter_reads"]),
            (found.output_sram_writes, number["sram_ofmap_writes"]),
            (found.input_dram_reads, number["dram_ifmap_reads"]),
        ]
        if row["dataflow"] != "os":  # overstated there
            pairs.append((found.weight_dram_reads, number["dram_filter_reads"]))
        mismatches += sum(int(ours) != theirs for ours, theirs in pairs)
        used = float(row["overall_util_pct"])
        mismatches += abs(100 * float(found.utilization) - used) > 1e-9 * used
    return len(rows), mismatches


def deit_tiny() -> Layers:
    model = create("deit_tiny")
    shapes = param_shapes(model)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    workload = read_workload(lambda p, x: model.apply({"params": p}, x), shapes, images)
    return with_plan(workload, ssvq.make_plan(shapes, ssvq.load_recipe("ssvq-21x")))


def sweep_rate(layers: Layers, config: Config) -> tuple[float, float]:
    """Seconds of compiling, and evaluations a second after it."""

    def one(values: dict[str, Any]) -> tuple[Any, Any]:
        accelerator: Accelerator = dataclasses.replace(presets["edge-ews-64"], **values)
        found = cost(layers, accelerator).network
        return found.latency_s, found.energy_j

    rng = np.random.default_rng(0)
    size = config.configurations
    drawn = {
        "rows": rng.integers(8, 257, size).astype(float),
        "columns": rng.integers(8, 257, size).astype(float),
        "dram_bytes_per_s": rng.uniform(5e8, 1e11, size),
        "lookups_per_cycle": rng.integers(1, 33, size).astype(float),
    }
    with jax.enable_x64(True):
        values = jax.tree.map(jnp.asarray, drawn)
        start = time.perf_counter()
        compiled = jax.jit(jax.vmap(one)).lower(values).compile()
        compile_s = time.perf_counter() - start
        times = []
        for _ in range(config.rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(values))
            times.append(time.perf_counter() - start)
    return compile_s, size / float(np.median(times[1:]))


def rate_of(call: Callable[[], Any], seconds: float = 2.0) -> float:
    """Calls a second."""
    call()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def against_scalesim(config: Config) -> dict[str, Any]:
    """Times one layer in the simulator and here."""
    m, k, n = LAYER
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "layer.cfg").write_text(_CONFIG, encoding="utf-8")
        (folder / "layer.csv").write_text(f"Layer,M,N,K,\nqkv,{m},{n},{k},\n", encoding="utf-8")
        arguments = [folder / "layer.cfg", folder / "layer.csv", folder / "layer.csv", folder]
        done = subprocess.run(
            [str(config.scalesim_python), "-c", _SIMULATE, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        if done.returncode:
            raise SystemExit(f"scalesim failed:\n{done.stdout}{done.stderr}")
        seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
        (report,) = folder.rglob("COMPUTE_REPORT.csv")
        with report.open(encoding="utf-8") as file:
            row = {key.strip(): x for key, x in next(csv.DictReader(file)).items() if key}
        cycles = float(row["Total Cycles"])  # without prefetching
    layer = with_bits(Workload((Product("qkv", m, k, n, leaves=("w",)),)), 8)
    _, rate = sweep_rate(layer, config)
    alone = rate_of(lambda: gemm_cost(m, k, n, presets["scalesim"]))
    return {
        "scalesim_s": seconds,
        "layer_s": 1 / rate,
        "layer_eager_s": 1 / alone,
        "scalesim_ratio": seconds * rate,
        "scalesim_eager_ratio": seconds * alone,
        "scalesim_cycles": int(cycles),
        "layer_cycles": int(gemm_cost(m, k, n, presets["scalesim"]).cycles),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
