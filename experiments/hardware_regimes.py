"""Where SSVQ buys speed over int8 on DeiT-tiny, and where it does not.

    python experiments/hardware_regimes.py

Evaluates the cost model (seconds; nothing is trained or measured on a chip), writes
experiments/results/hardware_regimes.json, and from it the tables and the picture of
docs/hardware.md. ``--only-report`` writes these alone.
Expected: 3x on edge arrays up to a bandwidth that grows with the array and shrinks with the batch,
little with spilled activations, nothing with resident weights or on shipping accelerators.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ssvq_jax as ssvq
from ssvq_jax import hardware
from ssvq_jax.hardware import Accelerator, Layers, presets
from ssvq_jax.json_files import read_json
from ssvq_jax.models import create, param_shapes
from ssvq_jax.recipe import load_recipe
from ssvq_jax.report import provenance
from ssvq_jax.report.pages import insert, markdown_table
from ssvq_jax.report.plots import new_figure

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hardware.md"
EDGE = presets["edge-ews-64"]
MIB = 1024 * 1024

RECIPES: dict[str, Any] = {
    "ssvq, ends int8": load_recipe("ssvq-21x"),
    "ssvq, all kernels": [(".*kernel", ssvq.SignSplit(codewords=16, dim=8)), (".*", None)],
    "vq, all kernels": [(".*kernel", ssvq.Vector(codewords=64, dim=4)), (".*", None)],
    "2 bits, all kernels": [(".*kernel", ssvq.Uniform(bits=2)), (".*", None)],
}
MAIN = "ssvq, all kernels"


def _edge(size: int = 64, **changes: Any) -> Accelerator:
    return dataclasses.replace(EDGE, rows=size, columns=size, **changes)


# Name, accelerator, images a call.
REGIMES: tuple[tuple[str, Accelerator, int], ...] = (
    ("64 x 64 EWS, 2 GB/s", _edge(dram_bytes_per_s=2e9), 1),
    ("64 x 64 EWS, 4 GB/s", _edge(), 1),
    ("64 x 64 EWS, 8 GB/s", _edge(dram_bytes_per_s=8e9), 1),
    ("128 x 128 EWS, 8 GB/s", _edge(128, dram_bytes_per_s=8e9), 1),
    ("64 x 64, 4 GB/s, one layer ahead", _edge(overlap="one_ahead"), 1),
    ("64 x 64, 4 GB/s, nothing overlapped", _edge(overlap="serial"), 1),
    ("64 x 64, 1 GB/s, nothing overlapped", _edge(overlap="serial", dram_bytes_per_s=1e9), 1),
    ("64 x 64, 4 GB/s, activations spilled", _edge(activations="spilled"), 1),
    *(
        (
            f"64 x 64, {bandwidth} GB/s, {size} MiB for weights, resident if they fit",
            _edge(
                weights="automatic",
                weight_sram_bytes=size * MIB,
                dram_bytes_per_s=bandwidth * 1e9,
            ),
            1,
        )
        for size, bandwidth in ((2, 4), (2, 1), (8, 4))
    ),
    ("64 x 64, 4 GB/s, batch 8 (activations spill)", _edge(), 8),
    *(
        (
            f"64 x 64, {bandwidth} GB/s, batch {batch}, buffers of 2 MiB",
            _edge(
                weight_sram_bytes=2 * MIB,
                input_sram_bytes=2 * MIB,
                output_sram_bytes=2 * MIB,
                dram_bytes_per_s=bandwidth * 1e9,
            ),
            batch,
        )
        for batch, bandwidth in ((2, 1), (4, 0.5), (8, 0.5), (8, 4))
    ),
    ("64 x 64, 4 GB/s, one look-up a cycle", _edge(lookups_per_cycle=1), 1),
    ("64 x 64, 4 GB/s, 64 vector operations a cycle", _edge(vector_ops_per_cycle=64), 1),
    ("like Ethos-U55-256, weights in flash", presets["ethos-u55-256"], 1),
    ("like Ethos-U65-512, weights in DRAM", presets["ethos-u65-512"], 1),
    ("like TPU v5e", presets["tpu-v5e"], 1),
    ("like TPU v5e, batch 64", presets["tpu-v5e"], 64),
)
SIZES = (32, 64, 128)
BANDWIDTHS = np.geomspace(0.25e9, 128e9, 217)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        results: file for the figures.
        page: document for the tables; the picture lies beside it.
        only_report: write the tables and the picture from what is there.
    """

    results: Path = ROOT / "experiments" / "results" / "hardware_regimes.json"
    page: Path = PAGE
    only_report: bool = False


