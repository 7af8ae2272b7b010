"""The packed file: its size, how fast it is read and decoded, what serving from it takes.

    python benchmarks/packing.py [--rounds 15 --layers 12 --width 1024]

Sizes are those of `deit_tiny` with random initial weights, k-means on them, and biases and norms in
float16; in the first recipe patch embedding, positions and head are int8, in the second every
kernel is at 1.5 bits. "Entropy" is that of each field of codes, signs or levels under its own
frequencies; the distance is what the coded file takes for them beyond that.

Speeds: both sides in turn in this process, medians of as many rounds. Decoding, bit unpacking
included, is compared with a jitted copy of the decoded array; loading and decoding a packed file
with the time safetensors takes to load the float32 file, both from the page cache and compiled
before; the product of activations and a packed weight with decoding the weight and multiplying, and
with the product of a dense one. Large weights have random codes: no clustering, the same work.

Serving memory is what XLA says of the compiled forward pass, arguments and temporaries, over the
packed weights, two decoded layers and the activations. The last line is one JSON object.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.flax import load_file, save_file

import ssvq_jax as ssvq
from ssvq_jax.inference import PackedLeaf, decode_params, matmul, packed_params, serve
from ssvq_jax.models import create
from ssvq_jax.packing.entropy import entropy_bits
from ssvq_jax.plan import Packed, Plan
from ssvq_jax.quantizers import Quantizer, Stream
from ssvq_jax.quantizers.streams import decode_streams, stream_shape, unpack_fields
from ssvq_jax.tree import LeafSpec, leaves_by_path

MAIN = ssvq.SignSplit(codewords=16, dim=8, iterations=20)
RECIPES: dict[str, list[Any]] = {
    "int8 ends": [
        ("(patch_embed|head)/kernel|pos_embed", ssvq.Uniform(bits=8)),
        (".*kernel", MAIN),
        (".*", None),
    ],
    "all kernels": [("pos_embed", ssvq.Uniform(bits=8)), (".*kernel", MAIN), (".*", None)],
}
METHODS: tuple[Quantizer, ...] = (
    MAIN,
    ssvq.SignSplit(codewords=4, dim=8),
    ssvq.SignSplit(codewords=8, dim=8),
    ssvq.SignSplit(codewords=16, dim=8, channel_scale=True),
    ssvq.Vector(codewords=64, dim=4),
    ssvq.Vector(codewords=256, dim=8),
    ssvq.Vector(codewords=4096, dim=8),
    ssvq.Uniform(bits=4),
    ssvq.Uniform(bits=8),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Attributes:
        rounds: timings of each side, in turn; the median counts.
        layers: of the large trees.
        width: features of the large trees; a layer has 8 width^2 weights.
        batch: rows of the input to the served model.
    """

    rounds: int = 15
    layers: int = 12
    width: int = 1024
    batch: int = 16


def main(config: Config) -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = sizes(folder, figures)
        decoding(config, figures)
        loading(config, folder, small, figures)
        products(config, figures)
        serving(config, figures)
    print(json.dumps(figures))


def sizes(folder: Path, figures: dict[str, Any]) -> Path:
    """Bytes of `deit_tiny`; returns the plain file of the first recipe."""
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.jit(create("deit_tiny").init)(jax.random.key(0), images)["params"]
    columns = ("recipe", "codec", "file", "header", "share", "bits - plan", "fields", "entropy")
    rows, difference, share = [], 0, 0.0
    for name, recipe in RECIPES.items():
        plan = ssvq.make_plan(params, recipe)
        packed = plan.finalize(plan.init(jax.random.key(1), params), dense_dtype="float16")
        for codec in ("plain", "entropy"):
            path = folder / f"{name}.{codec}.safetensors"
            ssvq.save(path, packed, codec=codec, model={"model": "deit_tiny"})
            with ssvq.load(path) as file:
                header, size = file.header_bytes, file.file_bytes
                held, planned = 8 * (size - header), plan.bits("float16").model.total_bits
                if codec == "plain":
                    difference = max(difference, abs(held - planned))
                    share = max(share, header / size)
                fields, bound = coded_bytes(file, packed)
            rows.append([name, codec, f"{size:,}", f"{header:,}", f"{header / size:.2%}",
                         f"{held - planned:,}", f"{fields:,}", f"{bound:,.0f}"])  # fmt: skip
            key = "deit_tiny" if name == "int8 ends" else "deit_tiny_all_kernels"
            figures[f"{key}{'_entropy' if codec == 'entropy' else ''}_mb"] = size / 1e6
            if name == "int8 ends" and codec == "entropy":
                figures["entropy_distance_share"] = (fields - bound) / bound
    show("deit_tiny, 22.87 MB in float32 (bytes; fields: codes, signs, levels)", columns, rows)
    figures |= {"bits_minus_plan": difference, "header_share": share}
    return folder / "int8 ends.plain.safetensors"


