"""The protocol of the vision experiments: networks, methods at bit rates, one fine-tuning.

All methods get the same float network, data, batches, updates and kind of search. Sub-vectors run
along the output axis. Networks of a million weights would pay more for a codebook a kernel than for
its codes: kernels share one, so that some 100,000 to 400,000 weights use it, as in a layer of
DeiT-tiny, and all of them where it has more than 1,024 numbers. Ends of the network are int8 for
every method; norms, biases and positions stay float.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ssvq_jax as ssvq
from ssvq_jax import data
from ssvq_jax.models import create
from ssvq_jax.plan import Plan, make_plan
from ssvq_jax.quantizers import Quantizer
from ssvq_jax.recipe import Rule
from ssvq_jax.training.evaluation import make_evaluate
from ssvq_jax.training.finetune import Finetuned, finetune
from ssvq_jax.training.optimizer import OptimizerConfig
from ssvq_jax.training.run import Task
from ssvq_jax.training.step import linen_forward
from ssvq_jax.tree import PyTree

SIGN_FIGURES = ("flipped", "frozen", "oscillation")
BASELINES = Path(__file__).parent / "baselines"


@dataclasses.dataclass(frozen=True)
class Network:
    """A float network that is compressed, and its data.

    Attributes:
        model: name in the registry.
        images: the data and how training changes them.
        splits: to train on, to choose by, and to report.
        shares: patterns of the compressed leaves by the name of the codebook that they share.
        ends: pattern of the int8 leaves.
        steps: updates of a fine-tuning.
        batch_size: images an update.
    """

    model: str
    images: data.ImageData
    splits: tuple[str, str, str]
    shares: Mapping[str, str]
    ends: str
    steps: int = 3000
    batch_size: int = 32


_CIFAR = data.ImageData("cifar10", augment="cifar", normalization="cifar10")
_CIFAR_SPLITS = ("train[:90%]", "train[90%:]", "test")
NETWORKS: Mapping[str, Network] = {
    "vit_cifar": Network(
        "vit_cifar",
        _CIFAR,
        _CIFAR_SPLITS,
        {
            "qkv": r"blocks_\d+/attn/qkv/kernel",
            "proj": r"blocks_\d+/attn/proj/kernel",
            "fc1": r"blocks_\d+/mlp/fc1/kernel",
            "fc2": r"blocks_\d+/mlp/fc2/kernel",
        },
        r"(stem_\d+|patch_embed|head)/kernel",
        steps=1000,
    ),
    "resnet20_cifar": Network(
        "resnet20_cifar",
        _CIFAR,
        _CIFAR_SPLITS,
        {"blocks": r"layer.*/kernel"},
        r"(conv1|head)/kernel",
    ),
    # For --quick: comes with the package.
    "deit_digits": Network(
        "deit_digits",
        data.ImageData(data.EMBEDDED_NAME, augment="digits"),
        ("train", "validation", "test"),
        {"blocks": r"blocks_\d+/.*kernel"},
        r"(patch_embed|head)/kernel",
        steps=150,
    ),
}

# Numbers of a codebook above which there is one for all kernels: with 512 rows of 8 for each kind
# of kernel, VQ at 1.125 bits would have a tenth more.
_ONE_CODEBOOK = 128 * 8


def recipe(network: Network, quantizer: Quantizer) -> tuple[Rule, ...]:
    """The rules of a method for a network."""
    sizes = getattr(quantizer, "codewords", 0) * getattr(quantizer, "dim", 0)
    compressed = []
    for name, pattern in network.shares.items():
        share = None
        if sizes:
            share = f"{name}_codebook" if sizes <= _ONE_CODEBOOK else "codebook"
        compressed.append(Rule(pattern, quantizer, share=share))
    return (Rule(network.ends, ssvq.Uniform(bits=8)), *compressed, Rule(".*", None))


@functools.cache
def baseline(name: str) -> tuple[PyTree, PyTree]:
    """Float parameters and other collections of a network.

    Raises:
        SystemExit: if they were not trained.
    """
    file = BASELINES / f"{name}.safetensors"
    if not file.exists():
        raise SystemExit(f"{file} is missing: experiments/baselines/README.md says how to train it")
    model = create(name)
    config = model.config
    image = jax.ShapeDtypeStruct(
        (1, config.image_size, config.image_size, config.channels), jnp.float32
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    with ssvq.load(file, like=shapes["params"]) as stored:
        params, state = stored.decode(), stored.state() or {}
    widen = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    return widen(params), widen(state)


def make_task(network: Network, data_dir: Path | None, split: int = 1) -> Task:
    """A network and its data, judged on its validation split (1) or test split (2)."""
    images = dataclasses.replace(network.images, data_dir=data_dir)
    return Task(
        forward=linen_forward(create(network.model)),
        train_batches=lambda seed: images.train(network.splits[0], network.batch_size, seed=seed),
        eval_batches=lambda: images.evaluate(network.splits[split], 500),
    )


def plan_of(network: Network, quantizer: Quantizer, params: PyTree) -> Plan:
    """The plan of a method for a network."""
    return make_plan(params, recipe(network, quantizer))


def run_method(
    network: Network,
    quantizer: Quantizer,
    optimizer: OptimizerConfig,
    seed: int,
    *,
    data_dir: Path | None,
    test: bool,
    name: str,
    weights: Callable[[str], tuple[PyTree, PyTree]] = baseline,
) -> tuple[dict[str, Any], Finetuned]:
    """Compresses a float network and fine-tunes it; equal seeds see equal batches.

    Args:
        network: the network.
        quantizer: of its compressed leaves.
        optimizer: of the fine-tuning.
        seed: of the clustering and of the data's order.
        data_dir: where the data are.
        test: judge the result on the test split, too.
        name: label of the progress bar.
        weights: gives the float network.

    Returns:
        Figures of the run, and the run.
    """
    params, model_state = weights(network.model)
    plan = plan_of(network, quantizer, params)
    task = make_task(network, data_dir)
    done = finetune(
        task,
        plan,
        params,
        key=jax.random.key(seed),
        seed=seed,
        steps=network.steps,
        optimizer=optimizer,
        name=name,
        model_state=model_state,
    )
    bits, last = plan.bits(), done.records[-1]
    row: dict[str, Any] = {
        "bits_per_weight": bits.main.bits_per_weight,
        "compression_ratio": bits.main.compression_ratio,
        "stored_bytes": bits.stored_bytes,
        "stored_ratio": bits.file_ratio,
        "accuracy_before": done.before.accuracy,
        "accuracy_validation": done.after.accuracy,
        "loss_validation": done.after.loss,
        **{key: last[key] for key in SIGN_FIGURES if key in last},
        "seconds_by_part": {part: round(taken, 1) for part, taken in done.seconds.items()},
    }
    if test:
        judged = make_task(network, data_dir, split=2)
        found = make_evaluate(task.forward)(
            done.packed.decode(), done.state.model_state, judged.eval_batches()
        )
        row |= {"accuracy_test": found.accuracy, "loss_test": found.loss}
    return row, done


def judge_float(
    network: Network, weights: Callable[[str], tuple[PyTree, PyTree]], data_dir: Path | None
) -> dict[str, Any]:
    """Figures of the float network, under the names of `run_method`."""
    params, model_state = weights(network.model)
    row: dict[str, Any] = {"bits_per_weight": 32.0, "compression_ratio": 1.0, "stored_ratio": 1.0}
    for split, name in ((1, "validation"), (2, "test")):
        task = make_task(network, data_dir, split)
        found = make_evaluate(task.forward)(params, model_state, task.eval_batches())
        row |= {f"accuracy_{name}": found.accuracy, f"loss_{name}": found.loss}
    return row


def quick_baseline(data_dir: Path | None, steps: int = 2000) -> Callable[[str], Any]:
    """Trains the digits' float network for a moment, for ``--quick``."""
    network = NETWORKS["deit_digits"]

    @functools.cache
    def weights(name: str) -> tuple[PyTree, PyTree]:
        model = create(name)
        config = model.config
        image = jnp.zeros((1, config.image_size, config.image_size, config.channels))
        params = jax.jit(model.init)(jax.random.key(0), image)["params"]
        done = finetune(
            make_task(network, data_dir),
            make_plan(params, [(".*", None)]),
            params,
            key=jax.random.key(0),
            seed=1_000,
            steps=steps,
            optimizer=OptimizerConfig(dense=2e-3, weight_decay=0.05, freeze=None),
            name="float",
        )
        return done.packed.params, {}

    return weights
