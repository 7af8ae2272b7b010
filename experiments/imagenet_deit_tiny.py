"""The paper's own setting: DeiT-tiny on ImageNet at 21x (arXiv 2503.08668), for a TPU or GPUs.

    python experiments/imagenet_deit_tiny.py --data-dir DIR --bfloat16 --workers 16
    python experiments/imagenet_deit_tiny.py --data-dir DIR --sample   # 20 steps: does it run?
    python experiments/imagenet_deit_tiny.py --quick                   # 2 steps on made-up images

The first command is the experiment: DIR holds TensorFlow Datasets' `imagenet2012` as array_record,
the weights come from the Hugging Face hub (pip install -e '.[hub]') or a file (--weights). All
devices of the machine share each batch. Stop it whenever you like: the same command goes on, within
a run too. Checkpoints and metrics are in runs/imagenet_deit_tiny, as `ssvq finetune` keeps them.

From the paper: 21x, AdamW, cosine, 10 epochs, no distillation, freezing every 500 updates. Not
told there, so ours, and not tuned at this size: batches of 1,024, learning rates and clipping (the
library's), thresholds, random crops and mirroring, what is left dense or int8 (the presets).

Nothing of this has been measured here. According to secondary sources the paper reports for
DeiT-tiny at 21x: VQ and fixed signs about 47 % top-1, learned signs 54 %, with freezing 59 to 62 %;
the float network has 72.2 %. `--sample` begins with random weights: it proves that all of it runs
(about 2 minutes on two cores), and is no result.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from efficientnet_float import make_up_images
from tables import Rows, percent
from units import ROOT, Options, Results, Unit, work

from ssvq_jax.cli.finetune import FinetuneCommand
from ssvq_jax.cli.session import carry_out
from ssvq_jax.cli.setup import Setup, set_up
from ssvq_jax.cli.weights import open_plan
from ssvq_jax.models import LoadedModel, create
from ssvq_jax.models.hub import fetch_from_hub, is_hub_id, weight_files
from ssvq_jax.report.pages import markdown_table
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig

NAME = "imagenet_deit_tiny"
MODEL = "deit_tiny"
TRAIN_IMAGES = 1_281_167
METHODS: Mapping[str, tuple[str, bool]] = {  # preset, and whether signs freeze
    "vq": ("vq-21x", False),
    "mvq": ("mvq-21x", False),
    "ssvq-fixed": ("ssvq-fixed-21x", False),
    "ssvq": ("ssvq-21x", False),
    "ssvq-freeze": ("ssvq-21x", True),
}
LABELS = {
    "vq": "VQ",
    "mvq": "MVQ",
    "ssvq-fixed": "SSVQ, fixed signs",
    "ssvq": "SSVQ, no freezing",
    "ssvq-freeze": "SSVQ, freezing",
}
PROOF = "proof that it runs, with random weights; no result"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings.

    Attributes:
        weights: of the float network: owner/name on the Hugging Face hub, or a file.
        methods: methods to run.
        data: data set to train on; labels are ImageNet's.
        train_split: part to train on.
        eval_split: part to judge by; nothing is chosen by it.
        epochs: passes over the training images.
        batch_size: images an update, of all devices together.
        augment: what training does to images.
        optimizer: rates and freezing.
        bfloat16: activations in 16 bits; weights and sums stay float32.
        workers: processes that load images.
        steps: updates, if not those of the epochs.
        validate_every: updates between two validations; by default a tenth of the run.
        sample: 20 steps of 16 images of `imagenet_sample` with random weights.
    """

    seeds: tuple[int, ...] = (0,)
    weights: str | None = "timm/deit_tiny_patch16_224.fb_in1k"
    methods: tuple[str, ...] = tuple(METHODS)
    data: str = "imagenet2012"
    train_split: str = "train"
    eval_split: str = "validation"
    epochs: int = 10
    batch_size: int = 1024
    augment: str = "imagenet"
    optimizer: Annotated[OptimizerConfig, tyro.conf.AvoidSubcommands] = dataclasses.field(
        default_factory=lambda: OptimizerConfig(freeze=FreezeConfig(every=500))
    )
    bfloat16: bool = False
    workers: int = 0
    steps: int | None = None
    validate_every: int | None = None
    sample: bool = False


def proof(config: Config) -> Config:
    """The settings of ``--sample``, and of ``--quick`` but for its images."""
    changes: dict[str, Any] = {
        "weights": None,
        "methods": ("ssvq-freeze",),
        "data": "imagenet_sample",
        "train_split": "train[:90%]",
        "eval_split": "train[90%:]",
        "steps": 20,
        "validate_every": 5,
        "batch_size": 16,
        "optimizer": dataclasses.replace(config.optimizer, freeze=FreezeConfig(every=5)),
    }
    return dataclasses.replace(config, **changes)


def steps_of(config: Config) -> int:
    """Updates of a run."""
    if config.steps is not None:
        return config.steps
    return config.epochs * TRAIN_IMAGES // config.batch_size


