"""Tokenizers of GGUF files against the `tokenizer.json` of the same vocabulary."""

import json
import sys

import pytest

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers need the package of that name")

from ssvq_jax.models.tokenizer import load_tokenizer  # noqa: E402

LLAMA3_WORDS = (  # as in the tokenizer.json that Meta published with Llama 3
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    "The low lower lowest newer wider.",
    "In 1912, 3.14 and 2048 newer\tlines\r\n\n  of   lowest text ",
    "it's WE'RE they'll Ünïcödé 日本語 ٣٤ ½ 🙂 low",
    "<|im_start|>user\nlower<|im_end|>",
]


def train(rule):
    """A byte-level BPE as Hugging Face's tokenizer.json has it for such models."""
    pre = tokenizers.pre_tokenizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=rule == "llama-bpe"))
    if rule == "llama-bpe":
        words = pre.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
        inner.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(False, use_regex=False)])
    elif rule == "smollm":
        inner.pre_tokenizer = pre.Sequence([pre.Digits(True), pre.ByteLevel(False)])
    else:
        inner.pre_tokenizer = pre.ByteLevel(False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text * 3 for text in TEXTS], trainer)
    if rule == "llama-bpe":
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=[SPECIAL[1], "$A"], special_tokens=[(SPECIAL[1], 1)]
        )
    return inner


def write(path, inner, **changes):
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    stored = {
        "pre": changes.get("rule", "smollm"),
        "tokens": changes.get("tokens", tokens),
        "merges": changes.get("merges", [" ".join(pair) for pair in model["merges"]]),
        "kinds": [3 if token in SPECIAL else 1 for token in tokens],
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(changes.get("kind", "gpt2"))
    writer.add_tokenizer_pre(stored["pre"])
    writer.add_token_list(stored["tokens"])
    writer.add_token_types(stored["kinds"])
    writer.add_token_merges(stored["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe"])
def test_gguf_agrees_with_tokenizer_json(rule, tmp_path):
    inner = train(rule)
    inner.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|im_end|>"}}
    marked = "\ufeff" + json.dumps(settings)  # as editors on Windows save it
    (tmp_path / "tokenizer_config.json").write_text(marked, encoding="utf-8")
    write(tmp_path / "x.gguf", inner, rule=rule)
    ours, theirs = load_tokenizer(tmp_path / "x.gguf"), load_tokenizer(tmp_path)
    for found in (ours, theirs):
        assert (found.vocab, found.end, found.separator) == (inner.get_vocab_size(), 2, 0)
    for text in TEXTS:
        for special in (False, True):
            tokens = ours.encode(text, special=special)
            assert tokens == theirs.encode(text, special=special)
            assert tokens[:1] == [1] or rule != "llama-bpe" or not special
        assert ours.decode(ours.encode(text, special=False)) == text
    chat = ours.encode(TEXTS[-1], special=False)
    assert (chat[0], chat[-1]) == (1, 2)
    digits = [ours.decode([token]) for token in ours.encode("2048", special=False)]
    assert digits == ["2", "0", "4", "8"] or rule != "smollm"


def test_json_alone(tmp_path):
    file = tmp_path / "tokenizer.json"
    train("gpt-2").save(str(file))
    tokenizer = load_tokenizer(file)
    assert (tokenizer.end, tokenizer.separator) == (None, 0)


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    inner, path = train("smollm"), tmp_path / "x.gguf"
    for changes, message in [
        ({"rule": "tekken"}, "pre-tokenizer 'tekken': only 'gpt-2', 'smollm' and 'llama-bpe'"),
        ({"kind": "llama"}, "tokenizer 'llama': only 'gpt2' can be read"),
        ({"merges": ["zz qq"]}, "the tokenizer's merges are damaged"),
        ({"merges": ["zz"]}, "the tokenizer's merges are damaged"),
        ({"tokens": ["a", "a"]}, "2 tokens, 1 different"),
    ]:
        write(path, inner, **changes)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'ssvq_jax\["):
        load_tokenizer(tmp_path)
