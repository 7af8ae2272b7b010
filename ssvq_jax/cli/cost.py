"""``ssvq cost``: what a recipe buys on an accelerator, before anything is trained."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.hardware import Accelerator, Layers, Workload
    from ssvq_jax.models import LoadedModel
    from ssvq_jax.plan import Plan

_RECIPE = "ssvq-21x"
_PLAIN = {"int4": 4, "int8": 8, "float16": 16, "float32": 32}
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # arrays of a sweep, over the accelerator's own
_BANDWIDTHS = tuple(2.0 ** (i / 4) for i in range(-12, 21))  # likewise


@dataclasses.dataclass(frozen=True)
class CostCommand:
    """Show what a recipe buys on an accelerator: cycles, bytes and energy of every layer.

    Closed forms, from shapes alone: no weight is loaded or computed.
    """

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_MODULE:FUNCTION")] = None
    """Model from the registry (deit_tiny), or module:function of your own code, which returns a
    flax.linen module, or (module, variables)."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_FILE")] = None
    """Preset (ssvq-21x, vq-21x, uniform-8bit, ...) or a recipe in a JSON file; by default
    ssvq-21x."""
    weights: Path | None = None
    """A packed .safetensors file instead of a recipe: counts the bytes that it holds, entropy-coded
    ones too, of the model that it is of."""
    workload: Path | None = None
    """A JSON file of matrix products instead of a model: {"products": [{"name": "fc", "m": 197,
    "k": 192, "n": 768, "leaves": ["fc/kernel"]}, ...]}; rules match the leaves."""
    accelerator: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "edge-ews-64"
    """Preset (edge-ews-64, ethos-u55-256, ethos-u65-512, tpu-v5e, scalesim), or your own in a JSON
    or YAML file."""
    against: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "int8"
    """What to compare with: int4, int8, float16, float32 (that many bits for every weight), or
    another recipe."""
    batch: int = 1
    """Images a call."""
    bandwidth: Annotated[str | None, tyro.conf.arg(metavar="4GB/s")] = None
    """Another DRAM bandwidth, in B/s, kB/s, MB/s, GB/s or TB/s, or in B/cycle."""
    classes: int | None = None
    """Number of classes, if not the model's own."""
    scan: bool = False
    """Stack the blocks for a scan."""
    image_size: int | None = None
    """Height and width of the images; by default what the model says."""
    channels: int | None = None
    """Channels of the images, if the model does not say; 3 by default."""
    sweep: bool = False
    """Also draw the speed-up over bandwidth and array size, a roofline and an energy split."""
    out: Path | None = None
    """Folder for cost.json and, with --sweep, the pictures (then by default runs/cost)."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        """Counts, and shows it."""
        import json

        from ssvq_jax.atomic import replace_text
        from ssvq_jax.report.cost import plot_cost_sweep, plot_energy, plot_roofline, print_cost

        out = self.out or (Path("runs/cost") if self.sweep else None)
        results = self._results()
        text = json.dumps(results, indent=1)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / "cost.json", text + "\n")
        if self.sweep and out is not None:
            plot_cost_sweep(results, out / "speed_up.png")
            plot_roofline(results, out / "roofline.png")
            plot_energy(results, out / "energy.png")
        if self.json:
            print(text)
            return
        print_cost(results)
        if out is not None:
            print(f"cost.json{' and the pictures are' if self.sweep else ' is'} in {out}")

    def _results(self) -> dict[str, Any]:
        from ssvq_jax.hardware import cost, load_accelerator, merge_equal, with_plan
        from ssvq_jax.report import provenance

        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: give at least 1")
        accelerator = load_accelerator(self.accelerator)
        if self.bandwidth is not None:
            found = bytes_per_s(self.bandwidth, accelerator.clock_hz)
            accelerator = dataclasses.replace(accelerator, dram_bytes_per_s=found)
        name, workload, shapes, plan, table = self._model()
        layers = with_plan(workload, plan, table)
        other = self._baseline(workload, shapes)
        network, baseline = cost(layers, accelerator).network, cost(other, accelerator).network
        results = {
            "model": name,
            "format": str(self.weights or self.recipe or _RECIPE),
            "against": self.against,
            "batch": self.batch,
            "accelerator": accelerator.to_json(),
            "macs": workload.macs,
            "operations": dict(workload.operations),
            "speed_up": float(baseline.latency_s / network.latency_s),
            "energy_ratio": float(baseline.energy_j / network.energy_j),
            "weight_bytes_ratio": _ratio(baseline.weight_dram_bytes, network.weight_dram_bytes),
            "network": _numbers(network) | {"bound": network.bound},
            "baseline": _numbers(baseline) | {"bound": baseline.bound},
            "layers": _rows(layers, accelerator),
            "distinct_layers": _rows(merge_equal(layers), accelerator),
            "baseline_layers": _rows(merge_equal(other), accelerator),
            **provenance(),
        }
        if self.sweep:
            results["sweep"] = _sweep(layers, other, accelerator)
        return results

    def _model(self) -> tuple[str, "Workload", Any, "Plan", Any]:
        """The model's name, what it computes, its parameters' shapes, plan and stored bits."""
        from ssvq_jax.models import load_model
        from ssvq_jax.packing import load
        from ssvq_jax.plan import make_plan
        from ssvq_jax.recipe import load_recipe

        if self.weights is None:
            if self.workload is not None:
                name, (workload, shapes) = str(self.workload), self._by_hand(self.workload)
            elif self.model is not None:
                name, model = (
                    self.model,
                    load_model(self.model, classes=self.classes, scan=self.scan),
                )
                workload, shapes = self._read(model, model.image_shape(*self._sizes()))
            else:
                raise ValueError(
                    "no model: give --model NAME, --model module:function, --weights with a "
                    "packed file, or --workload with a list of layers"
                )
            plan = make_plan(shapes, load_recipe(self.recipe or _RECIPE))
            return name, workload, shapes, plan, None
        if self.recipe is not None:
            raise ValueError(
                "--recipe and --weights: a packed file has its own plan, leave one out"
            )
        with load(self.weights) as file:
            told, plan, table = file.model, file.plan, file.bits()
        name = self.model or told.get("model")
        if name is None:
            raise ValueError(f"{self.weights} does not say of which model it is: give --model")
        classes = self.classes or told.get("outputs") or told.get("classes")
        model = load_model(name, classes=classes, scan=self.scan or bool(told.get("scan")))
        if "image_shape" in told and self.image_size is None:
            height, width, channels = told["image_shape"]
        else:
            height, width, channels = model.image_shape(*self._sizes())
        workload, shapes = self._read(model, (height, width, channels))
        return name, workload, shapes, plan, table

    def _by_hand(self, path: Path) -> tuple["Workload", Any]:
        """A workload from a file, and the shapes of the leaves that feed its products."""
        import jax

        from ssvq_jax.hardware import Workload
        from ssvq_jax.json_files import read_json

        if self.model is not None or self.batch != 1:
            raise ValueError("--workload has its own sizes: leave --model and --batch out")
        try:
            workload = Workload.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"workload file '{path}': {error}") from None
        shapes: dict[str, tuple[int, ...]] = {
            path: (size,) for path, size in workload.leaves.items()
        }
        for product in workload.products:
            lead = () if product.count * product.rounds == 1 else (product.count * product.rounds,)
            for leaf in product.leaves if len(product.leaves) == 1 else ():
                shapes[leaf] = (*lead, product.k, product.n)
        return workload, {
            path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()
        }

    def _sizes(self) -> tuple[int | None, int | None]:
        return self.image_size, self.channels

    def _read(
        self, model: "LoadedModel", image_shape: tuple[int, int, int]
    ) -> tuple["Workload", Any]:
        """What the model computes, and the shapes of its parameters."""
        import jax
        import jax.numpy as jnp

        from ssvq_jax.hardware import read_workload
        from ssvq_jax.training.step import linen_forward

        variables = dict(model.variables or model.shapes(image_shape))
        params = variables.pop("params")
        images = jax.ShapeDtypeStruct((self.batch, *image_shape), jnp.float32)
        forward = linen_forward(model.module)

        def logits(params: Any, state: Any, images: Any) -> Any:
            return forward(params, state, images, None)[0]

        try:
            return read_workload(logits, params, variables, images), params
        except ValueError as error:
            height, width, _ = image_shape
            raise ValueError(
                f"with --batch {self.batch} and images of {height} x {width} (--image-size): "
                f"{error}"
            ) from error

    def _baseline(self, workload: "Workload", shapes: Any) -> "Layers":
        from ssvq_jax.hardware import with_bits, with_plan
        from ssvq_jax.plan import make_plan
        from ssvq_jax.recipe import load_recipe

        if self.against in _PLAIN:
            return with_bits(workload, _PLAIN[self.against])
        try:
            recipe = load_recipe(self.against)
        except ValueError as error:
            raise ValueError(f"against: {error}; or one of {sorted(_PLAIN)}") from None
        return with_plan(workload, make_plan(shapes, recipe))


def bytes_per_s(text: str, clock_hz: float) -> float:
    """Reads a bandwidth with its unit.

    Args:
        text: ``4GB/s``, ``0.5 GB/s``, ``4B/cycle``.
        clock_hz: cycles a second.

    Returns:
        Bytes a second.

    Raises:
        ValueError: for text without a number or a unit.

    Example:
        >>> bytes_per_s("4B/cycle", 1e9), bytes_per_s("0.5 GB/s", 1e9)
        (4000000000.0, 500000000.0)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kMGT]?B)/(s|cycle)\s*", text)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or not 0 < number < float("inf"):
        raise ValueError(
            f"bandwidth={text!r}: give a positive number with its unit, as 4GB/s, 500MB/s or "
            "4B/cycle"
        )
    return number * _UNITS[found[2]] * (clock_hz if found[3] == "cycle" else 1.0)


