"""Tables and pictures of what a network costs on an accelerator."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssvq_jax.report.plots import new_figure
from ssvq_jax.report.tables import print_table

_PARTS = ("mac", "sram", "dram", "decode", "vector")


def print_cost(results: Mapping[str, Any]) -> None:
    """Prints the costs of every layer and of the network, beside those of what it is compared with.

    Args:
        results: what `ssvq cost` writes.
    """
    columns = (
        "layer", "times", "M x K x N", "MACs", "compute cycles", "DRAM cycles", "decode cycles",
        "utilized", "weight bytes", "pJ/MAC",
    )  # fmt: skip
    rows: list[Sequence[str]] = [_layer(layer) for layer in results["distinct_layers"]]
    accelerator = results["accelerator"]
    title = (
        f"{results['model']} with {results['format']}, batch {results['batch']}, on "
        f"{accelerator['name']}: every layer, its weights as they come from DRAM"
    )
    print_table(title, columns, rows)
    sides = {results["format"]: results["network"], results["against"]: results["baseline"]}
    columns = (
        "weights",
        "latency",
        "bound by",
        *(f"{part} cycles" for part in ("compute", "dram", "decode", "vector")),
        "weight bytes",
        "MAC/byte",
        "energy",
    )
    print_table("one call of the network", columns, [_network(n, x) for n, x in sides.items()])
    ratio = results["weight_bytes_ratio"]
    print(
        f"{results['format']} against {results['against']}: {results['speed_up']:.2f}x the speed, "
        f"{1 / results['energy_ratio']:.2f}x the energy, "
        + ("no weights from DRAM" if ratio is None else f"{1 / ratio:.2f}x the bytes of weights")
    )
    print(
        f"{accelerator['name']}: {accelerator['source']}\n"
        "A model in closed form, not a measurement: see docs/hardware.md for what it leaves out."
    )


def plot_cost_sweep(results: Mapping[str, Any], file: Path) -> None:
    """Draws speed-up over bandwidth, a line an array size.

    Args:
        results: what `ssvq cost --sweep` writes.
        file: where to write the picture; the ending decides the format.
    """
    figure, axes = new_figure()
    found = results["sweep"]
    bandwidth = [x / 1e9 for x in found["dram_bytes_per_s"]]
    for (rows, columns), speed_up in zip(found["arrays"], found["speed_up"], strict=True):
        axes.plot(bandwidth, speed_up, label=f"{rows} x {columns} PEs")
    axes.axhline(3.0, color="grey", linestyle=":", label="3x")
    axes.axvline(
        results["accelerator"]["dram_bytes_per_s"] / 1e9,
        color="grey",
        linestyle="--",
        label="its own bandwidth",
    )
    axes.set(
        xscale="log",
        xlabel="DRAM bandwidth, GB/s",
        ylabel=f"latency of {results['against']} / {results['format']}",
        title=_title(results, "speed-up"),
    )
    axes.legend(fontsize="small")
    figure.savefig(file)


def plot_roofline(results: Mapping[str, Any], file: Path) -> None:
    """Draws where the layers and the network stand under the accelerator's roof.

    Args:
        results: what `ssvq cost` writes.
        file: where to write the picture.
    """
    import numpy as np

    figure, axes = new_figure()
    accelerator = results["accelerator"]
    peak = accelerator["rows"] * accelerator["columns"] * accelerator["arrays"]
    per_cycle = accelerator["dram_bytes_per_s"] / accelerator["clock_hz"]
    sides = (
        (results["format"], results["distinct_layers"], results["network"]),
        (results["against"], results["baseline_layers"], results["baseline"]),
    )
    marks = []
    for color, (name, layers, network) in zip(("tab:blue", "tab:orange"), sides, strict=True):
        points = [
            (
                layer["macs"] / (layer["weight_dram_bytes"] + layer["activation_dram_bytes"]),
                layer["macs"] / layer["cycles"],
            )
            for layer in layers
            if layer["weight_dram_bytes"] + layer["activation_dram_bytes"] > 0
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o", color=color, alpha=0.4, label=f"{name}, layers"
            )
        whole = network["macs_per_dram_byte"], network["macs"] / network["latency_cycles"]
        axes.plot(*whole, "*", markersize=16, color=color, label=f"{name}, network")
        marks += [x for x, _ in points] + [whole[0]]
    x = np.geomspace(min(*marks, peak / per_cycle) / 2, max(*marks, peak / per_cycle) * 2, 100)
    axes.plot(x, np.minimum(x * per_cycle, peak), color="black", label="roof")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="multiplications a byte from or to DRAM",
        ylabel="multiplications a cycle",
        title=_title(results, "roofline"),
    )
    axes.legend(fontsize="small")
    figure.savefig(file)


def plot_energy(results: Mapping[str, Any], file: Path) -> None:
    """Draws the energy of one call by part.

    Args:
        results: what `ssvq cost` writes.
        file: where to write the picture.
    """
    figure, axes = new_figure()
    sides = {results["format"]: results["network"], results["against"]: results["baseline"]}
    bottom = [0.0] * len(sides)
    for part in _PARTS:
        values = [1e3 * network[f"{part}_j"] for network in sides.values()]
        axes.bar(list(sides), values, bottom=bottom, label=part, width=0.5)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set(ylabel="energy of one call, mJ", title=_title(results, "energy"))
    axes.legend(fontsize="small")
    figure.savefig(file)


def _title(results: Mapping[str, Any], what: str) -> str:
    return f"{results['model']}, batch {results['batch']}, {results['accelerator']['name']}: {what}"


def _layer(layer: Mapping[str, Any]) -> tuple[str, ...]:
    count = f"{layer['count']:.0f} x " if layer["count"] > 1 else ""
    picojoule = sum(layer[f"{part}_pj"] for part in ("mac", "sram", "dram", "decode"))
    return (
        layer["name"],
        f"{layer['repeats']:.0f}",
        f"{count}{layer['m']:.0f} x {layer['k']:.0f} x {layer['n']:.0f}",
        *(f"{layer[key]:,.0f}" for key in
          ("macs", "compute_cycles", "dram_cycles", "decode_cycles")),
        f"{layer['utilization']:.0%}",
        f"{layer['weight_dram_bytes']:,.0f}",
        f"{picojoule / layer['macs']:.2f}",
    )  # fmt: skip


def _network(name: str, network: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{1e3 * network['latency_s']:.3f} ms",
        network["bound"],
        *(f"{network[key]:,.0f}" for key in
          ("compute_cycles", "dram_cycles", "decode_cycles", "vector_cycles")),
        f"{network['weight_dram_bytes']:,.0f}",
        f"{network['macs_per_dram_byte']:.0f}",
        f"{1e3 * network['energy_j']:.3f} mJ",
    )  # fmt: skip
