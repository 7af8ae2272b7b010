"""Forward pass and gradient of every family, beside PyTorch's implementation of it.

    pip install -e '.[parity-full]'
    python benchmarks/models.py [--models resnet50 swin_tiny --batch 8 --rounds 5]

MobileNetV3 and EfficientNet-Lite are timm's, and skipped where that is missing (`.[parity]`).

Both sides have random weights, the same images or tokens, float32, and the same threads; they run
in turn in this process, and medians count. "Step" is the gradient of the cross-entropy with respect
to all parameters, batch norm in training mode; no optimizer. Segmentation scores all pixels of the
image on both sides. Ours is compiled, PyTorch eager, as users run them. Ratios above 1 are in our
favour. The last line is one JSON object.
"""

import dataclasses
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ssvq_jax.models import REGISTRY, create

transformers.logging.set_verbosity_error()

_TINY = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}


class MissingReferenceError(Exception):
    """A reference cannot be made here."""


def _transformers(kind: str, head: str, **settings: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}{head}")(config)


def _image_classifier(
    kind: str, classes: int = 1000, **settings: Any
) -> Callable[[], torch.nn.Module]:
    return lambda: _transformers(kind, "ForImageClassification", num_labels=classes, **settings)


def _distilled() -> torch.nn.Module:
    head = "ForImageClassificationWithTeacher"
    return _transformers("DeiT", head, num_labels=1000, **_TINY)


def _timm(name: str) -> torch.nn.Module:
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # the latter: a torchvision for another torch
        reason = str(error).splitlines()[0]
        raise MissingReferenceError(f"timm cannot be imported ({reason})") from error
    return timm.create_model(name)


class _DeepLab(torch.nn.Module):
    """Scores pixels of the image, as transformers itself does for its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _transformers(
            "MobileNetV2",
            "ForSemanticSegmentation",
            image_size=513,
            num_labels=21,
            output_stride=16,
            classifier_dropout_prob=0.0,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        coarse = self.model(images).logits
        size = tuple(images.shape[-2:])
        return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def _llama() -> torch.nn.Module:
    return _transformers(
        "Llama",
        "ForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


# Of the registry, and how transformers or timm makes the same network.
REFERENCES: dict[str, Callable[[], torch.nn.Module]] = {
    "deit_tiny": _image_classifier("ViT", **_TINY),
    "deit_tiny_distilled": _distilled,
    "swin_tiny": _image_classifier("Swin"),
    "convnext_tiny": _image_classifier("ConvNext"),
    "resnet18": _image_classifier(
        "ResNet",
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    ),
    "resnet50": _image_classifier("ResNet"),
    "tf_mobilenetv2_100": _image_classifier("MobileNetV2", classes=1001),
    "mobilenetv3_large_100": partial(_timm, "mobilenetv3_large_100"),
    "efficientnet_lite0": partial(_timm, "tf_efficientnet_lite0"),
    "deeplabv3_mobilenetv2": _DeepLab,
    "smollm2_135m": _llama,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        models: names in the registry; by default all that have a reference.
        batch: images a call; PyTorch trains DeepLab, which pools before batch norm, on 2 or more.
        tokens: tokens of the one text of a language model.
        rounds: of both sides in turn.
        threads: of PyTorch; XLA takes all cores.
    """

    models: tuple[str, ...] = tuple(REFERENCES)
    batch: int = 8
    tokens: int = 256
    rounds: int = 5
    threads: int = os.cpu_count() or 1


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    table = Table(title="items/s: images, or tokens", title_justify="left")
    columns = ("model", "forward", "PyTorch", "ratio", "step", "PyTorch", "ratio", "compile")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    ratios: dict[str, dict[str, float]] = {"forward_ratio": {}, "step_ratio": {}}
    figures: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in track(config.models, "comparing", console=Console(stderr=True)):
        try:
            found = compare(name, config)
        except MissingReferenceError as error:
            skipped[name] = str(error)
            table.add_row(name, "skipped")
            continue
        figures[name] = found
        ratios["forward_ratio"][name] = found["forward"] / found["reference_forward"]
        ratios["step_ratio"][name] = found["step"] / found["reference_step"]
        table.add_row(
            name,
            f"{found['forward']:.1f}",
            f"{found['reference_forward']:.1f}",
            f"{ratios['forward_ratio'][name]:.2f}",
            f"{found['step']:.1f}",
            f"{found['reference_step']:.1f}",
            f"{ratios['step_ratio'][name]:.2f}",
            f"{found['forward_compile_s']:.1f} s + {found['step_compile_s']:.1f} s",
        )
    table.caption = "\n".join(f"{name} is skipped: {reason}" for name, reason in skipped.items())
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    print(json.dumps({**ratios, "skipped": skipped, "models": figures, "threads": config.threads}))