def _sweep(layers: "Layers", other: "Layers", accelerator: "Accelerator") -> dict[str, Any]:
    from ssvq_jax.hardware import sweep

    bandwidth = [accelerator.dram_bytes_per_s * x for x in _BANDWIDTHS]
    arrays, speed_up = [], []
    for scale in _SIZES:
        rows, columns = (
            max(1, round(scale * size)) for size in (accelerator.rows, accelerator.columns)
        )
        sized = dataclasses.replace(accelerator, rows=rows, columns=columns)
        found, base = (sweep(x, sized, dram_bytes_per_s=bandwidth) for x in (layers, other))
        arrays.append((rows, columns))
        speed_up.append((base.latency_s / found.latency_s).tolist())
    return {"dram_bytes_per_s": bandwidth, "arrays": arrays, "speed_up": speed_up}


def _rows(layers: "Layers", accelerator: "Accelerator") -> list[dict[str, Any]]:
    """Sizes and costs of every layer."""
    from ssvq_jax.hardware import cost

    found = cost(layers, accelerator).layers
    return [
        {
            "name": name,
            "repeats": float(layers.repeats[i]),
            **{size: float(layers.columns[size][i]) for size in ("count", "m", "k", "n")},
            **{part: float(x[i]) for part, x in found._asdict().items()},
        }
        for i, name in enumerate(layers.names)
    ]


def _numbers(record: Any) -> dict[str, float]:
    return {name: float(x) for name, x in record._asdict().items()}


def _ratio(base: Any, found: Any) -> float | None:
    """None where nothing moves."""
    return float(base / found) if found > 0 else None
