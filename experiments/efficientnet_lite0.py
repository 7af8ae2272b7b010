"""EfficientNet-Lite0 with its ImageNet weights at 18x: VQ, MVQ and SSVQ.

    ssvq models fetch efficientnet_lite0
    python experiments/efficientnet_lite0.py --data-dir DIR  # imagenet_sample
    python experiments/efficientnet_lite0.py --data FOLDER   # images of yours, no labels
    python experiments/efficientnet_lite0.py --quick         # SSVQ, random weights, made-up images

Pointwise kernels have 1.75 bits a weight and codebooks, one for some 200,000 to 450,000 weights;
depthwise ones, stem and classifier are int8 for every method, batch norm and biases float. Every
method gets the same draws of learning rates, judged by the divergence from the float network on
validation images, then three seeds, judged on images that nothing was chosen by. 8 to 12 minutes
a unit on one core, 21 units. Results of a folder go to runs/.
The sample holds images that the network was trained on: nothing here is accuracy on ImageNet.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tyro
from compression_tuning import draw
from efficientnet_float import MODEL, SAMPLE, Float, make_up_images, open_float
from search import reported, search_and_report
from tables import Rows, mean_and_deviation, percent
from units import PAGE, ROOT, Options, Results, Unit, work

import ssvq_jax as ssvq
from ssvq_jax.plan import Plan, make_plan
from ssvq_jax.quantizers import Quantizer, to_json
from ssvq_jax.report.pages import insert, markdown_table
from ssvq_jax.training.finetune import Finetuned, finetune
from ssvq_jax.training.objective import Objective, Teacher
from ssvq_jax.training.optimizer import OptimizerConfig
from ssvq_jax.training.run import RunOptions, Task
from ssvq_jax.tree import PyTree

NAME = MODEL
LABELS = {"vq": "VQ", "mvq": "MVQ", "ssvq-freeze": "SSVQ, freezing"}
BITS = 1.75  # nominal: codes, signs, choices of kept weights
# 3 of 8: a third less error than 2 of 8 (with 512 codewords), before any training.
QUANTIZERS: Mapping[str, Quantizer] = {
    "vq": ssvq.Vector(codewords=128, dim=4),
    "mvq": ssvq.Masked(codewords=256, dim=8, keep=3, group=8),
    "ssvq-freeze": ssvq.SignSplit(codewords=64, dim=8),
}
SHARES = {
    "blocks_0_to_3": r"blocks_[0-3]_\d+/(expand|project)/conv/kernel",
    "blocks_4": r"blocks_4_\d+/(expand|project)/conv/kernel",
    **{f"blocks_5_{i}": rf"blocks_5_{i}/(expand|project)/conv/kernel" for i in range(4)},
    "expand_6": "blocks_6_0/expand/conv/kernel",
    "project_6": "blocks_6_0/project/conv/kernel",
    "final": "final/conv/kernel",
}
BATCH_NORM_BATCHES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings.

    Attributes:
        data: a folder of images, with or without sub-folders, for the sample of ImageNet.
        weights: file of the published weights; by default what was fetched.
        methods: methods to compare.
        trials: draws of learning rates a method.
        steps: updates of a fine-tuning.
        batch_size: images an update.
    """

    data: Path | None = None
    weights: Path | None = None
    methods: tuple[str, ...] = tuple(QUANTIZERS)
    trials: int = 4
    steps: int = 100
    batch_size: int = 16


def plan_of(method: str, params: PyTree) -> Plan:
    """The plan of a method; shapes of the parameters will do."""
    int8 = ssvq.Rule(r"(stem/conv|classifier|blocks_.*/depthwise/conv)/kernel", ssvq.Uniform(8))
    shared = [ssvq.Rule(path, QUANTIZERS[method], share=name) for name, path in SHARES.items()]
    return make_plan(params, [int8, *shared, ssvq.Rule(".*", None)])