def coded_bytes(file: ssvq.PackedFile, packed: Packed) -> tuple[int, float]:
    """What all codes, signs and levels take in a file, and their entropy in bytes."""
    held = bound = 0.0
    bits = {row.name: row.bits for row in file.bits().rows}
    for entry in packed.plan.entries:
        fields = unpack_fields(entry.quantizer, packed.streams[entry.name], entry.spec)
        for stream in entry.storage.streams:
            if stream.values is not None:
                numbers = np.asarray(fields[stream.field]).reshape(-1).astype(np.int64)
                held += bits[entry.name][stream.field] / 8
                bound += entropy_bits(np.bincount(numbers)) / 8
    return int(held), bound


def decoding(config: Config, figures: dict[str, Any]) -> None:
    """Bytes a second of decoding one large weight, and of copying it."""
    spec = LeafSpec("", (12 * config.width, 3 * config.width), "float32")
    rng = np.random.default_rng(0)
    copy = jax.jit(jnp.copy)
    array = jnp.asarray(rng.normal(size=spec.shape).astype(np.float32))
    rows = []
    for method in METHODS:
        streams = jax.tree.map(jnp.asarray, random_streams(rng, method, spec))
        seconds, base = in_turn(
            config.rounds,
            lambda method=method, streams=streams: decode_streams(method, streams, spec),
            lambda: copy(array),
        )
        size = array.nbytes
        rows.append([f"{method.method} {method.settings}", f"{size / seconds / 1e9:.2f}",
                     f"{size / base / 1e9:.2f}", f"{base / seconds:.2f}"])  # fmt: skip
        if method is MAIN:
            figures["decode_bandwidth_ratio"] = base / seconds
    columns = ("method", "decode GB/s", "copy GB/s", "ratio")
    show(f"decoding {spec.shape[0]} x {spec.shape[1]} weights to float32", columns, rows)


def loading(config: Config, folder: Path, small: Path, figures: dict[str, Any]) -> None:
    """Time to load and decode, against safetensors with float32."""
    files = {"deit_tiny": small, f"{8 * config.layers * config.width**2 / 1e6:.0f} M": None}
    rows, ratios = [], []
    for name, path in files.items():
        if path is None:
            shapes = {
                f"layer_{i}": {"up": (config.width, 4 * config.width),
                               "down": (4 * config.width, config.width)}
                for i in range(config.layers)
            }  # fmt: skip
            plan = ssvq.make_plan(as_shapes(shapes), [(".*", MAIN)])
            path = folder / "large.safetensors"
            ssvq.save(path, random_packed(plan))
        plain = folder / "float32.safetensors"
        with ssvq.load(path) as file:
            save_file(dict(leaves_by_path(file.decode())), str(plain))

        def ours(path: Path = path) -> Any:
            with ssvq.load(path) as file:
                return file.decode()

        seconds, base = in_turn(config.rounds, ours, lambda plain=plain: load_file(str(plain)))
        ratios.append(seconds / base)
        rows.append([name, f"{path.stat().st_size / 1e6:.2f}", f"{1e3 * seconds:.1f}",
                     f"{plain.stat().st_size / 1e6:.2f}", f"{1e3 * base:.1f}",
                     f"{seconds / base:.2f}"])  # fmt: skip
    columns = ("model", "packed MB", "load + decode ms", "float32 MB", "safetensors ms", "ratio")
    show("loading", columns, rows)
    figures |= {"load_time_ratio": max(ratios), "load_time_ratios": ratios}


