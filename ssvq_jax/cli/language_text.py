"""Text as commands give it to language models: tokenizer, files, windows."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.language import Language
from ssvq_jax.cli.options import TextOptions

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    import numpy as np
    from jaxtyping import Int32

    from ssvq_jax.models.tokenizer import Tokenizer
    from ssvq_jax.training.perplexity import Reading
    from ssvq_jax.tree import PyTree

MOST_WINDOWS = 16  # that a model is judged by unless the user says how many


def open_tokenizer(language: Language, given: Path | None) -> "Tokenizer":
    """Opens the tokenizer of a model; see `find_tokenizer`.

    Raises:
        ValueError: if there is none, or it is one of another model.
    """
    found = find_tokenizer(language, given)
    if found is not None:
        return found
    from ssvq_jax.models import PUBLISHED

    name = language.name
    bring = f", or bring it with `ssvq models fetch {name}`" if name in PUBLISHED else ""
    raise ValueError(
        f"{language.path} comes without a tokenizer, which is no part of a packed file: give "
        "--tokenizer with a tokenizer.json, a model's folder or a GGUF file (the folder of the "
        f"run has one){bring}"
    )


def find_tokenizer(language: Language, given: Path | None) -> "Tokenizer | None":
    """Finds the tokenizer of a model.

    Args:
        language: the model.
        given: where it is, if the user says; else it lies with the weights, or with the published
            ones of this name.

    Raises:
        ValueError: if it is one of another model.
    """
    from ssvq_jax.models import PUBLISHED, fetched
    from ssvq_jax.models.tokenizer import gguf_tokenizer, load_tokenizer

    name = language.name
    beside = language.path if language.path.is_dir() else language.path.parent
    kept = fetched(name) if name in PUBLISHED else None
    if given is not None:
        found, place = load_tokenizer(given), given
    elif language.gguf is not None:
        found, place = gguf_tokenizer(language.gguf), language.path
    elif (beside / "tokenizer.json").is_file():
        found, place = load_tokenizer(beside), beside / "tokenizer.json"
    elif kept is not None:
        found, place = load_tokenizer(kept), kept
    else:
        return None
    told = language.run.get("vocabulary_crc32")
    if found.vocab > language.config.vocab or told not in (None, found.checksum):
        raise ValueError(
            f"{place} is the tokenizer of another model, of {found.vocab:,} tokens: give "
            f"--tokenizer with that of {language.path}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Windows:
    """A text to judge by.

    Attributes:
        files: where it is from.
        tokens: windows, ``[n, t]``.
    """

    files: tuple[Path, ...]
    tokens: "Int32[np.ndarray, 'n t']"

    @property
    def told(self) -> dict[str, Any]:
        """What results say of it."""
        count, length = self.tokens.shape
        sizes = {"windows": count, "window": length}
        checksum = f"{zlib.crc32(self.tokens.tobytes()):08x}"
        return {"text": [str(file) for file in self.files], **sizes, "tokens_crc32": checksum}

    def read(self, language: Language, params: Sequence["Callable[[], PyTree]"]) -> "list[Reading]":
        """Lets models of one shape read it, compiled once.

        Args:
            language: gives the module.
            params: called for the weights of each model, which are let go before the next.
        """
        from ssvq_jax.progress import bar_over
        from ssvq_jax.training.perplexity import make_reading

        read = make_reading(language.forward)
        return [read(make(), bar_over(list(self.tokens), "reading")) for make in params]


def open_windows(
    options: TextOptions,
    language: Language,
    tokenizer: "Tokenizer",
    *,
    most: int | None = MOST_WINDOWS,
) -> Windows:
    """Cuts the text of a command into windows.

    Args:
        options: the command's.
        language: the model.
        tokenizer: of the model.
        most: windows, unless the command says how many; None for all that there are.

    Raises:
        ValueError: for a window out of range, or a text that is missing or too short.
    """
    import numpy as np

    from ssvq_jax.data.text import read_documents, token_windows

    length, context = options.window, language.config.context
    if length > context:
        raise ValueError(f"window={length}: give at most {context} tokens, the model's context")
    seen = 0

    def documents() -> Iterator[list[int]]:
        nonlocal seen
        for text in read_documents(options.text):
            tokens = tokenizer.encode(text)
            seen += len(tokens)
            yield tokens

    stream = token_windows(documents(), length, separator=tokenizer.separator)
    found = list(itertools.islice(stream, options.windows or most))
    if len(found) < (options.windows or 1):
        names = ", ".join(map(str, options.text))
        wanted = options.windows or 1
        raise ValueError(
            f"{names}: {seen:,} tokens, and {wanted} window{'s' if wanted > 1 else ''} of {length} "
            f"need{'s' if wanted == 1 else ''} {wanted * length:,}: give more text, or a smaller "
            "--window or --windows"
        )
    return Windows(options.text, np.stack(found))
