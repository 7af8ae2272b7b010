"""Error feedback (GPTQ) of one layer against a plain PyTorch loop, in one process.

    python benchmarks/error_feedback.py [--rounds 5 --bits 4 --block 128]

Both sides get the same weight, moments of correlated inputs, steps a channel and damping, in
float32, each with its own default of threads, in turn; medians of as many rounds, ours compiled
before. The loop is the published algorithm: the Cholesky factor of the inverse of H, one input
channel after the other, errors passed on in blocks. "Output error" is trace(E^T H E) over
trace(W^T H W); "differing" is the share of levels that are not the same: one rounding that falls
the other way changes the targets of all later inputs. The last line is one JSON object.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from ssvq_jax import LeafSpec, Uniform
from ssvq_jax.calibration.rows import row_groups, walk

DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Attributes:
        sizes: inputs x outputs.
        bits: of a level.
        block: rows whose errors are passed on together.
        rounds: timings of each side, in turn; the median counts.
    """

    sizes: tuple[str, ...] = ("576x1536", "1536x576")
    bits: int = 4
    block: int = 128
    rounds: int = 5


def main(config: Config) -> None:
    method = Uniform(bits=config.bits)
    figures: dict[str, Any] = {}
    table = Table(title=f"GPTQ, {config.bits} bit a channel", title_justify="left")
    for name in (
        "layer",
        "ours ms",
        "PyTorch ms",
        "ratio",
        "nearest",
        "ours",
        "PyTorch",
        "differing",
    ):
        table.add_column(name, justify="right")
    for size in config.sizes:
        inputs, outputs = (int(n) for n in size.split("x"))
        weight, moments = layer(inputs, outputs)
        spec = LeafSpec("", weight.shape, "float32")
        encoded = method.init(jax.random.key(0), jnp.asarray(weight), spec)
        step = np.array(encoded.learned["step"].astype(jnp.bfloat16).astype(jnp.float32))
        ours = functools.partial(
            run, method, spec, config.block, jnp.asarray(weight), encoded.learned,
            jnp.asarray(moments),
        )  # fmt: skip
        given = torch.from_numpy(weight), torch.from_numpy(moments), torch.from_numpy(step)
        theirs = functools.partial(gptq, *given, method.range, config.block)
        seconds, base = in_turn(config.rounds, ours, theirs)
        values = [np.asarray(method.decode(*encoded, spec)), np.asarray(ours()), theirs().numpy()]
        whole = energy(weight, moments)
        errors = [energy(weight - x, moments) / whole for x in values]
        levels = [np.rint(x / step) for x in values[1:]]
        differing = float(np.mean(levels[0] != levels[1]))
        table.add_row(size, f"{1e3 * seconds:.0f}", f"{1e3 * base:.0f}", f"{base / seconds:.2f}",
                      *(f"{x:.5f}" for x in errors), f"{differing:.2%}")  # fmt: skip
        figures[size] = {
            "seconds": seconds, "torch_seconds": base, "speed_up": base / seconds,
            "error_nearest": errors[0], "error": errors[1], "torch_error": errors[2],
            "differing": differing,
        }  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    print(json.dumps({"bits": config.bits, "threads": torch.get_num_threads(), **figures}))


def layer(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the moments of inputs that share a few strong directions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * inputs, inputs))
    x += 2 * rng.normal(size=(len(x), 16)) @ rng.normal(size=(16, inputs))
    weight = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return weight.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    method: Uniform, spec: LeafSpec, block: int, weight: Any, learned: Any, moments: Any
) -> jax.Array:
    """Ours: what the weight becomes."""
    groups = row_groups(method, spec, (0,))
    found = walk(
        method, spec, groups, weight, learned, moments, jnp.float32(DAMPING),
        block=block, largest_first=False,
    )  # fmt: skip
    return found.values


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    step: torch.Tensor,
    bounds: tuple[float, float],
    block: int,
) -> torch.Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1) with inputs along the rows."""
    weight, count = weight.clone(), len(moments)
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(count)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    values = torch.zeros_like(weight)
    for start in range(0, count, block):
        stop = min(start + block, count)
        own, errors = weight[start:stop].clone(), torch.zeros_like(weight[start:stop])
        inner = factor[start:stop, start:stop]
        for i in range(stop - start):
            row = own[i]
            value = step * torch.clamp(torch.round(row / step), *bounds)
            error = (row - value) / inner[i, i]
            own[i:] -= torch.outer(inner[i, i:], error)
            values[start + i], errors[i] = value, error
        weight[stop:] -= factor[start:stop, stop:].T @ errors
    return values


def energy(rows: np.ndarray, moments: np.ndarray) -> float:
    rows = rows.astype(np.float64)
    return float(np.sum(rows * (moments.astype(np.float64) @ rows)))


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


if __name__ == "__main__":
    main(tyro.cli(Config))
