"""``ssvq eval`` of a language model: how well it predicts, and how often as the float model."""

from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.language import Language, find_float, open_language
from ssvq_jax.cli.language_text import Windows, open_tokenizer, open_windows
from ssvq_jax.cli.options import TEXT_OPTIONS
from ssvq_jax.cli.packed import PACKED, file_size
from ssvq_jax.cli.session import sizes

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from pathlib import Path

    from ssvq_jax.cli.evaluate import EvalCommand

_USED = TEXT_OPTIONS | {"model", "weights", "scan", "reference", "json", "out"}


def evaluate_language(command: "EvalCommand") -> None:
    """Judges a language model by a text; writes ``eval-text.json``.

    Raises:
        ValueError: for options of images, or what is missing or does not fit.
    """
    import json

    from ssvq_jax.atomic import replace_text
    from ssvq_jax.report import print_language, provenance

    command.check_unused(_USED, "is for models that take images: give --model with one")
    command.check_windows()
    if not command.text:
        raise ValueError("no text: give --text with text files or Wikipedia dumps")
    language = open_language(command.model, command.weights, scan=command.scan)
    if command.reference is not None and language.weights.plan is None:
        raise ValueError("--reference is for compressed weights: leave it out")
    windows = open_windows(command, language, open_tokenizer(language, command.tokenizer))
    results = {
        "model": language.name,
        "weights": language.weights.origin,
        "note": language.note,
        **provenance(),
        **_judge(language, command.reference, windows),
        **_sizes(language),
    }
    is_run = "command" in language.run
    folder = command.out or (language.path if is_run else None)
    if command.json:
        print(json.dumps(results))
    else:
        print_language("compressed" if language.weights.plan else "float32", results)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "eval-text.json"
        replace_text(file, json.dumps(results, indent=1) + "\n")
        if not command.json:
            print(f"results are in {file}")


def _judge(language: Language, given: "Path | None", windows: Windows) -> dict[str, Any]:
    """The model's reading, and the float model's beside it where that is found."""
    found = find_float(language, given) if language.weights.plan is not None else None
    if found is None:
        (after,) = windows.read(language, (language.params,))
        return {**windows.told, "after": after.quality._asdict()}
    after, before = windows.read(language, (language.params, found.params))
    return {
        **windows.told,
        "float": before.quality._asdict(),
        "after": after.quality._asdict(),
        "agreement": after.agreement(before),
    }


def _sizes(language: Language) -> dict[str, Any]:
    """What compressed weights take."""
    plan, path = language.weights.plan, language.path
    if plan is None:
        return {}
    file = path / PACKED if path.is_dir() else path
    return {**sizes(plan), **file_size(file, plan.bits().model.weights)}