def compare(name: str, config: Config) -> dict[str, float]:
    """Items a second of both sides, and seconds that ours takes to compile."""
    task, model = REGISTRY[name].task, create(name)
    draw = np.random.default_rng(0)
    if task == "language":
        inputs = draw.integers(0, model.config.vocab, (1, config.tokens), np.int32)
        labels, items = np.roll(inputs, -1, axis=1), config.tokens
    else:
        size, classes, items = model.config.image_size, model.config.classes, config.batch
        inputs = draw.normal(size=(items, size, size, 3)).astype(np.float32)
        labelled = (items, size, size) if task == "segmentation" else (items,)
        labels = draw.integers(0, classes, labelled, np.int32)
    theirs = reference(name, inputs, labels)
    forward, step, compile_s = ours(model, inputs, labels)
    seconds = in_turn(config.rounds, forward, theirs[0])
    step_seconds = in_turn(config.rounds, step, theirs[1])
    return {
        "forward": items / seconds[0],
        "reference_forward": items / seconds[1],
        "step": items / step_seconds[0],
        "reference_step": items / step_seconds[1],
        "forward_compile_s": compile_s[0],
        "step_compile_s": compile_s[1],
    }


def ours(
    model: Any, inputs: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], Any], Callable[[], Any], tuple[float, float]]:
    """Compiled forward pass and gradient, and the seconds of compiling each."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs[:1])
    draw = np.random.default_rng(0)

    def value(leaf: Any) -> jax.Array:
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(draw.uniform(0.2, 1.0, leaf.shape) * scale, leaf.dtype)

    variables = jax.tree.map(value, dict(shapes))
    params, state = variables.pop("params"), variables
    training = {"train": True} if "batch_stats" in state else {}

    def forward(params: Any, state: Any, inputs: Any) -> jax.Array:
        return model.apply({"params": params, **state}, inputs)

    def loss(params: Any, state: Any, inputs: Any, labels: Any) -> jax.Array:
        logits, _ = model.apply(
            {"params": params, **state}, inputs, **training, mutable=["batch_stats"]
        )
        # Not optax's, part of whose gradient XLA computes while it compiles: seconds for DeepLab.
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        return -chosen.mean()

    given = (params, state, jnp.asarray(inputs))
    start = time.perf_counter()
    compiled = jax.jit(forward).lower(*given).compile()
    forward_s = time.perf_counter() - start
    targets = jnp.asarray(labels)
    start = time.perf_counter()
    gradient = jax.jit(jax.grad(loss)).lower(*given, targets).compile()
    step_s = time.perf_counter() - start
    return (
        lambda: jax.block_until_ready(compiled(*given)),
        lambda: jax.block_until_ready(gradient(*given, targets)),
        (forward_s, step_s),
    )


def reference(
    name: str, inputs: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's forward pass and gradient."""
    model, language = REFERENCES[name](), REGISTRY[name].task == "language"
    given = torch.from_numpy(inputs if language else inputs.transpose(0, 3, 1, 2).copy())
    given = given.long() if language else given
    targets = torch.from_numpy(labels).long()

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(given)

    def step() -> None:
        model.train()
        model.zero_grad()
        output = model(given)
        logits = getattr(output, "logits", output)
        scores, classes = logits, targets
        if language:  # classes are the second axis of images' logits only
            scores, classes = logits.flatten(0, 1), targets.flatten()
        torch.nn.functional.cross_entropy(scores, classes).backward()

    return forward, step


def in_turn(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """Median seconds of each, one round of all after the other."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(rounds + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if i:  # the first round warms up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    main(tyro.cli(Config))
