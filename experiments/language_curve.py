"""Perplexity against bits: SmolLM2-135M compressed after training, calibrated on Wikipedia.

    ssvq models fetch smollm2_135m
    python experiments/language_curve.py --wikipedia DUMP.bz2 --wikitext wiki.valid.txt
    python experiments/language_curve.py --quick  # a made-up model, to see that it runs

DUMP is an export of articles, e.g. the one in gensim's test data (pip download --no-deps gensim).
Every fifth article is held out to report, the ones after them are for validation; the rest
calibrate.
All kernels of the layers are compressed, embedding and norms stay as they are. A row is one method
at one rate: moments of the layers' inputs over 16 windows of 512 tokens, encoding, and the decoded
model judged on 16 windows of each text. Some minutes a unit on two cores, of CRVQ twenty and more;
nothing is trained but where blocks are said to be: 24 updates each, on 32 windows of the articles
that calibrate. Of two rates of codebooks the one that left less training error in two blocks of
another CRVQ model, calibrated on WikiText-2, was taken; the others are guesses.
The weights are published in 5 bits (Q4_1), so "float" is a 5-bit model's values.
Expected at 2 bits: feedback below plain, rotated PVQ below rounding; near 1 bit: CRVQ below VQ.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array
from language import MODEL, WINDOW, Language, made_up_language, open_language
from memory import begin_peak, peak_gigabytes
from tables import Rows, deviation, mean_and_deviation, percent, select
from units import Options, Unit, check_choice, conduct

import ssvq_jax as ssvq
from ssvq_jax.calibration import feed_back, input_calibrations, input_moments
from ssvq_jax.models.llama import Layer
from ssvq_jax.plan import Plan, make_plan
from ssvq_jax.quantizers import InputMoments, Quantizer, to_json
from ssvq_jax.quantizers.pyramid_vector import pulses_for
from ssvq_jax.report.pages import markdown_table
from ssvq_jax.report.plots import new_figure
from ssvq_jax.training.blockwise import BlockReport, finetune_blocks
from ssvq_jax.training.optimizer import OptimizerConfig
from ssvq_jax.tree import PyTree, Variables

NAME = "language_curve"
KERNELS = r"layers/.*/kernel"
# Of fine-tuning by blocks: windows, updates a block of so many windows, and rates; scales have the
# codebooks'.
BLOCKS: Mapping[str, Any] = {
    "windows": 32,
    "steps": 24,
    "batch_size": 2,
    "codebook": 1e-2,
    "dense": 1e-3,
}
JUDGED = ("test", "wikitext2")  # nothing is chosen here, so nothing is validated


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compress.

    Attributes:
        label: in tables and pictures.
        quantizers: by nominal bits a weight.
        weighted: elements count by the second moment of their input; of CRVQ also channels.
        feedback: errors are fed back into what is not encoded yet.
        blocks: codebooks, scales and norms are fine-tuned block by block.
        drawn: there is chance in it, so that it is run with every seed.
    """

    label: str
    quantizers: Mapping[float, Quantizer]
    weighted: bool = False
    feedback: bool = False
    blocks: bool = False
    drawn: bool = True


