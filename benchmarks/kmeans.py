"""k-means against faiss and scikit-learn, in one process, with the same threads and start.

    python benchmarks/kmeans.py [--sizes 687500x8x256 --rounds 5 --no-models]

Every library gets the same sub-vectors and initial centroids and runs whole Lloyd iterations
(assign and update), in turn, so that a slow moment of the machine hits all. The time of an
iteration is the difference of a long and a short run over the difference of their iterations, which
leaves out compilation and set-up. "Matrix product" is the physical limit: the products of
sub-vectors and centroids alone, in XLA or NumPy's BLAS, whichever is faster. Memory is read from
Linux's /proc. The last line is one JSON object.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from ssvq_jax import SignSplit, make_plan
from ssvq_jax.clustering import kmeans

SIZES = (
    "687500x8x16",  # all blocks of DeiT-tiny at once
    "687500x8x256",
    "687500x4x64",
    "5000000x8x256",
    "1000000x16x4096",
    "2000000x1x16",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Attributes:
        sizes: sub-vectors x width x codewords.
        rounds: timings of each library, in turn; the median counts.
        seeds: starts for the comparison of seedings.
        models: also cluster whole models.
        data: "normal" sub-vectors, or their magnitudes ("half-normal"), as sign splitting has them.
        part: for the benchmark's own child processes.
    """

    sizes: tuple[str, ...] = SIZES
    rounds: int = 5
    seeds: int = 5
    models: bool = True
    data: str = "normal"
    part: str = ""


@dataclasses.dataclass(frozen=True)
class Size:
    """One problem."""

    text: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sub-vectors, width, codewords."""
        count, dim, codewords = (int(number) for number in self.text.split("x"))
        return count, dim, codewords

    @property
    def spans(self) -> tuple[int, int]:
        """Iterations of the short and the long run: enough for a tenth of a second or so."""
        count, dim, codewords = self.shape
        return 1, 1 + max(2, min(20, int(1e11 / (count * codewords * dim + 2e9))))

    def problem(self, data: str) -> tuple[np.ndarray, np.ndarray]:
        """Sub-vectors and initial centroids."""
        count, dim, codewords = self.shape
        rng = np.random.default_rng(0)
        points = rng.standard_normal((count, dim), dtype=np.float32)
        points = np.abs(points) if data == "half-normal" else points
        return points, points[rng.choice(count, codewords, replace=False)]


def ours(points: Any, start: Any, iterations: int) -> float:
    """Runs ssvq_jax; returns the mean squared error per sub-vector."""
    found = kmeans(jax.random.key(0), points, len(start), iterations=iterations, init=start)
    return float(found.objective[-1])


def with_faiss(points: np.ndarray, start: np.ndarray, iterations: int) -> float:
    clustering = faiss.Kmeans(
        points.shape[1], len(start), niter=iterations, min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )  # fmt: skip
    clustering.train(points, init_centroids=start)
    return mean_error(points, np.asarray(clustering.centroids))


def with_sklearn(points: np.ndarray, start: np.ndarray, iterations: int) -> float:
    settings: dict[str, Any] = {"init": start, "n_init": 1, "max_iter": iterations, "tol": 0.0}
    found = KMeans(len(start), algorithm="lloyd", copy_x=False, **settings).fit(points)
    assert found.inertia_ is not None
    return float(found.inertia_) / len(points)


def mean_error(points: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared error per sub-vector, by faiss's own search: a judge that is not ours."""
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(centroids)
    _, codes = index.search(points, 1)
    difference = points - centroids[codes[:, 0]]
    return float(np.square(difference, dtype=np.float64).sum() / len(points))


