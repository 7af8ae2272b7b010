"""SmolLM2-135M fine-tuned at 2 bits on Wikipedia: VQ and SSVQ, taught by the float model.

    ssvq models fetch smollm2_135m
    python experiments/language_finetuning.py --wikipedia DUMP.bz2 --wikitext wiki.valid.txt
    python experiments/language_finetuning.py --quick  # a made-up model, to see that it runs

Texts are those of `language_curve`. Codebooks (and signs), norms and embedding learn from the float
model's predictions on windows that were not held out. Both methods get the same draws of learning
rates, judged by the perplexity on validation windows, then every seed runs the best one, and its
perplexity on the held-out windows is read once. Some 10 to 15 minutes a unit on two cores that are
shared, in 5 GB (VQ) and 9 GB (SSVQ).
Expected: SSVQ below VQ.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tyro
from jaxtyping import Int32
from language import MODEL, Language, Window
from language_curve import Config as TextConfig
from language_curve import moments_of, open_model, plan_of, read
from memory import begin_peak, peak_gigabytes
from search import reported, search_and_report, spread
from tables import Rows, mean_and_deviation, percent
from units import PAGE, Results, Unit, check_choice, work

import ssvq_jax as ssvq
from ssvq_jax.calibration import input_calibrations
from ssvq_jax.data.text import token_windows
from ssvq_jax.data.token_batches import eval_token_batches, train_token_batches
from ssvq_jax.plan import Plan
from ssvq_jax.quantizers import Quantizer, to_json
from ssvq_jax.report.pages import insert, markdown_table
from ssvq_jax.training.finetune import Finetuned, finetune
from ssvq_jax.training.objective import Objective, Teacher
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig
from ssvq_jax.training.run import Task
from ssvq_jax.training.step import linen_forward

NAME = "language_finetuning"
BITS = 2.0
QUANTIZERS: Mapping[str, Quantizer] = {
    "vq": ssvq.Vector(codewords=256, dim=4),
    "ssvq": ssvq.SignSplit(codewords=256, dim=8),
}
LABELS = {"vq": "VQ", "ssvq": "SSVQ, freezing"}
RATES = {"dense": (1e-6, 1e-4), "codebook": (1e-4, 1e-2), "sign": (3e-5, 3e-3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """Settings.

    Attributes:
        methods: to fine-tune.
        bits: 2 alone.
        trials: draws of learning rates a method.
        steps: updates of a fine-tuning.
        tokens: of a window that is trained on.
        accumulate: windows whose mean gradient makes an update.
    """

    methods: tuple[str, ...] = tuple(QUANTIZERS)
    bits: tuple[float, ...] = (BITS,)
    trials: int = 3
    steps: int = 64
    tokens: int = 256
    accumulate: int = 1


def draw(method: str, trial: int, trials: int, config: Config) -> OptimizerConfig:
    """One configuration: a Latin hypercube, the same rates for both methods."""
    rates: dict[str, Any] = {
        name: spread(name, bounds, trials)[trial] for name, bounds in RATES.items()
    }
    every = max(config.steps // 20, 1)
    freeze = FreezeConfig(every=every, start=0.1, end=0.02, momentum=0.02)
    return OptimizerConfig(
        **rates, freeze=freeze if method == "ssvq" else None, accumulate=config.accumulate
    )


def pieces(windows: list[Window], tokens: int) -> Int32[np.ndarray, "n t"]:
    """Windows as one stream, cut anew, each piece with the token that follows it."""
    return np.stack(list(token_windows([np.concatenate(windows).tolist()], tokens + 1)))


def task_of(language: Language, config: Config) -> Task:
    """The model, taught by its float self."""
    module = dataclasses.replace(language.module, remat=True)
    forward = linen_forward(module)
    texts = language.texts.windows
    learned = pieces(texts["training"], config.tokens)
    held_out = np.stack(texts["validation"])
    return Task(
        forward,
        lambda seed: train_token_batches(learned, 1, seed=seed),
        lambda: eval_token_batches(held_out, 1),
        Objective(distill=1.0),
        Teacher(linen_forward(language.module), language.params, {}),
    )


def unit(config: Config, stage: str, method: str, seed: int, trial: int) -> Unit:
    """One fine-tuning; what is reported is read in the stage "report" alone."""
    optimizer = draw(method, trial, config.trials, config)
    told = {"model": MODEL, "method": method, "bits": BITS, "seed": seed}
    settings = {
        "stage": stage,
        **told,
        "trial": trial,
        "quantizer": to_json(QUANTIZERS[method]),
        "steps": config.steps,
        "tokens": config.tokens,
        **read(config),
        "optimizer": dataclasses.asdict(optimizer),
    }
    name = f"{MODEL} {method} " + (f"trial {trial} " if stage == "tuning" else "") + f"seed {seed}"

    def run() -> dict[str, Any]:
        language = open_model(config)
        begin_peak()
        plan = plan_of(QUANTIZERS[method], language.params)
        moments, _ = moments_of(language)
        key = jax.random.key(seed)
        variables = plan.init(
            key, language.params, input_calibrations(plan, moments), progress=True
        )
        done = finetune(
            task_of(language, config),
            plan,
            language.params,
            key=key,
            seed=seed,
            steps=config.steps * config.accumulate,
            optimizer=optimizer,
            name=name,
            variables=variables,
        )
        return {**told, **figures(language, plan, done, test=stage == "report")}

    return Unit(name, settings, run)


def figures(language: Language, plan: Plan, done: Finetuned, *, test: bool) -> dict[str, Any]:
    """What a row tells of a run."""
    bits, last = plan.bits(), done.records[-1]
    row: dict[str, Any] = {
        "bits_per_weight": bits.main.bits_per_weight,
        "compression_ratio": bits.main.compression_ratio,
        "stored_bytes": bits.stored_bytes,
        "perplexity_before": float(np.exp(done.before.loss)),
        "seconds_by_part": {part: round(taken, 1) for part, taken in done.seconds.items()},
        **{key: last[key] for key in ("flipped", "frozen") if key in last},
    }
    parts = ("validation", "test", "wikitext2") if test else ("validation",)
    row |= language.judge(done.packed.decode(), parts)
    return {**row, "peak_gigabytes": round(peak_gigabytes(), 2)}


def tables(rows: Rows) -> dict[str, str]:
    """The table of the page, from the rows of all units."""
    cells, found = [], []
    for method, label in LABELS.items():
        own = reported(rows, method)
        if not own:
            continue
        found = own
        cells.append(
            [
                label,
                f"{own[0]['bits_per_weight']:.3f}",
                *(
                    mean_and_deviation([row[f"perplexity_{part}"] for row in own])
                    if f"perplexity_{part}" in own[0]
                    else ""
                    for part in ("before", "validation", "test", "wikitext2")
                ),
                percent(own, "agreement_test"),
                percent(own, "flipped"),
                str(len(own)),
            ]
        )
    columns = ["method", "bits/weight", "before", "validation", "Wikipedia", "WikiText-2"]
    text = markdown_table([*columns, "agreement", "flipped", "runs"], cells)
    if found:
        told = found[0]["settings"]
        text += (
            f"\n\nPerplexity of a model published in 5 bits (Q4_1), before (on validation windows) "
            f"and after {told['steps']} updates of {told['tokens']} tokens; mean ± standard "
            "deviation."
        )
    return {f"{NAME} table": text}


def compare(config: Config, results: Results) -> Rows:
    """Runs the draws, then the best ones with all seeds."""
    check_choice("methods", config.methods, QUANTIZERS)
    check_choice("bits", config.bits, (BITS,))
    if config.quick:
        quick = [unit(config, "report", name, 0, 0) for name in config.methods]
        return work(quick, results, config)
    return search_and_report(
        functools.partial(unit, config),
        config.methods,
        config.trials,
        "perplexity_validation",
        results,
        config,
    )


def main(config: Config) -> None:
    if config.quick:
        config = dataclasses.replace(config, steps=2, tokens=16)
    results = config.results(NAME)
    rows = results.rows() if config.only_report else compare(config, results)
    for name, text in tables(rows).items():
        print(f"\n{text}")
        if results.of_page and f"<!-- {name}: begin -->" in PAGE.read_text(encoding="utf-8"):
            insert(PAGE, name, text)


if __name__ == "__main__":
    main(tyro.cli(Config))