_UNIFORM = {float(bits): ssvq.Uniform(bits=bits) for bits in (2, 3, 4)}
_VECTOR = {
    1.0: ssvq.Vector(256, 8),
    1.2: ssvq.Vector(512, 8),  # 1.190 bits stored, as CRVQ of 256 codewords with its codebooks
    2.0: ssvq.Vector(256, 4),
    3.0: ssvq.Vector(64, 2),
    4.0: ssvq.Vector(256, 2),
}
_SIGNS = {
    1.25: ssvq.SignSplit(4, 8),
    1.5: ssvq.SignSplit(16, 8),
    2.0: ssvq.SignSplit(256, 8),
}
_PYRAMIDS = {
    float(bits): ssvq.Pyramid(16, pulses_for(bits, 16, 3), 3, rotate=False) for bits in (2, 3, 4)
}
_ROTATED = {bits: dataclasses.replace(one, rotate=True) for bits, one in _PYRAMIDS.items()}
# Stored are 1.191 and 1.348 bits, and 1.332 with split signs.
_RELAXED = {1.0: ssvq.ChannelRelaxed(256, 8), 1.35: ssvq.ChannelRelaxed(512, 8)}
_RELAXED_SIGNS = {1.35: ssvq.ChannelRelaxedSignSplit(4, 8, extended_codewords=64)}
METHODS: Mapping[str, Method] = {
    "rtn": Method("rounding to nearest", _UNIFORM, drawn=False),
    "gptq": Method("GPTQ", _UNIFORM, feedback=True, drawn=False),
    # GPTQ itself takes the steps of rounding to nearest, whatever the inputs.
    "gptq-weighted": Method(
        "GPTQ, steps weighted by inputs", _UNIFORM, weighted=True, feedback=True, drawn=False
    ),
    "vq": Method("VQ", _VECTOR),
    "vq-weighted": Method("VQ, weighted by inputs", _VECTOR, weighted=True),
    "gptvq": Method("GPTVQ", _VECTOR, weighted=True, feedback=True),
    "gptvq-blocks": Method(
        "GPTVQ, blocks fine-tuned", _VECTOR, weighted=True, feedback=True, blocks=True
    ),
    "ssvq": Method("SSVQ, not trained", _SIGNS),
    "ssvq-feedback": Method("SSVQ, not trained, feedback", _SIGNS, weighted=True, feedback=True),
    "pvq": Method("PVQ", _PYRAMIDS, drawn=False),
    "pvq-rotated": Method("PVQ, rotated", _ROTATED, drawn=False),
    "pvq-feedback": Method("PVQ, rotated, feedback", _ROTATED, feedback=True, drawn=False),
    "crvq": Method("CRVQ", _RELAXED, weighted=True),
    "crvq-blocks": Method("CRVQ, blocks fine-tuned", _RELAXED, weighted=True, blocks=True),
    "crvq-signs": Method("CRVQ, split signs, not trained", _RELAXED_SIGNS, weighted=True),
}
ALL_BITS = tuple(sorted({bits for method in METHODS.values() for bits in method.quantizers}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings.

    Attributes:
        weights: GGUF file of the published weights; by default what was fetched.
        wikipedia: dump of articles.
        wikitext: WikiText-2's validation text; left out if not given.
        methods: methods to compare.
        bits: nominal bits a weight, of those that a method has.
        windows: of 512 tokens, to calibrate and to judge on each text.
    """

    weights: Path | None = None
    wikipedia: Path | None = None
    wikitext: Path | None = None
    methods: tuple[str, ...] = tuple(METHODS)
    bits: tuple[float, ...] = ALL_BITS
    windows: int = 16


def open_model(config: Config) -> Language:
    """The model and its texts, opened once a process."""
    if config.quick:
        return made_up_language(2)
    if config.wikipedia is None:
        raise SystemExit("no text: give --wikipedia with a dump of articles (.xml or .xml.bz2)")
    return _opened(config.weights, config.wikipedia, config.wikitext, config.windows)


_opened = functools.cache(open_language)


@functools.cache
def moments_of(language: Language) -> tuple[dict[str, InputMoments], float]:
    """Moments of the kernels' inputs, and the seconds that they took."""
    began = time.perf_counter()
    plan = plan_of(ssvq.Uniform(8), language.params)  # for its leaves
    batches = [jnp.asarray(window)[None, :-1] for window in language.texts.windows["calibration"]]
    found = input_moments(language.forward, language.params, plan, batches, progress=True)
    return jax.block_until_ready(found.inputs), time.perf_counter() - began


def plan_of(quantizer: Quantizer, params: PyTree) -> Plan:
    """All kernels of the layers by one method, each layer's on its own."""
    return make_plan(params, [ssvq.Rule(KERNELS, quantizer, stacked=1), (".*", None)])


def read(config: Config) -> dict[str, Any]:
    """What settings say of weights and texts: checksums, so that no others pass for them."""
    files = {"weights": config.weights, "wikipedia": config.wikipedia, "wikitext": config.wikitext}
    given = {name: file for name, file in files.items() if file is not None}
    sums = {f"{name}_crc32": f"{zlib.crc32(file.read_bytes()):08x}" for name, file in given.items()}
    return {"windows": config.windows, "window": WINDOW, **sums}


def unit(config: Config, name: str, bits: float, seed: int) -> Unit:
    """One method at one rate."""
    method = METHODS[name]
    quantizer = method.quantizers[bits]
    told = {"model": MODEL, "method": name, "bits": bits, "seed": seed}
    settings = {
        **told,
        "quantizer": to_json(quantizer),
        "weighted": method.weighted,
        "feedback": "largest inputs first" if method.feedback else None,
        **read(config),
    }
    if method.blocks:
        settings["blocks"] = BLOCKS

    def run() -> dict[str, Any]:
        language = open_model(config)
        begin_peak()
        wanted = method.weighted or method.feedback
        moments, observed = moments_of(language) if wanted else ({}, 0.0)
        began = time.perf_counter()
        plan = plan_of(quantizer, language.params)
        variables = plan.init(
            jax.random.key(seed),
            language.params,
            input_calibrations(plan, moments) if method.weighted else None,
            progress=True,
        )
        report: Mapping[str, Any] = {}
        if method.feedback:
            variables, report = feed_back(
                plan, variables, language.params, moments, largest_first=True
            )
        tuned, tuning = list[BlockReport](), 0.0
        if method.blocks:
            start = time.perf_counter()
            variables, tuned = tune_blocks(language, plan, variables, seed)
            tuning = time.perf_counter() - start
        packed = plan.finalize(variables)
        encoded = time.perf_counter() - began - tuning
        params = packed.decode()
        table = plan.bits()
        row = {
            **told,
            "bits_per_weight": table.main.bits_per_weight,
            "compression_ratio": table.main.compression_ratio,
            "stored_bytes": table.stored_bytes,
            "stored_ratio": table.file_ratio,
            "damping_most": max((r.damping for r in report.values()), default=None),
            "block_errors": [[block.before, block.after] for block in tuned],
            "output_errors": {path: [r.before, r.after] for path, r in report.items()},
            "seconds_moments": round(observed, 1),
            "seconds_encoding": round(encoded, 1),
            "seconds_blocks": round(tuning, 1),
        }
        row |= language.judge(params, JUDGED)
        return {**row, "peak_gigabytes": round(peak_gigabytes(), 2)}

    return Unit(f"{MODEL} {name} {bits:g} bits seed {seed}", settings, run)


def tune_blocks(
    language: Language, plan: Plan, variables: Variables, seed: int
) -> tuple[Variables, list[BlockReport]]:
    """Fine-tunes the layers, one after the other."""
    layer, training = Layer(language.module.config), language.texts.windows["training"]
    tokens = np.stack(training[: BLOCKS["windows"]])[:, :-1]
    embedding = np.asarray(language.params["embed"]["embedding"])

    def block(params: PyTree, hidden: Array) -> Array:
        found = layer.apply({"params": params}, hidden, jnp.arange(hidden.shape[1]))
        return jnp.asarray(found)

    return finetune_blocks(
        block,
        plan,
        variables,
        language.params,
        jnp.asarray(embedding[tokens]),
        "layers",
        steps=BLOCKS["steps"],
        batch_size=BLOCKS["batch_size"],
        optimizer=OptimizerConfig(
            codebook=BLOCKS["codebook"],
            scale=BLOCKS["codebook"],
            dense=BLOCKS["dense"],
            freeze=None,
        ),
        seed=seed,
        progress=True,
    )


def float_unit(config: Config) -> Unit:
    """The published weights in float32."""
    told = {"model": MODEL, "method": "float", "bits": 32.0, "seed": 0}

    def run() -> dict[str, Any]:
        language = open_model(config)
        row: dict[str, Any] = {**told, "bits_per_weight": 32.0, "compression_ratio": 1.0}
        row["note"] = language.note
        return row | language.judge(language.params, JUDGED)

    settings = {**told, **read(config)}
    return Unit(f"{MODEL} float", settings, run)


def units(config: Config) -> list[Unit]:
    """All rows; those of the first seed come first, rates of 2 bits before others."""
    check_choice("methods", config.methods, METHODS)
    check_choice("bits", config.bits, ALL_BITS)
    found = [float_unit(config)]
    for seed in config.seeds[:1] if config.quick else config.seeds:
        rows = [
            (abs(bits - 2.0), name, bits)
            for name in config.methods
            for bits in METHODS[name].quantizers
            if bits in config.bits and (METHODS[name].drawn or seed == config.seeds[0])
        ]
        found += [unit(config, name, bits, seed) for _, name, bits in sorted(rows)]
    return found


def tables(rows: Rows) -> dict[str, str]:
    """The table of the page."""
    cells = []
    for name, label in {"float": "float32", **{n: m.label for n, m in METHODS.items()}}.items():
        of_method = select(rows, method=name)
        for bits in sorted({row["bits"] for row in of_method}):
            own = select(of_method, bits=bits)
            cells.append(
                [
                    label,
                    f"{own[0]['bits_per_weight']:.3f}",
                    *(
                        mean_and_deviation([row[f"perplexity_{part}"] for row in own])
                        if f"perplexity_{part}" in own[0]
                        else ""
                        for part in JUDGED
                    ),
                    percent(own, "accuracy_test"),
                    percent(own, "agreement_test"),
                    _largest(map(_seconds, own), 0),
                    _largest((row.get("peak_gigabytes") for row in own), 1),
                    str(len(own)),
                ]
            )
    columns = ["method", "bits/weight", "Wikipedia", "WikiText-2", "next token", "agreement"]
    return {f"{NAME} table": markdown_table([*columns, "seconds", "GB", "runs"], cells)}


def _seconds(row: Mapping[str, Any]) -> float | None:
    """What the method took, the moments that it shares with others not counted."""
    encoding = row.get("seconds_encoding")
    return None if encoding is None else encoding + row.get("seconds_blocks", 0.0)


def _largest(values: Iterable[float | None], digits: int) -> str:
    found = [value for value in values if value is not None]
    return f"{max(found):.{digits}f}" if found else ""


def plot(rows: Rows, folder: Path) -> None:
    """Draws perplexity against stored bits."""
    figure, axes = new_figure()
    for row in select(rows, method="float"):
        axes.axhline(row["perplexity_test"], color="grey", linestyle=":", label="as published")
    for i, (name, method) in enumerate(METHODS.items()):
        of_method = select(rows, method=name)
        rates = sorted({row["bits"] for row in of_method})
        at = [select(of_method, bits=bits) for bits in rates]
        if at:
            axes.errorbar(
                [each[0]["bits_per_weight"] for each in at],
                [np.mean([row["perplexity_test"] for row in each]) for each in at],
                yerr=[deviation([row["perplexity_test"] for row in each]) for each in at],
                marker="os"[i // 10], color=f"C{i % 10}", capsize=3, label=method.label,
            )  # fmt: skip
    axes.set(
        yscale="log",
        xlabel="stored bits per weight of the layers' kernels",
        ylabel="perplexity on held-out Wikipedia",
        title=f"{MODEL}, published in 5 bits",
    )
    axes.legend(fontsize="small")
    figure.savefig(folder / f"{NAME}.png")


if __name__ == "__main__":
    conduct(NAME, units, tables, plot, tyro.cli(Config))