def products(points: np.ndarray, centroids: np.ndarray) -> float:
    """Seconds for the bare matrix products, a tile at a time; the faster of XLA and BLAS."""
    rows = max(128, 2**20 // len(centroids))
    tiles = len(points) // rows
    cut = points[: tiles * rows].reshape(tiles, rows, -1)

    @jax.jit
    def multiply(cut: jax.Array, centroids: jax.Array) -> jax.Array:
        scores = jnp.zeros((rows, len(centroids)), jnp.float32)
        return lax.fori_loop(0, tiles, lambda i, scores: cut[i] @ centroids.T, scores)

    def in_xla() -> None:
        jax.block_until_ready(multiply(on_device, centres))

    def in_blas() -> None:
        for tile in cut:
            np.matmul(tile, transposed, out=scores)

    on_device, centres = jnp.asarray(cut), jnp.asarray(centroids)
    transposed, scores = np.ascontiguousarray(centroids.T), np.empty((rows, len(centroids)), "f4")
    in_xla()
    share = len(points) / (tiles * rows)
    return share * min(
        statistics.median(seconds(side) for _ in range(3)) for side in (in_xla, in_blas)
    )


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(size: Size, config: Config) -> dict[str, float]:
    """Times one size on all sides; objectives after the long run."""
    points, start = size.problem(config.data)
    short, long = size.spans
    on_device = jnp.asarray(points), jnp.asarray(start)
    sides: dict[str, Callable[[int], float]] = {
        "ours": lambda n: ours(*on_device, n),
        "faiss": lambda n: with_faiss(points, start, n),
        "sklearn": lambda n: with_sklearn(points, start, n),
    }
    found: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, run in sides.items():  # compile, load, and judge
        run(short)
        found[f"objective_{name}"] = run(long)
    for _ in range(config.rounds):
        for name, run in sides.items():
            lasted = [seconds(lambda n=n, run=run: run(n)) for n in (short, long)]
            times[name].append((lasted[1] - lasted[0]) / (long - short))
    for name, each in times.items():
        found[name] = statistics.median(each)
    # faiss's run ends with a search for the objective; it is in both runs and cancels.
    found["matmul"] = products(points, start)
    return found


def seedings(config: Config) -> float:
    """Objective from our seeding over that from scikit-learn's, mean over seeds."""
    points, _ = Size("50000x8x64").problem(config.data)
    rng = np.random.default_rng(1)
    points += 4 * rng.standard_normal((40, 8), dtype=np.float32)[rng.integers(40, size=len(points))]
    on_device = jnp.asarray(points)
    own, theirs = [], []
    for seed in range(config.seeds):
        result = kmeans(jax.random.key(seed), on_device, 64, iterations=20)
        own.append(float(result.objective[-1]))
        settings: dict[str, Any] = {"n_init": 1, "max_iter": 20, "tol": 0.0}
        fitted = KMeans(64, random_state=seed, **settings).fit(points)
        assert fitted.inertia_ is not None
        theirs.append(float(fitted.inertia_) / len(points))
    return statistics.mean(own) / statistics.mean(theirs)


def model_shapes(name: str) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Kernels of a model, codewords and iterations."""
    if name == "deit_tiny":
        block = {"qkv": (192, 576), "proj": (192, 192), "fc1": (192, 768), "fc2": (768, 192)}
        return {f"{i}/{leaf}": shape for i in range(12) for leaf, shape in block.items()}, 16, 50
    block = {
        "q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576),
        "gate": (576, 1536), "up": (576, 1536), "down": (1536, 576),
    }  # fmt: skip
    layers = {f"{i}/{leaf}": shape for i in range(30) for leaf, shape in block.items()}
    return {"embedding": (49152, 576), **layers}, 256, 20


def whole_model(name: str) -> dict[str, float]:
    """Encodes all kernels of a model, compilation included."""
    shapes, codewords, iterations = model_shapes(name)
    rng = np.random.default_rng(0)
    params = {
        leaf: 0.02 * jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
        for leaf, shape in shapes.items()
    }
    plan = make_plan(params, [(".*", SignSplit(codewords=codewords, dim=8, iterations=iterations))])
    lasted = seconds(
        lambda: jax.block_until_ready(plan.init(jax.random.key(0), params, progress=True))
    )
    return {"seconds": lasted, "peak_gb": memory("VmHWM") / 1e3}


def extra_memory(size: Size, config: Config) -> float:
    """Peak memory of a run beyond what was there before, in MB: tiles, copies, codes, seeding."""
    points, start = (jnp.asarray(part) for part in size.problem(config.data))
    ours(points[: 2**18], start, 1)  # what every run needs: compiler, threads
    key = jax.random.key(0)
    runs: list[Callable[[], Any]] = [
        lambda: ours(points, start, 2),
        lambda: kmeans(key, points, 16, iterations=1),  # with seeding
    ]
    found = []
    for run in runs:
        # The peak begins anew.
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = memory("VmRSS")
        run()
        found.append(memory("VmHWM") - before)
    return max(found)


def memory(field: str) -> float:
    """A line of this process's status, in MB."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3


def in_child(part: str, config: Config) -> Any:
    """Runs a part in a process of its own, for its own peak memory and compilations."""
    command = [sys.executable, __file__, "--part", part, "--data", config.data]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config) -> None:
    warnings.simplefilter("ignore")
    if config.part:
        kind, _, what = config.part.partition(":")
        print(json.dumps(
            extra_memory(Size(what), config) if kind == "memory" else whole_model(what)
        ))  # fmt: skip
        return
    threads = os.cpu_count() or 1
    faiss.omp_set_num_threads(threads)
    table = Table(title=f"one Lloyd iteration, {threads} threads, ms", show_lines=True)
    for column in ("n x d x k", "ours", "faiss", "scikit-learn", "matrix product", "ours / faster"):
        table.add_column(column, justify="right", no_wrap=True)
    names = ("faiss", "sklearn", "matmul")
    figures: dict[str, Any] = {f"time_ratio_to_{name}": {} for name in names}
    figures |= {"objective_ratio_to_faiss": {}, "seconds": {}, "peak_extra_mb": 0.0}
    with threadpool_limits(threads):
        for text in config.sizes:
            found = compare(Size(text), config)
            for name in names:
                figures[f"time_ratio_to_{name}"][text] = round(found["ours"] / found[name], 4)
            figures["seconds"][text] = {name: round(found[name], 5) for name in ("ours", *names)}
            ratio = found["objective_ours"] / found["objective_faiss"]
            figures["objective_ratio_to_faiss"][text] = round(ratio, 7)
            extra = in_child(f"memory:{text}", config)
            figures["peak_extra_mb"] = round(max(figures["peak_extra_mb"], extra), 1)
            row = [1e3 * found[name] for name in ("ours", *names)]
            best = min(found["faiss"], found["sklearn"])
            table.add_row(text, *(f"{each:.2f}" for each in row), f"{found['ours'] / best:.2f}")
            print(
                f"{text}: objective {ratio:.6f} of faiss's, extra memory {extra:.0f} MB", flush=True
            )
        figures["seeding_objective_ratio_to_sklearn"] = round(seedings(config), 5)
    Console(width=110).print(table)
    print(f"own seeding / scikit-learn's: {figures['seeding_objective_ratio_to_sklearn']:.4f}")
    if config.models:
        for name in ("deit_tiny", "llama_135m"):
            figures[name] = in_child(f"model:{name}", config)
            print(f"{name}: {figures[name]['seconds']:.1f} s, {figures[name]['peak_gb']:.2f} GB")
    print(json.dumps(figures))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
