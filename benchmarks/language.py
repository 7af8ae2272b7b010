"""What calibrating and compressing a language model takes: time and memory, part by part.

    ssvq models fetch smollm2_135m
    python benchmarks/language.py [--weights FILE.gguf --parts calibrate vq pyramid crvq]

SmolLM2-135M: moments of the inputs of its 210 kernels over 16 windows of 512 random tokens; VQ
(k = 256, d = 8) of all kernels, CRVQ of them under these moments; and PVQ's encoding and decoding
of 2^21 weights in groups of 16 with 16 pulses, beside plain NumPy for the search. Every part runs
in a process of its own, for its own peak memory. The last line is one JSON object of the figures.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ssvq_jax as ssvq
from ssvq_jax.calibration import Moments, input_calibrations, input_moments
from ssvq_jax.models import fetch
from ssvq_jax.models.import_gguf import load_gguf
from ssvq_jax.models.import_llama import stack_layers
from ssvq_jax.models.llama import Llama
from ssvq_jax.plan import make_plan
from ssvq_jax.quantizers import Quantizer, pyramid

WINDOWS, TOKENS = 16, 512
GROUPS, DIM, PULSES = 2**17, 16, 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Attributes:
        weights: GGUF file; by default what was fetched.
        parts: which to run.
        part: run this one alone, here.
    """

    weights: Path | None = None
    parts: tuple[str, ...] = ("calibrate", "vq", "pyramid", "crvq")
    part: str | None = None


def model(config: Config) -> tuple[Llama, Any]:
    """The published model, layers stacked, and its parameters."""
    found = load_gguf(config.weights or fetch("smollm2_135m"))
    params = jax.device_put(stack_layers(found.variables)["params"])
    return Llama(found.config, scan=True), params


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def rules(quantizer: Quantizer) -> list[Any]:
    """All kernels of the layers."""
    return [ssvq.Rule("layers/.*/kernel", quantizer, stacked=1), (".*", None)]


def read_moments(llama: Llama, params: Any) -> Moments:
    """Moments of all kernels' inputs."""
    plan = make_plan(params, rules(ssvq.Vector(256, 8)))
    random = np.random.default_rng(0)
    shape = (WINDOWS, 1, TOKENS)
    batches = jnp.asarray(random.integers(0, llama.config.vocab, shape), jnp.int32)

    def forward(params: Any, tokens: Any) -> Any:
        return llama.apply({"params": params}, tokens)

    return input_moments(forward, params, plan, batches)


def calibrate(config: Config) -> dict[str, float]:
    """Reading the moments, compilation included."""
    llama, params = model(config)
    return {"calibration_seconds": seconds(lambda: read_moments(llama, params).inputs)}


def compress(
    config: Config, quantizer: Quantizer, name: str, calibrated: bool = False
) -> dict[str, float]:
    """Encoding of the whole model, compilation included, the reading of moments not."""
    llama, params = model(config)
    plan = make_plan(params, rules(quantizer))
    given = None
    if calibrated:
        given = input_calibrations(plan, read_moments(llama, params).inputs)
    key = jax.random.key(0)
    return {f"{name}_seconds": seconds(lambda: plan.init(key, params, given, progress=True))}


def best_of(function: Callable[[], Any], rounds: int = 3) -> float:
    """The least wall time, after a call that compiles."""
    jax.block_until_ready(function())
    return min(seconds(function) for _ in range(rounds))


def pyramids(config: Config) -> dict[str, float]:
    """PVQ's search, index and decoding, in million weights a second."""
    del config
    random = np.random.default_rng(0)
    groups = jnp.asarray(random.normal(size=(GROUPS, DIM)), jnp.float32)
    encode = jax.jit(lambda x: pyramid.index(pyramid.nearest(x, PULSES), PULSES))
    decode = jax.jit(lambda words: pyramid.point(words, DIM, PULSES))
    nearest = jax.jit(lambda x: pyramid.nearest(x, PULSES))
    words, weights = encode(groups), GROUPS * DIM / 1e6
    few = np.asarray(groups[: GROUPS // 8])
    plain = seconds(lambda: search(few)) * 8
    searched = best_of(lambda: nearest(groups))
    return {
        "pvq_encode_million_weights_per_second": weights / best_of(lambda: encode(groups)),
        "pvq_decode_million_weights_per_second": weights / best_of(lambda: decode(words)),
        "pvq_search_time_ratio_to_numpy": searched / plain,
    }


def search(groups: np.ndarray) -> np.ndarray:
    """The greedy search in plain NumPy, vectorised over the groups."""
    size = np.abs(groups)
    points = np.floor(PULSES * size / size.sum(1, keepdims=True)).astype(np.int32)
    rows = np.arange(len(groups))
    while (missing := points.sum(1) < PULSES).any():
        product, square = (points * size).sum(1), (points**2).sum(1)
        gain = (product[:, None] + size) ** 2 / (square[:, None] + 2 * points + 1)
        points[rows[missing], gain[missing].argmax(1)] += 1
    return np.where(groups < 0, -points, points)


PARTS: dict[str, Callable[[Config], dict[str, float]]] = {
    "calibrate": calibrate,
    "vq": lambda config: compress(config, ssvq.Vector(256, 8), "vq"),
    "pyramid": pyramids,
    "crvq": lambda config: compress(config, ssvq.ChannelRelaxed(), "crvq", calibrated=True),
}


def in_child(part: str, config: Config) -> dict[str, float]:
    """Runs a part in a process of its own."""
    command = [sys.executable, __file__, "--part", part]
    if config.weights is not None:
        command += ["--weights", str(config.weights)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config) -> None:
    unknown = sorted(set(config.parts) - set(PARTS))
    if unknown:
        raise SystemExit(f"parts={unknown}: choose of {', '.join(PARTS)}")
    if config.part:
        found = PARTS[config.part](config)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({**found, f"{config.part}_peak_gb": peak}))
        return
    figures: dict[str, float] = {}
    for part in config.parts:
        found = {name: round(value, 4) for name, value in in_child(part, config).items()}
        print("\n".join(f"{name:<40} {value:,.3f}" for name, value in found.items()), flush=True)
        figures |= found
    print(json.dumps(figures))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
