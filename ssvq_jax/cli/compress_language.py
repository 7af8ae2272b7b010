"""``ssvq compress`` of a language model: encoded, and judged by a text."""

import time
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.calibrate_language import (
    CalibrationText,
    feed_errors_back,
    open_calibration,
)
from ssvq_jax.cli.language import Language, open_language
from ssvq_jax.cli.language_text import Windows, find_tokenizer, open_tokenizer, open_windows
from ssvq_jax.cli.options import TEXT_OPTIONS, check_apart
from ssvq_jax.cli.packed import PACKED, write_packed
from ssvq_jax.cli.run_folder import RunFolder
from ssvq_jax.cli.session import sizes
from ssvq_jax.cli.weights import open_plan

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.compress import CompressCommand
    from ssvq_jax.models.tokenizer import Tokenizer
    from ssvq_jax.plan import Packed, Plan
    from ssvq_jax.tree import Variables

_USED = TEXT_OPTIONS | {
    *("model", "weights", "scan", "seed", "recipe", "out", "resume"),
    *("calibration_text", "feedback"),
}


def compress_language(command: "CompressCommand") -> None:
    """Compresses a language model, judges it if there is a text, and writes everything.

    Raises:
        ValueError: for options of images, or what is missing or does not fit.
    """
    from ssvq_jax.analysis import leaf_reports
    from ssvq_jax.models.tokenizer import save_tokenizer
    from ssvq_jax.report import print_language

    command.check_unused(_USED, "is for models that take images: give --model with one")
    command.check_seed()
    command.check_windows()
    check_apart(command.out, command.weights)
    language = open_language(command.model, command.weights, scan=command.scan)
    if language.weights.plan is not None:
        raise ValueError(f"{command.weights} is compressed already: give float weights")
    tokenizer, windows = _open_text(command, language)
    plan = open_plan(command.recipe, language.weights)
    text = None
    if command.calibration_text or command.feedback:
        text = open_calibration(
            command, language, tokenizer or open_tokenizer(language, command.tokenizer), plan
        )
    told = language.told | {"vocabulary_crc32": tokenizer and tokenizer.checksum}
    seed = command.seed or 0
    config = {
        "command": "compress",
        **told,
        "out": str(command.out),
        "weights": language.weights.origin,
        "recipe": plan.to_json()["recipe"],
        "seed": seed,
        **(windows.told if windows else {}),
        **(text.told if text else {}),
    }
    folder = RunFolder(command.out, config, resume=command.resume)
    start = time.perf_counter()
    variables, calibrated = _encode(language, plan, seed, text)
    packed = plan.finalize(variables)
    seconds = {"encode": time.perf_counter() - start}
    start = time.perf_counter()
    judged = _judge(language, packed, windows) if windows else {}
    seconds |= {"evaluate": time.perf_counter() - start} if windows else {}
    metrics = {**judged["after"], "agreement": judged["agreement"]} if judged else {}
    size = write_packed(folder.path / PACKED, packed, {}, told, metrics)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder.path)
    leaves = leaf_reports(plan, language.weights.params, variables)
    results = {"note": language.note, **calibrated, **judged, **sizes(plan), **size}
    results["seconds_by_part"] = seconds
    command.report(folder, plan, leaves, results)
    print_language("compressed", results)
    print(f"results, the packed model and its tokenizer are in {command.out}")


def _open_text(
    command: "CompressCommand", language: Language
) -> "tuple[Tokenizer | None, Windows | None]":
    """A tokenizer is needed for a text only, but kept with the run wherever there is one."""
    if not command.text:
        return find_tokenizer(language, command.tokenizer), None
    tokenizer = open_tokenizer(language, command.tokenizer)
    return tokenizer, open_windows(command, language, tokenizer)


def _encode(
    language: Language, plan: "Plan", seed: int, text: CalibrationText | None
) -> "tuple[Variables, dict[str, Any]]":
    """Encodes the weights; gives what a calibration text had to do with it, too."""
    import jax

    from ssvq_jax.training.finetune import encoding_key

    key, params = encoding_key(jax.random.key(seed)), language.weights.params
    if text is None:
        return plan.init(key, params, progress=True), {}
    from ssvq_jax.calibration import input_calibrations

    moments = text.observe(language, plan)
    print(moments)
    calibration = input_calibrations(plan, moments.inputs)
    variables: Variables = plan.init(key, params, calibration, progress=True)
    told: dict[str, Any] = text.told | {"few_inputs": moments.few, "not_read": moments.missed}
    if text.feedback:
        variables, found = feed_errors_back(language, plan, variables, moments)
        told |= found
    return variables, {"calibration": told}


def _judge(language: Language, packed: "Packed", windows: Windows) -> dict[str, Any]:
    """What compression costs."""
    before, after = windows.read(language, (language.params, packed.decode))
    return {
        **windows.told,
        "float": before.quality._asdict(),
        "after": after.quality._asdict(),
        "agreement": after.agreement(before),
    }