def main(config: Config) -> None:
    if not config.only_report:
        start = time.perf_counter()
        found = measure()
        found |= {
            "config": {"model": "deit_tiny", "seed": None},  # nothing is drawn
            "seconds": round(time.perf_counter() - start, 1),
            **provenance(),
        }
        config.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = read_json(config.results)
    for name, text in tables(found).items():
        insert(config.page, name, text)
        print(text + "\n")
    plot(found, config.page.with_name("hardware_speed_up.png"))


def measure() -> dict[str, Any]:
    """Evaluates the model in every regime."""
    networks = {batch: formats(batch) for batch in sorted({batch for *_, batch in REGIMES})}
    rows = []
    for name, accelerator, batch in REGIMES:
        costs = {
            label: hardware.cost(layers, accelerator).network
            for label, layers in networks[batch].items()
        }
        base = costs["int8"]
        rows.append(
            {
                "regime": name,
                "batch": batch,
                "accelerator": accelerator.to_json(),
                "int8": _figures(base),
                **{
                    label: _figures(x)
                    | {
                        "speed_up": float(base.latency_s / x.latency_s),
                        "energy_ratio": float(base.energy_j / x.energy_j),
                    }
                    for label, x in costs.items()
                    if label != "int8"
                },
            }
        )
    one = networks[1]
    return {
        "sizes": [_size(name, one["int8"], layers) for name, layers in one.items()],
        "regimes": rows,
        "thresholds": [_threshold(size, one["int8"], one[MAIN]) for size in SIZES],
        "curves": _curves(one),
        "decoder": [_decoder(lookups, one[MAIN]) for lookups in (0.5, 1.0, 2.0, 3.0, 4.0, 8.0)],
    }


def formats(batch: int) -> dict[str, Layers]:
    """DeiT-tiny, with its weights in int8 and as every recipe stores them."""
    model = create("deit_tiny")
    shapes = param_shapes(model)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    workload = hardware.read_workload(lambda p, x: model.apply({"params": p}, x), shapes, images)
    plans = {name: ssvq.make_plan(shapes, recipe) for name, recipe in RECIPES.items()}
    return {
        "int8": hardware.with_bits(workload, 8),
        **{name: hardware.with_plan(workload, plan) for name, plan in plans.items()},
    }


def _figures(network: hardware.NetworkCost) -> dict[str, Any]:
    numbers = {name: float(x) for name, x in network._asdict().items()}
    return numbers | {"bound": network.bound}


def _size(name: str, base: Layers, layers: Layers) -> dict[str, Any]:
    def kernels(x: Layers) -> float:
        return float(np.sum(x.columns["coded_bytes"] + x.columns["table_bytes"]))

    found, reference = kernels(layers), kernels(base)
    other = float(layers.other_weight_bytes)
    return {
        "weights": name,
        "kernel_bytes": found,
        "other_bytes": other,
        "kernel_ratio": reference / found,
        "ratio": (reference + other) / (found + other),
    }