def products(config: Config, figures: dict[str, Any]) -> None:
    """Time of x @ W for a packed W."""
    spec = LeafSpec("", (config.width, 4 * config.width), "float32")
    leaf = PackedLeaf(random_streams(np.random.default_rng(2), MAIN, spec), MAIN, spec)
    leaf = jax.tree.map(jnp.asarray, leaf)
    weight = leaf.decode()
    rows = []
    for batch in (1, 16, 256):
        x = jnp.ones((batch, config.width))
        whole = jax.jit(lambda x, leaf: x @ leaf.decode())
        dense = jax.jit(jnp.matmul)
        tiles, decoded, base = in_turn(
            5 * config.rounds,
            lambda x=x: matmul(x, leaf),
            lambda x=x, whole=whole: whole(x, leaf),
            lambda x=x, dense=dense: dense(x, weight),
        )
        figures[f"matmul_ratio_{batch}"] = tiles / decoded
        times = (1e3 * tiles, 1e3 * decoded, 1e3 * base)
        rows.append([str(batch), *(f"{x:.2f}" for x in times), f"{tiles / decoded:.2f}"])
    columns = ("batch", "by tiles ms", "decode, multiply ms", "dense ms", "ratio of the first two")
    show(f"product with a packed weight {spec.shape[0]} x {spec.shape[1]}", columns, rows)


def serving(config: Config, figures: dict[str, Any]) -> None:
    """Memory of a model whose weights stay packed, its layers scanned over or in a row."""
    width, layers = config.width, config.layers
    shapes = {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}
    plan = ssvq.make_plan(as_shapes(shapes), [ssvq.Rule(".*", MAIN, stacked=1)])
    stack = packed_params(random_packed(plan))
    row = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(layers)]

    def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        return x + jax.nn.gelu(x @ params["up"]) @ params["down"], None

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, params)[0]

    def unrolled(params: Any, x: jax.Array) -> jax.Array:
        for part in params:
            x, _ = layer(x, part)
        return x

    x = jnp.ones((config.batch, width))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    one, activations = 4 * 8 * width**2, 4 * config.batch * (2 * width + 2 * 4 * width)
    allowed = size + 2 * one + activations
    rows = []
    for name, apply, weights in (("scan", scanned, stack), ("unrolled", unrolled, row)):
        decodes: dict[str, Any] = {
            "serve": serve(apply),
            "whole model first": lambda w, x, apply=apply: apply(decode_params(w), x),
        }
        for decoded, function in decodes.items():
            found: Any = jax.jit(function).lower(weights, x).compile().memory_analysis()
            held = found.argument_size_in_bytes + found.temp_size_in_bytes
            megabytes = [f"{n / 1e6:.1f}" for n in (size, found.temp_size_in_bytes, held)]
            rows.append([name, decoded, *megabytes, f"{held / allowed:.2f}"])
            key = "serve_memory_ratio" + ("_unrolled" if name == "unrolled" else "")
            figures.setdefault(key, held / allowed)  # of serve, which comes first
    columns = ("layers", "decoded", "packed MB", "temporaries MB", "in all MB", "of allowed")
    show(f"serving {layers} layers of {one / 1e6:.1f} MB in float32", columns, rows)


def as_shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def random_packed(plan: Plan) -> Packed:
    """A packed model with random codes."""
    rng = np.random.default_rng(1)
    streams = {x.name: random_streams(rng, x.quantizer, x.spec) for x in plan.entries}
    holes: Any = None
    for entry in reversed(plan.entries):
        *outer, last = entry.name.split("/")
        holes = holes or {}
        node = holes
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = None
    return Packed(plan, holes, streams)


def random_streams(
    rng: np.random.Generator, method: Quantizer, spec: LeafSpec
) -> dict[str, np.ndarray]:
    def one(stream: Stream) -> np.ndarray:
        shape = stream_shape(stream, spec)
        if stream.values is not None:
            return rng.integers(0, 256, shape, np.uint8)
        if stream.dtype == "int8":
            return rng.integers(1, 127, shape, np.int8)
        return np.full(shape, 1e-3, jnp.dtype(stream.dtype))

    return {stream.field: one(stream) for stream in method.storage(spec).streams}


def in_turn(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """Median seconds of each, one round of all after the other."""
    for function in functions:
        jax.block_until_ready(function())
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def show(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