def optimizer_of(config: Config, method: str) -> OptimizerConfig:
    """Rates of a method: all have the same."""
    freeze = config.optimizer.freeze if METHODS[method][1] else None
    return dataclasses.replace(config.optimizer, freeze=freeze)


def weight_file(weights: str | None) -> Path | None:
    """Brings the float network's weights, if they are on the hub."""
    if weights is None or Path(weights).exists() or not is_hub_id(weights):
        return None if weights is None else Path(weights)
    return weight_files(fetch_from_hub(weights))[0]


def open_run(config: Config, method: str, seed: int, out: Path) -> Setup[FinetuneCommand]:
    """Opens what ``ssvq finetune`` would open, with the dtype of activations."""
    command = FinetuneCommand(
        model=MODEL,
        weights=weight_file(config.weights),
        classes=1000,
        data=config.data,
        data_dir=config.data_dir,
        train_split=config.train_split,
        eval_split=config.eval_split,
        workers=config.workers,
        seed=seed,
        batch_size=config.batch_size,
        augment=config.augment,
        recipe=METHODS[method][0],
        steps=steps_of(config),
        validate_every=config.validate_every,
        out=out,
    ).fill({"label_smoothing": 0.0, "average_decay": 0.0})
    setup = set_up(command, augment=config.augment, initial=config.weights is None)
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    return dataclasses.replace(setup, model=LoadedModel(MODEL, create(MODEL, dtype=dtype)))


def unit(config: Config, method: str, seed: int, runs: Path) -> Unit:
    """One method and seed, in a run folder of its own."""
    optimizer, steps = optimizer_of(config, method), steps_of(config)
    told, name = {"model": MODEL, "method": method, "seed": seed}, f"{MODEL} {method} seed {seed}"
    names = ("weights", "train_split", "eval_split", "batch_size", "augment", "bfloat16")
    settings = {
        **told,
        "recipe": METHODS[method][0],
        **{name: getattr(config, name) for name in names},
        "data": Path(config.data).name,
        "steps": steps,
        "optimizer": dataclasses.asdict(optimizer),
    }

    def run() -> dict[str, Any]:
        setup = open_run(config, method, seed, runs / name.replace(" ", "_"))
        plan = open_plan(setup.options.recipe, setup.weights)
        asked = setup.config(
            "finetune",
            recipe=plan.to_json()["recipe"],
            optimizer=dataclasses.asdict(optimizer),
            bfloat16=config.bfloat16,
        )
        found = carry_out(setup, asked, plan, steps=steps, optimizer=optimizer, label=name)
        records = MetricsFile(setup.options.out / "metrics.jsonl").read(name)
        kept = ("bits_per_weight", "compression_ratio", "stored_bytes", "file_bytes", "file_ratio")
        return {
            **told,
            **{key: found[key] for key in kept if key in found},
            "accuracy_before": found["before"]["accuracy"],
            "accuracy": found["after"]["accuracy"],
            "loss": found["after"]["loss"],
            "examples": found["after"]["examples"],
            **found["signs"],
            "losses": {record["step"]: record["loss"] for record in _thinned(records)},
            "seconds_by_part": {k: round(x, 1) for k, x in found["seconds_by_part"].items()},
            **({"note": PROOF} if config.weights is None else {}),
        }

    return Unit(name, settings, run)


def _thinned(records: list[dict[str, Any]], most: int = 100) -> list[dict[str, Any]]:
    """About so many records, the last among them."""
    return records[:: -max(len(records) // most, 1)][::-1]


def tables(rows: Rows) -> dict[str, str]:
    """A table of the rows, by method."""
    lines = []
    for method, label in LABELS.items():
        own = [row for row in rows if row["method"] == method]
        if own:
            bits = f"{own[0]['bits_per_weight']:.3f}"
            ratio = f"{own[0]['compression_ratio']:.1f}x"
            accuracies = [percent(own, key) for key in ("accuracy_before", "accuracy")]
            lines.append([label, bits, ratio, *accuracies])
    columns = ["method", "bits/weight", "ratio", "top-1 before, %", "after, %"]
    return {f"{NAME} table": markdown_table(columns, lines)}


def compare(config: Config, results: Results, runs: Path) -> Rows:
    """Runs what has no row yet."""
    units = [unit(config, method, seed, runs) for seed in config.seeds for method in config.methods]
    return work(units, results, config)


def main(config: Config) -> None:
    name = f"{NAME}_sample" if config.sample else NAME
    results, runs = config.results(name), ROOT / "runs" / name
    if config.only_report:
        rows = results.rows()
    elif config.quick:
        with tempfile.TemporaryDirectory() as place:
            images = Path(place) / "images"
            images.mkdir()
            make_up_images(images / "0")
            changes = {"data": str(images), "steps": 2, "batch_size": 4}
            rows = compare(
                dataclasses.replace(proof(config), **changes), results, Path(place) / "runs"
            )
    else:
        rows = compare(proof(config) if config.sample else config, results, runs)
    for text in tables(rows).values():
        print(f"\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Config))