def _threshold(size: int, base: Layers, layers: Layers) -> dict[str, Any]:
    """The highest bandwidth with 3x the speed: on a grid, then by bisection."""

    def speed_up(bandwidth: Any) -> np.ndarray:
        found, reference = (
            hardware.sweep(x, _edge(size), dram_bytes_per_s=bandwidth) for x in (layers, base)
        )
        return np.asarray(reference.latency_s / found.latency_s)

    on_grid = speed_up(BANDWIDTHS)
    last = int(np.flatnonzero(on_grid >= 3)[-1])
    low, high = BANDWIDTHS[last : last + 2]
    for _ in range(30):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if speed_up([middle])[0] >= 3 else (low, middle)
    network = hardware.cost(layers, _edge(size)).network
    used = float(network.macs / network.compute_cycles)
    return {
        "array": size,
        "best_speed_up": float(on_grid.max()),
        "bandwidth_bytes_per_s": float(low),
        "macs_per_cycle": used,
        "macs_per_byte": used * EDGE.clock_hz / float(low),
    }


def _curves(networks: Mapping[str, Layers]) -> dict[str, Any]:
    bandwidth = BANDWIDTHS[::4]
    curves: dict[str, Any] = {"dram_bytes_per_s": bandwidth.tolist()}
    for size in SIZES:
        base, found = (
            hardware.sweep(networks[name], _edge(size), dram_bytes_per_s=bandwidth).latency_s
            for name in ("int8", MAIN)
        )
        curves[str(size)] = (base / found).tolist()
    return curves


def _decoder(lookups: float, layers: Layers) -> dict[str, Any]:
    network = hardware.cost(layers, _edge(lookups_per_cycle=lookups)).network
    return {"lookups_per_cycle": lookups, **_figures(network)}


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by marker."""
    labels = list(RECIPES)
    sizes = [
        [
            row["weights"],
            f"{row['kernel_bytes']:,.0f}",
            f"{row['other_bytes']:,.0f}",
            f"{row['kernel_ratio']:.2f}x",
            f"{row['ratio']:.2f}x",
        ]
        for row in found["sizes"]
    ]
    regimes = [
        [
            row["regime"],
            f"{1e3 * row['int8']['latency_s']:.3f} ms ({row['int8']['bound']})",
            *(f"{row[label]['speed_up']:.2f}x" for label in labels),
            f"{row[MAIN]['energy_ratio']:.2f}x",
            row[MAIN]["bound"],
        ]
        for row in found["regimes"]
    ]
    thresholds = [
        [
            f"{row['array']} x {row['array']}",
            f"{row['best_speed_up']:.2f}x",
            f"{row['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s",
            f"{row['macs_per_cycle']:,.0f}",
            f"{row['macs_per_byte']:,.0f}",
        ]
        for row in found["thresholds"]
    ]
    decoder = [
        [
            f"{row['lookups_per_cycle']:g}",
            f"{1e3 * row['latency_s']:.3f} ms",
            row["bound"],
        ]
        for row in found["decoder"]
    ]
    return {
        "sizes table": markdown_table(
            ["weights", "bytes of kernels", "other bytes", "kernels against int8", "all weights"],
            sizes,
        ),
        "regimes table": markdown_table(
            ["regime", "int8 (bound by)", *labels, f"energy, {MAIN}", f"bound of {MAIN}"], regimes
        ),
        "thresholds table": markdown_table(
            ["array", "best", "3x up to", "MACs/cycle while computing", "MACs/byte there"],
            thresholds,
        ),
        "decoder table": markdown_table(["look-ups a cycle", "latency", "bound by"], decoder),
    }


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Draws speed-up over bandwidth."""
    figure, axes = new_figure()
    curves = found["curves"]
    for size in SIZES:
        x = [y / 1e9 for y in curves["dram_bytes_per_s"]]
        axes.plot(x, curves[str(size)], label=f"{size} x {size} EWS")
    axes.axhline(3.0, color="grey", linestyle=":", label="3x")
    axes.set(
        xscale="log",
        xlabel="DRAM bandwidth at 1 GHz, GB/s = bytes a cycle",
        ylabel=f"latency of int8 / {MAIN}",
        title="DeiT-tiny, batch 1, activations on chip, everything overlapped",
    )
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Software": None})


if __name__ == "__main__":
    main(tyro.cli(Config))
