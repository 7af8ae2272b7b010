"""Trains the float transformer of the experiments on, taught by the float ResNet.

    python experiments/teach_baseline.py --weights runs/vit_cifar --data-dir DIR

The second half of what experiments/baselines/README.md says: as DeiT (arXiv 2012.12877), a vision
transformer learns from a convolutional network, which generalises better from so few images. Half
of the loss is the labels' cross-entropy, half the divergence from the teacher at temperature 2.
Writes experiments/baselines/vit_cifar.safetensors and prints its accuracy on the validation split.
About 40 minutes on one core; the same command goes on after a stop.
"""

import dataclasses
from pathlib import Path

import jax
import tyro
from protocol import BASELINES, NETWORKS, baseline, make_task
from units import ROOT

import ssvq_jax as ssvq
from ssvq_jax.cli.weights import open_weights
from ssvq_jax.models import create, load_model
from ssvq_jax.plan import make_plan
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.objective import Objective, Teacher
from ssvq_jax.training.optimizer import OptimizerConfig
from ssvq_jax.training.run import RunOptions
from ssvq_jax.training.step import linen_forward


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        weights: run of `ssvq train` to begin with.
        data_dir: where TensorFlow Datasets' sets are.
        out: folder for checkpoints and metrics.
        steps: updates of 128 images.
        rate: highest learning rate of AdamW.
    """

    weights: Path
    data_dir: Path | None = None
    out: Path = ROOT / "runs" / "vit_cifar_taught"
    steps: int = 7000
    rate: float = 7e-4


def main(config: Config) -> None:
    network = dataclasses.replace(NETWORKS["vit_cifar"], batch_size=128)
    found = open_weights(config.weights, load_model(network.model), (32, 32, 3))
    teacher = Teacher(linen_forward(create("resnet20_cifar")), *baseline("resnet20_cifar"))
    task = dataclasses.replace(
        make_task(network, config.data_dir),
        objective=Objective(distill=0.5, temperature=2.0),
        teacher=teacher,
    )
    plan = make_plan(found.params, [(".*", None)])
    config.out.mkdir(parents=True, exist_ok=True)
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        done = finetune(
            task,
            plan,
            found.params,
            key=jax.random.key(1),
            seed=1,
            steps=config.steps,
            optimizer=OptimizerConfig(dense=config.rate, weight_decay=0.05, freeze=None),
            name="taught",
            metrics=MetricsFile(config.out / "metrics.jsonl"),
            checkpoints=checkpoints,
            options=RunOptions(validate_every=config.steps // 7, average_decay=0.999),
        )
    print(f"validation: {100 * done.before.accuracy:.2f} %, then {100 * done.after.accuracy:.2f} %")
    packed = plan.finalize(done.state.variables, dense_dtype="float16")
    told = {"model": network.model, "data": "cifar10", "classes": 10, "normalization": "cifar10"}
    metrics = {"split": network.splits[1], **done.after._asdict()}
    ssvq.save(BASELINES / f"{network.model}.safetensors", packed, model=told, metrics=metrics)


if __name__ == "__main__":
    main(tyro.cli(Config))