def optimizer_of(method: str, trial: int, trials: int, steps: int) -> OptimizerConfig:
    """A draw of `compression_tuning`, with 20 freezing steps in a run of any length."""
    drawn = draw(method, trial, trials)
    freeze = drawn.freeze and dataclasses.replace(drawn.freeze, every=max(steps // 20, 1))
    return dataclasses.replace(drawn, freeze=freeze)


def unit(config: Config, stage: str, method: str, seed: int, trial: int) -> Unit:
    """One fine-tuning; the part to report is read in the stage "report" alone."""
    optimizer = optimizer_of(method, trial, config.trials, config.steps)
    size = 64 if config.quick else 224
    told = {"model": MODEL, "method": method, "bits": BITS, "seed": seed}
    settings = {
        "stage": stage,
        **told,
        "trial": trial,
        "quantizer": to_json(QUANTIZERS[method]),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "batch_norm_batches": BATCH_NORM_BATCHES,
        "image_size": size,
        "data": SAMPLE if config.data is None else config.data.name,
        "optimizer": dataclasses.asdict(optimizer),
    }
    name = f"{MODEL} {method} " + (f"trial {trial} " if stage == "tuning" else "") + f"seed {seed}"

    def run() -> dict[str, Any]:
        net = open_float(config.weights, config.data, config.data_dir, size, quick=config.quick)
        plan = plan_of(method, net.params)
        task = Task(
            net.forward,
            lambda seed: net.train(config.batch_size, seed),
            lambda: net.images(1),
            Objective(distill=1.0),
            Teacher(net.forward, net.params, net.state),
        )
        done = finetune(
            task,
            plan,
            net.params,
            key=jax.random.key(seed),
            seed=seed,
            steps=config.steps,
            optimizer=optimizer,
            name=name,
            model_state=net.state,
            options=RunOptions(batch_norm_batches=BATCH_NORM_BATCHES),
        )
        return {**told, **figures(net, plan, done, test=stage == "report")}

    return Unit(name, settings, run)


def figures(net: Float, plan: Plan, done: Finetuned, *, test: bool) -> dict[str, Any]:
    """What a row tells of a run."""
    bits, last = plan.bits(), done.records[-1]
    row: dict[str, Any] = {
        "bits_per_weight": bits.main.bits_per_weight,
        "compression_ratio": bits.main.compression_ratio,
        "stored_bytes": bits.stored_bytes,
        "stored_ratio": bits.file_ratio,
        "agreement_before": done.before.accuracy,
        **{key: last[key] for key in ("flipped", "frozen") if key in last},
        "seconds_by_part": {part: round(taken, 1) for part, taken in done.seconds.items()},
    }
    params, state = done.packed.decode(), done.state.model_state
    for part, name in enumerate(("validation", "test")[: 1 + test], start=1):
        agreement, divergence, examples = net.judge(params, state, part)
        row |= {f"agreement_{name}": agreement, f"divergence_{name}": divergence}
        row["examples"] = examples
    return row


def tables(rows: Rows) -> dict[str, str]:
    """The table of the page, from the rows of all units."""
    lines, found = [], []
    for method, label in LABELS.items():
        own = reported(rows, method)
        if not own:
            continue
        first, found = own[0], own
        lines.append(
            [
                label,
                f"{first['bits_per_weight']:.3f}",
                f"{first['compression_ratio']:.1f}x",
                f"{first['stored_ratio']:.1f}x",
                *(percent(own, f"agreement_{when}") for when in ("before", "validation", "test")),
                mean_and_deviation([row["divergence_test"] for row in own], 3),
            ]
        )
    columns = ["method", "bits/weight", "ratio", "whole model", "before", "validation", "test"]
    text = markdown_table([*columns, "KL, test"], lines)
    if found:
        told = found[0]["settings"]
        text += (
            f"\n\nImages of which the float network's first class is the compressed one's, in %, "
            f"and KL(float, compressed) in nats, on {found[0]['examples']} images; mean ± standard "
            f"deviation of {len(found)} seeds; {told['steps']} updates of {told['batch_size']} "
            "images, taught by the float network."
        )
    return {f"{NAME} table": text}


def compare(config: Config, results: Results) -> Rows:
    """Runs the draws, then the best ones with all seeds."""
    if config.quick:
        return work(
            [unit(config, "report", name, 0, 0) for name in config.methods[-1:]], results, config
        )
    return search_and_report(
        functools.partial(unit, config),
        config.methods,
        config.trials,
        "divergence_validation",
        results,
        config,
    )


def main(config: Config) -> None:
    if config.data is not None and config.out is None:
        out = ROOT / "runs" / f"{NAME}_{config.data.name}.json"
        config = dataclasses.replace(config, out=out)
    results = config.results(NAME)
    if config.only_report:
        rows = results.rows()
    elif config.quick:
        with tempfile.TemporaryDirectory() as place:
            images = make_up_images(Path(place) / "made-up")
            rows = compare(dataclasses.replace(config, data=images, steps=2, batch_size=4), results)
    else:
        rows = compare(config, results)
    for name, text in tables(rows).items():
        print(f"\n{text}")
        if results.of_page and f"<!-- {name}: begin -->" in PAGE.read_text(encoding="utf-8"):
            insert(PAGE, name, text)


if __name__ == "__main__":
    main(tyro.cli(Config))
