"""What checkpoints cost a run, and what it takes to go on, in one process.

    python benchmarks/checkpoint.py [--model deit_tiny --batch 16 --rounds 5]

A round takes some training steps without a save, then as many with one that is written in the
background meanwhile; the difference is all that a save costs, and it falls due once an interval
(60 s by default). Resuming is timed from an open process to a state that is ready to train:
shapes of the state, opening the folder, reading the arrays. Import is timed in fresh processes.
The last line is one JSON object.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ssvq_jax import load_recipe, make_plan
from ssvq_jax.models import create
from ssvq_jax.training.checkpoint import SAVE_SECONDS, Checkpoints
from ssvq_jax.training.checksums import leaf_checksums
from ssvq_jax.training.layout import local_layout
from ssvq_jax.training.named_leaves import named_leaves
from ssvq_jax.training.optimizer import OptimizerConfig, make_optimizer
from ssvq_jax.training.step import CompressionState, linen_forward, make_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Attributes:
        model: name in the registry.
        recipe: what is trained.
        batch: images a step.
        steps: steps of each side of a round; they should outlast the writing.
        rounds: rounds to take the median of.
    """

    model: str = "deit_tiny"
    recipe: str = "ssvq-21x"
    batch: int = 16
    steps: int = 4
    rounds: int = 5


def main(config: Config) -> None:
    model = create(config.model)
    size, classes = model.config.image_size, model.config.classes
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.normal(size=(config.batch, size, size, 3)).astype(np.float32),
        "label": generator.integers(classes, size=config.batch).astype(np.int32),
    }
    layout = local_layout(1)
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])["params"]
    plan = make_plan(params, load_recipe(config.recipe))
    tx = make_optimizer(plan, 1000, OptimizerConfig())

    def begin(params: Any) -> CompressionState:
        variables = plan.init(jax.random.key(0), params)
        return make_state(linen_forward(model), variables, tx, jax.random.key(1))

    state = layout.place(begin(params))
    step = make_train_step(plan, layout=layout)
    state, _ = jax.block_until_ready(step(state, batch))
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(f"{config.model}: {megabytes:.0f} MB of training state")

    def steps(state: CompressionState) -> tuple[CompressionState, float]:
        start = time.perf_counter()
        for _ in range(config.steps):
            state, _ = step(state, batch)
        return jax.block_until_ready(state), time.perf_counter() - start

    leaf_checksums(named_leaves(state))  # compiles
    start = time.perf_counter()
    leaf_checksums(named_leaves(state))
    checksums = time.perf_counter() - start
    without, with_save, calls, writes = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            for number in range(config.rounds):
                state, seconds = steps(state)
                without.append(seconds)
                start = time.perf_counter()
                checkpoints.due(number)
                checkpoints.save(number, state, plan, data={"batches": number}, notes={})
                calls.append(time.perf_counter() - start)
                state, seconds = steps(state)
                with_save.append(calls[-1] + seconds)
                checkpoints.wait()
                writes.append(time.perf_counter() - start)
        start = time.perf_counter()
        template = layout.shapes(jax.eval_shape(begin, params))
        with Checkpoints(folder) as checkpoints:
            restored = jax.block_until_ready(checkpoints.restore(template, plan).state)
        resume = time.perf_counter() - start
    if int(restored.step) != int(state.step) - config.steps:
        raise RuntimeError(f"resumed at step {restored.step}")
    usual, call = statistics.median(without), statistics.median(calls)
    extra = statistics.median(b - a for a, b in zip(without, with_save, strict=True))
    print(f"{config.steps} steps: {usual:.2f} s; with a save {usual + extra:.2f} s")
    print(f"checksums of all leaves, in the call of save: {checksums:.3f} s")
    print(f"the call of save returns after {call:.3f} s; written after {max(writes):.2f} s or less")
    figures = {
        "save_blocking_share": round(max(extra, call) / SAVE_SECONDS, 4),
        "save_call_s": round(call, 3),
        "checksum_s": round(checksums, 3),
        "save_extra_s": round(extra, 3),
        "step_s": round(usual / config.steps, 3),
        "resume_s": round(resume, 2),
        "import_s": round(statistics.median(import_seconds() for _ in range(3)), 2),
    }
    print(json.dumps(figures))


def import_seconds() -> float:
    """Seconds of ``import ssvq_jax`` in a fresh process, the start of Python not counted."""
    code = "import time; t = time.perf_counter(); import ssvq_jax; print(time.perf_counter() - t)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(found.stdout)


if __name__ == "__main__":
    main(tyro.cli(Config))
