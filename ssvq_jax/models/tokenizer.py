"""Tokenizers of language models: from a Hugging Face ``tokenizer.json`` or a GGUF file's metadata.

Both become one of the package `tokenizers`.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsInt

from ssvq_jax.atomic import replace_text
from ssvq_jax.json_files import read_json, read_text
from ssvq_jax.models.gguf_file import INSTALL, GgufFile

_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
_CONTROL, _USER_DEFINED = 3, 4  # of GGUF's token types
# What Llama 3's ``tokenizer.json`` splits by.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text as token numbers, and back.

    Attributes:
        inner: a `tokenizers.Tokenizer`.
        end: token at which generation ends, or None.
        separator: token between the documents of the training text, or None.
    """

    inner: Any
    end: int | None
    separator: int | None

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.inner.get_vocab_size()

    @property
    def checksum(self) -> str:
        """CRC-32 of the tokens in their order, in hexadecimal: whether two cut text the same way.

        It is the same for a GGUF file and the ``tokenizer.json`` of one model.
        """
        vocabulary = self.inner.get_vocab()
        tokens = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
        return f"{zlib.crc32(tokens.encode()):08x}"

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Cuts a text into tokens; control tokens spelled out in it count as such.

        Args:
            text: the text.
            special: with what the model expects around a text, such as Llama 3's first token.
        """
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        """Joins tokens to a text, control tokens spelled out."""
        return self.inner.decode([int(token) for token in tokens], skip_special_tokens=False)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        path: a ``tokenizer.json``, a Hugging Face model folder with one, or a GGUF file. The end
            token stands in ``tokenizer_config.json`` beside the first.

    Returns:
        The tokenizer.

    Raises:
        ImportError: without the packages `tokenizers`, or `gguf` for a GGUF file.
        ValueError: if there is none, or it cannot be read.
    """
    if path.is_file() and path.suffix != ".json":
        return gguf_tokenizer(GgufFile(path))
    file = path / "tokenizer.json" if path.is_dir() else path
    package = _tokenizers()
    try:
        inner = package.Tokenizer.from_str(read_text(file))
        beside = file.with_name("tokenizer_config.json")
        told = read_json(beside) if beside.exists() else {}
    except Exception as error:  # the package raises bare ones
        raise ValueError(
            f"{file} cannot be read as a tokenizer ({error}): give a tokenizer.json, a model's "
            "folder or a GGUF file"
        ) from error
    end = told.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return _finish(inner, inner.token_to_id(end) if end else None)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the two files that `load_tokenizer` finds in a folder."""
    end = None if tokenizer.end is None else tokenizer.inner.id_to_token(tokenizer.end)
    replace_text(folder / "tokenizer_config.json", json.dumps({"eos_token": end}) + "\n")
    replace_text(folder / "tokenizer.json", tokenizer.inner.to_str())


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Builds the tokenizer of a GGUF file, a byte-level BPE in the way of GPT-2.

    Args:
        file: with ``tokenizer.ggml.tokens``, ``merges`` and ``pre``, the name of the rule by which
            text is cut into words first: 'gpt-2', 'smollm' or 'llama-bpe'.

    Raises:
        ImportError: without the package `tokenizers`.
        ValueError: naming what is missing, of another kind, or inconsistent.
    """
    package = _tokenizers()
    kind = file.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ValueError(f"{file.path}: tokenizer '{kind}': only 'gpt2' can be read")
    rule = file.get("tokenizer.ggml.pre", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    kinds = file.get("tokenizer.ggml.token_type", list)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise ValueError(
            f"{file.path}: {len(tokens)} tokens, {len(vocab)} different, {len(kinds)} types of them"
        )
    whole_words = rule == "llama-bpe"  # a word that is a token is taken, whatever the merges say
    try:
        model = package.models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words)
    except Exception as error:  # the package raises bare ones
        raise ValueError(f"{file.path}: the tokenizer's merges are damaged ({error})") from error
    inner = package.Tokenizer(model)
    inner.pre_tokenizer = _words(rule, file.path)
    inner.decoder = package.decoders.ByteLevel()
    for added in (_CONTROL, _USER_DEFINED):
        names = [token for token, kind in zip(tokens, kinds, strict=True) if kind == added]
        make = inner.add_special_tokens if added == _CONTROL else inner.add_tokens
        make([package.AddedToken(name, normalized=False) for name in names])
    if file.get("tokenizer.ggml.add_bos_token", bool, whole_words):
        number = file.get("tokenizer.ggml.bos_token_id", int)
        if number >= len(tokens):
            raise ValueError(f"{file.path}: bos_token_id={number} of {len(tokens)} tokens")
        first = tokens[number]
        inner.post_processor = package.processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, number)]
        )
    end = file.get("tokenizer.ggml.eos_token_id", int, -1)
    return _finish(inner, end if end >= 0 else None)


def _words(rule: str, path: Path) -> Any:
    """What cuts a text into words, within which BPE merges, by llama.cpp's name."""
    package = _tokenizers()
    pre = package.pre_tokenizers
    match rule:
        case "gpt-2":
            return pre.ByteLevel(add_prefix_space=False)
        case "smollm":  # each digit a word
            digits = pre.Digits(individual_digits=True)
            return pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False)])
        case "llama-bpe":
            split = pre.Split(package.Regex(_LLAMA3_WORDS), "isolated")
            return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(
        f"{path}: pre-tokenizer '{rule}': only 'gpt-2', 'smollm' and 'llama-bpe' can be read; give "
        "the model's tokenizer.json instead"
    )


def _finish(inner: Any, end: int | None) -> Tokenizer:
    numbers = (inner.token_to_id(name) for name in _DOCUMENT_ENDS)
    separator = next((number for number in numbers if number is not None), end)
    return Tokenizer(inner, end, separator)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"tokenizers need the package of that name: {INSTALL}") from error
    return tokenizers
