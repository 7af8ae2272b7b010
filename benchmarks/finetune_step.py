"""Cost of fine-tuning signs and codebooks against fine-tuning the float model, in one process.

    python benchmarks/finetune_step.py [--model deit_tiny --batch 16 --rounds 15]

Both sides take full training steps (decode, forward, backward, AdamW) on the same batch, in turn,
so that a slow moment of the machine hits both. The last line is one JSON object: the ratio of the
medians, bytes of freezing state a latent weight on top of the inner optimizer's, and how often the
step was traced over a run in which signs freeze.
"""

import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax
import tyro

from ssvq_jax import freeze_signs, load_recipe, make_plan, split
from ssvq_jax.models import create
from ssvq_jax.plan import Plan
from ssvq_jax.training.freezing import FreezeState
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig, make_optimizer
from ssvq_jax.training.step import linen_forward, make_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark.

    Attributes:
        model: name in the registry.
        recipe: what is compared with float.
        batch: images a step.
        rounds: timed steps of each side.
    """

    model: str = "deit_tiny"
    recipe: str = "ssvq-21x"
    batch: int = 16
    rounds: int = 15


class Side:
    """One of the two training runs."""

    def __init__(self, model: Any, plan: Plan, params: Any, optimizer: OptimizerConfig) -> None:
        self.traces = 0
        forward = linen_forward(model)

        def counted(params: Any, model_state: Any, images: Any, key: Any) -> Any:
            self.traces += 1  # Python runs once a trace
            return forward(params, model_state, images, key)

        tx = make_optimizer(plan, 1000, optimizer)
        variables = plan.init(jax.random.key(0), params)
        self.state = make_state(counted, variables, tx, jax.random.key(1))
        self.step = make_train_step(plan)

    def time(self, batch: dict[str, Any]) -> float:
        """Takes one step; returns its seconds."""
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.step(self.state, batch))
        return time.perf_counter() - start


def main(config: Config) -> None:
    model = create(config.model)
    size, classes = model.config.image_size, model.config.classes
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.normal(size=(config.batch, size, size, 3)).astype(np.float32),
        "label": generator.integers(classes, size=config.batch).astype(np.int32),
    }
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])["params"]
    plan = make_plan(params, load_recipe(config.recipe))
    # Signs may freeze at every third step, so that the timed steps hold freezing steps too.
    freeze = FreezeConfig(every=3, start=1e-3, end=1e-4, warmup_share=0.0)
    sides = {
        "float": Side(model, make_plan(params, [(".*", None)]), params, OptimizerConfig()),
        config.recipe: Side(model, plan, params, OptimizerConfig(sign=1e-2, freeze=freeze)),
    }
    for name, side in sides.items():
        print(f"{name:12} first step, compilation included: {side.time(batch):.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(config.rounds):
        for name, side in sides.items():
            seconds[name].append(side.time(batch))
    for name, times in seconds.items():
        spread = f"{min(times):.3f} - {max(times):.3f}"
        print(f"{name:12} median {statistics.median(times):.3f} s a step ({spread})")
    compressed = sides[config.recipe]
    state = compressed.state.opt_state
    if not isinstance(state, FreezeState):
        raise TypeError(f"the optimizer state is a {type(state).__name__}")
    weights = sum(mask.size for mask in state.frozen.values())
    frozen = sum(int(mask.sum()) for mask in state.frozen.values())
    print(f"{weights:,} sign latents, {frozen:,} of them frozen after {config.rounds + 1} steps")
    ratio = statistics.median(seconds[config.recipe]) / statistics.median(seconds["float"])
    figures = {
        "finetune_step_time_ratio": round(ratio, 4),
        "freeze_state_bytes_per_weight": round(state_bytes(plan, params) / weights, 6),
        "traces": compressed.traces,
    }
    print(json.dumps(figures))


def state_bytes(plan: Plan, params: Any) -> int:
    """Bytes that freezing adds to an inner optimizer's state."""
    learned, _ = split(jax.eval_shape(plan.init, jax.random.key(0), params))
    inner = optax.adam(1e-3)

    def size(tx: optax.GradientTransformation) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, learned))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return size(freeze_signs(inner, every=1, threshold=0.1)) - size(inner)


if __name__ == "__main__":
    main(tyro.cli(Config))
