"""Activations quantized beside the weights: SmolLM2-135M in PVQ's code on both sides.

    ssvq models fetch smollm2_135m
    python experiments/language_activations.py --wikipedia DUMP.bz2 --wikitext wiki.valid.txt
    python experiments/language_activations.py --quick  # a made-up model, to see that it runs

Texts are those of `language_curve`, fewer windows of them: every input of the layers' kernels is
rotated, quantized in groups of 16, and rotated back, which is as if the kernel's inputs were
rotated. Weights are float32 or rotated PVQ. Embedding, norms, attention itself and the output
kernel stay as they are. Nothing is calibrated or trained.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import tyro
from jaxtyping import Array
from language import MODEL, Language
from language_curve import JUDGED, METHODS, open_model, plan_of, read
from language_curve import Config as TextConfig
from memory import begin_peak, peak_gigabytes
from tables import Rows, mean_and_deviation, percent, select
from units import Unit, check_choice, conduct

from ssvq_jax.models.llama import LlamaConfig
from ssvq_jax.quantizers import to_json
from ssvq_jax.quantizers.activations import bits_per_activation, quantize_activations
from ssvq_jax.quantizers.pyramid_vector import pulses_for
from ssvq_jax.report.pages import markdown_table
from ssvq_jax.report.plots import new_figure
from ssvq_jax.rotation import Rotation
from ssvq_jax.training.perplexity import LanguageForward, make_reading

NAME = "language_activations"
METHOD = "pvq-rotated"
FLOAT = 32.0
WEIGHTS = (FLOAT, 4.0, 3.0)
ACTIVATIONS = (FLOAT, 6.0, 4.0, 3.0)
DIM, AMPLITUDE_BITS = 16, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """Settings.

    Attributes:
        methods: rotated PVQ alone.
        bits: nominal bits of a weight, 32 for float.
        activations: nominal bits of an activation, 32 for float.
        windows: of 512 tokens, to judge on each text.
    """

    methods: tuple[str, ...] = (METHOD,)
    bits: tuple[float, ...] = WEIGHTS
    activations: tuple[float, ...] = ACTIVATIONS
    windows: int = 4


def pulses_of(bits: float) -> int:
    """Pulses of a group of activations."""
    return pulses_for(bits, DIM, AMPLITUDE_BITS)


def bits_of(config: LlamaConfig, bits: float) -> float:
    """Bits an activation over the tensors that a layer's kernels read: four, one of them wide."""
    tensors = (config.width, config.width, config.width, config.hidden)
    spent = sum(n * bits_per_activation(n, DIM, pulses_of(bits), AMPLITUDE_BITS) for n in tensors)
    return spent / sum(tensors)


def forward_of(language: Language, bits: float) -> LanguageForward:
    """The model with the inputs of its layers' kernels quantized; the model is not edited."""

    def quantize(x: Array) -> Array:
        rotation = Rotation(x.shape[-1])
        coded = quantize_activations(rotation.apply(x), DIM, pulses_of(bits), AMPLITUDE_BITS)
        return rotation.inverse(coded).astype(x.dtype)

    def intercept(call: Any, given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        kernel = isinstance(context.module, nn.Dense) and context.module.name != "lm_head"
        if kernel and context.method_name == "__call__":
            return call(quantize(given[0]), *given[1:], **named)
        return call(*given, **named)

    def forward(params: Any, tokens: Array) -> Array:
        with nn.intercept_methods(intercept):
            return language.forward(params, tokens)

    return forward


def unit(config: Config, weight_bits: float, bits: float) -> Unit:
    """Weights at one rate, activations at one."""
    told = {"model": MODEL, "method": METHOD, "bits": weight_bits, "activation_bits": bits}
    quantizer = METHODS[METHOD].quantizers[weight_bits] if weight_bits != FLOAT else None
    settings = {
        **told,
        "quantizer": quantizer and to_json(quantizer),
        "activations": None if bits == FLOAT else [DIM, pulses_of(bits), AMPLITUDE_BITS],
        **read(config),
    }

    def run() -> dict[str, Any]:
        language = open_model(config)
        begin_peak()
        params, stored = language.params, FLOAT
        if quantizer is not None:
            plan = plan_of(quantizer, params)
            variables = plan.init(jax.random.key(0), params, progress=True)
            params, stored = plan.finalize(variables).decode(), plan.bits().main.bits_per_weight
        row = {
            **told,
            "bits_per_weight": stored,
            "bits_per_activation": FLOAT
            if bits == FLOAT
            else bits_of(language.module.config, bits),
        }
        forward = language.forward if bits == FLOAT else forward_of(language, bits)
        row |= language.judge(params, JUDGED, make_reading(forward))
        return {**row, "peak_gigabytes": round(peak_gigabytes(), 2)}

    return Unit(f"{MODEL} weights {weight_bits:g}, activations {bits:g} bits", settings, run)


def units(config: Config) -> list[Unit]:
    """All pairs of rates; float weights first."""
    check_choice("methods", config.methods, (METHOD,))
    check_choice("bits", config.bits, (*METHODS[METHOD].quantizers, FLOAT))
    for bits in set(config.activations) - {FLOAT}:
        try:
            pulses_of(bits)
        except ValueError as error:
            raise SystemExit(f"activations: {error}") from None
    return [unit(config, weight, bits) for weight in config.bits for bits in config.activations]


def tables(rows: Rows) -> dict[str, str]:
    """The table of the page."""
    cells = [
        [
            f"{row['bits_per_weight']:.3f}",
            f"{row['bits_per_activation']:.3f}",
            *(
                mean_and_deviation([row[f"perplexity_{part}"]])
                if f"perplexity_{part}" in row
                else ""
                for part in JUDGED
            ),
            percent([row], "accuracy_test"),
            percent([row], "agreement_test"),
        ]
        for row in sorted(rows, key=lambda row: (-row["bits"], -row["activation_bits"]))
    ]
    columns = ["bits/weight", "bits/activation", "Wikipedia", "WikiText-2", "next token"]
    return {f"{NAME} table": markdown_table([*columns, "agreement"], cells)}


def plot(rows: Rows, folder: Path) -> None:
    """Draws perplexity against bits of an activation."""
    figure, axes = new_figure()
    for bits in sorted({row["bits"] for row in rows}):
        own = sorted(select(rows, bits=bits), key=lambda row: row["activation_bits"])
        axes.plot(
            [min(row["bits_per_activation"], 8.0) for row in own],  # float32 where 8 would be
            [row["perplexity_test"] for row in own],
            marker="o",
            label="float32 weights" if bits == FLOAT else f"PVQ, {bits:g} bits a weight",
        )
    axes.set(
        yscale="log",
        xlabel="bits per activation; float32 drawn at 8",
        ylabel="perplexity on held-out Wikipedia",
        title=f"{MODEL}, published in 5 bits",
    )
    axes.legend(fontsize="small")
    figure.savefig(folder / f"{NAME}.png")


if __name__ == "__main__":
    conduct(NAME, units, tables, plot, tyro.cli(Config))
