"""Language models on the command line: compressed, judged by a text, continuing one."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("tokenizers", reason="tokenizers need the package of that name")

import tokenizers

from ssvq_jax.cli.main import main
from ssvq_jax.data.text import read_documents, token_windows
from ssvq_jax.models.import_llama import llama_shapes, load_llama_folder
from ssvq_jax.models.llama import Llama, LlamaConfig
from ssvq_jax.models.tokenizer import load_tokenizer
from ssvq_jax.models.variables import paths_of
from ssvq_jax.training.perplexity import make_perplexity

# All kernels of one shape: what encodes them is compiled once.
CONFIG = LlamaConfig(vocab=300, width=32, depth=2, heads=2, kv_heads=2, hidden=32, context=64)
SETTINGS = {
    "model_type": "llama",
    "vocab_size": CONFIG.vocab,
    "hidden_size": CONFIG.width,
    "num_hidden_layers": CONFIG.depth,
    "num_attention_heads": CONFIG.heads,
    "num_key_value_heads": CONFIG.kv_heads,
    "intermediate_size": CONFIG.hidden,
    "max_position_embeddings": CONFIG.context,
    "rope_theta": CONFIG.rope_theta,
    "rms_norm_eps": CONFIG.norm_epsilon,
    "tie_word_embeddings": True,
}
TEXT = "the low lower lowest newer wider of lower new low " * 20
READ = ("--window", 32, "--windows", 3)
README = (Path(__file__).parents[2] / "README.md").read_text()
(BLOCK,) = re.findall(r"```bash\n([^`]*ssvq generate.*?)```", README, flags=re.DOTALL)
COMMANDS = {line.split()[1]: shlex.split(line)[1:] for line in BLOCK.splitlines()[1:]}


@pytest.fixture(autouse=True)
def users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def write_tokenizer(folder, text=TEXT, size=280):
    """A byte-level BPE with the document's end as its first token."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def write_weights(folder):
    """Random weights under the names that transformers gives them."""
    draw = np.random.default_rng(1)
    tensors = {}
    for path, leaf in paths_of(llama_shapes(CONFIG)).items():
        x = draw.normal(0, 0.3, leaf.shape).astype(np.float32)
        name = path.removeprefix("params/").replace("layers_", "layers.").replace("/", ".")
        for ours, theirs in [
            ("embed.embedding", "embed_tokens.weight"),
            ("attn_norm.scale", "input_layernorm.weight"),
            ("mlp_norm.scale", "post_attention_layernorm.weight"),
            ("norm.scale", "norm.weight"),
            (".attn.", ".self_attn."),
            (".kernel", "_proj.weight"),
        ]:
            name = name.replace(ours, theirs)
        x = x.T if path.endswith("kernel") else x
        tensors[f"model.{name}"] = np.ascontiguousarray(x)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model's folder as on the Hugging Face hub, and a text; nobody writes to it."""
    folder = tmp_path_factory.mktemp("language") / "tiny"
    write_tokenizer(folder)
    write_weights(folder)
    (folder / "text.txt").write_text(TEXT)
    (folder / "articles.txt").write_text(TEXT[::-1])
    return folder


def as_in_readme(name, original):
    """A command of the README, for our model and text."""
    places = {
        "--model": "--weights",
        "smollm2_135m": str(original),
        "runs/language": str(original.parent / "run"),
        "articles.txt": str(original / "articles.txt"),
        "held_out.txt": str(original / "text.txt"),
    }
    read = READ if name == "compress" else ()  # eval says it there
    places |= {"512": "32", "16": "3"}
    return [*(places.get(word, word) for word in COMMANDS[name]), *map(str, read)]


@pytest.fixture(scope="module")
def compressed(original):
    """What one run of `ssvq compress` left."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main(as_in_readme("compress", original))
    return original.parent / "run"


@pytest.fixture
def ssvq(capsys):
    def run(*arguments):
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def fails(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def test_compress_judges_before_and_after(original, compressed):
    results = json.loads((compressed / "results.json").read_text())
    config, variables = load_llama_folder(original)
    assert config == CONFIG
    tokenizer = load_tokenizer(original)
    documents = map(tokenizer.encode, read_documents([original / "text.txt"]))
    windows = list(token_windows(documents, 32, separator=tokenizer.separator))[:3]
    model = Llama(config)
    evaluate = make_perplexity(lambda params, tokens: model.apply({"params": params}, tokens))
    expected = evaluate(variables["params"], windows)
    assert results["float"]["tokens"] == 3 * 31
    assert results["float"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert results["after"]["perplexity"] != results["float"]["perplexity"]
    calibration = results["calibration"]
    assert calibration["calibration_windows"] == 3
    assert calibration["output_error_after"] < calibration["output_error_before"]
    assert 0.3 < results["agreement"] < 1
    assert results["file_bytes"] == (compressed / "model.safetensors").stat().st_size
    methods = {leaf["path"]: leaf["settings"] for leaf in results["leaves"]}
    assert len(methods) == 7 * CONFIG.depth + 1
    assert methods["layers_1/mlp/down/kernel"] == "4 bit a channel"
    assert methods["embed/embedding"] == "8 bit a channel"
    assert load_tokenizer(compressed).checksum == tokenizer.checksum


def test_a_run_and_its_file_alone_are_judged_the_same(original, compressed, ssvq, tmp_path):
    results = json.loads((compressed / "results.json").read_text())
    text = ("--text", original / "text.txt", *READ)
    by_run = json.loads(ssvq(*as_in_readme("eval", original), "--json"))
    file = shutil.copy(compressed / "model.safetensors", tmp_path / "moved.safetensors")
    eval_file = ("eval", "--weights", file, *text, "--tokenizer", original, "--json")
    by_file = json.loads(ssvq(*eval_file))
    told = json.loads(ssvq(*eval_file, "--reference", original))
    for found in (by_run, by_file, told):
        assert found["after"]["perplexity"] == pytest.approx(results["after"]["perplexity"])
        assert found["file_bytes"] == results["file_bytes"]
    for found in (by_run, told):
        assert found["agreement"] == pytest.approx(results["agreement"])
        assert found["float"] == pytest.approx(results["float"])
    assert "agreement" not in by_file  # nothing says where the float weights are
    assert json.loads((compressed / "eval-text.json").read_text())["after"] == by_run["after"]
    printed = ssvq("inspect", file)
    assert "task language" in printed
    assert "not damaged" in printed
    assert f"{results['after']['perplexity']}" in printed


def test_generate_is_the_same_from_run_and_file(original, compressed, ssvq, tmp_path):
    file = shutil.copy(compressed / "model.safetensors", tmp_path / "moved.safetensors")
    capital = "The capital of France is"
    prompt = ("generate", "--prompt", capital, "--steps", 8)
    found = ssvq(*as_in_readme("generate", original), "--steps", 8)
    assert found.startswith(capital)
    assert found != f"{capital}\n"
    assert ssvq(*prompt, "--weights", file, "--tokenizer", compressed) == found
    drawn = [
        ssvq(*prompt, "--weights", original, "--temperature", "1.5", "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stacked_layers_say_the_same(original, compressed, ssvq, tmp_path):
    recipe = ("--scan", "True", "--recipe", "uniform-4bit-scanned")
    text = ("--eval-text", original / "text.txt", *READ)
    calibration = ("--calibration-text", original / "articles.txt", "--feedback")
    out = ("--out", tmp_path / "stacked")
    ssvq("compress", "--weights", original, *recipe, *text, *calibration, *out)
    there, here = (
        json.loads((folder / "results.json").read_text())
        for folder in (compressed, tmp_path / "stacked")
    )
    assert here["after"]["perplexity"] == pytest.approx(there["after"]["perplexity"], rel=1e-4)
    assert here["stored_bytes"] == there["stored_bytes"]
    text = ("--text", original / "text.txt", *READ, "--json")
    found = json.loads(ssvq("eval", "--weights", tmp_path / "stacked", *text))
    assert found["agreement"] == here["agreement"]


def test_float_weights_are_judged_and_a_text_is_no_must(original, ssvq, tmp_path):
    text = ("--text", original / "text.txt", "--window", 8)
    found = json.loads(ssvq("eval", "--weights", original, *text, "--json"))
    assert (found["windows"], found["after"]["tokens"]) == (16, 16 * 7)
    assert "agreement" not in found
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(original / name, tmp_path / "bare")
    printed = ssvq("compress", "--weights", tmp_path / "bare", "--recipe", "uniform-2bit",
                   "--out", tmp_path / "out")  # fmt: skip
    assert "perplexity" not in printed
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert "comes without a tokenizer" in fails(
        "eval", "--weights", tmp_path / "out", "--text", original / "text.txt"
    )


def test_pack_keeps_what_a_file_says(compressed, original, ssvq, tmp_path):
    ssvq("pack", "--weights", compressed, "--codec", "entropy", "--out", "small.safetensors")
    found = ssvq("generate", "--prompt", "low", "--weights", "small.safetensors", "--tokenizer",
                 original, "--steps", 3)  # fmt: skip
    assert found == ssvq("generate", "--prompt", "low", "--weights", compressed, "--steps", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--weights", "MODEL"], "no text: give --text"),
        (["eval", "--weights", "MODEL", "--text", "no.txt", "--window", "9"], "no text at no.txt"),
        (["eval", "--weights", "MODEL", "--text", "blank.txt", "--window", "9"],
         "blank.txt holds no text"),
        (["eval", "--weights", "MODEL", "--text", "bytes.txt", "--window", "9"],
         "bytes.txt is not text in UTF-8"),
        (["eval", "--weights", "MODEL", "--text", "no.bz2", "--window", "9"],
         "cannot be read as a Wikipedia dump"),
        (
            ["eval", "--weights", "MODEL", "--text", "short.txt", "--window", "64"],
            "short.txt: 6 tokens, and 1 window of 64 needs 64: give more text",
        ),
        (
            ["eval", "--weights", "MODEL", "--text", "short.txt", "--window", "2", "--windows",
             "9"],
            "6 tokens, and 9 windows of 2 need 18",
        ),
        (["eval", "--weights", "MODEL", "--text", "short.txt"], "window=512: give at most 64"),
        (["eval", "--weights", "MODEL", "--text", "short.txt", "--window", "1"], "window=1: give"),
        (["eval", "--weights", "MODEL", "--images", "x"], "--images is for models that take"),
        (
            ["eval", "--weights", "MODEL", "--text", "short.txt", "--window", "2", "--reference",
             "MODEL"],
            "--reference is for compressed weights",
        ),
        (["eval", "--weights", "RUN", "--model", "smollm2_135m"], "no text: give --text"),
        (
            ["eval", "--weights", "RUN", "--model", "smollm2_135m", "--text", "short.txt"],
            "vocab=300, and model 'smollm2_135m' 49152: leave --model out",
        ),
        (
            ["eval", "--weights", "RUN", "--text", "short.txt", "--tokenizer", "other"],
            "other is the tokenizer of another model",
        ),
        (["eval", "--model", "smollm2_135m", "--text", "short.txt"], "ssvq models fetch smollm2"),
        (["eval", "--model", "llama3_2_1b", "--text", "short.txt"], "comes without weights"),
        (["eval", "--model", "deit_digits", "--text", "short.txt"], "--text is for language"),
        (["compress", "--weights", "RUN", "--out", "x"], "is compressed already"),
        (["compress", "--weights", "MODEL", "--out", "x", "--data", "y"], "--data is for mod"),
        (["compress", "--weights", "MODEL", "--out", "x", "--windows", "3"], "are for --text"),
        (["compress", "--weights", "MODEL", "--out", "MODEL"], "is where the weights are"),
        (
            ["compress", "--weights", "MODEL", "--out", "x", "--text", "a", "--eval-text", "b"],
            "--text and --eval-text are the same",
        ),
        (["compress", "--model", "deit_digits", "--out", "x", "--window", "9"], "--window is for"),
        (["compress", "--model", "deit_digits", "--out", "x", "--feedback"], "are for language"),
        (["compress", "--weights", "MODEL", "--out", "x", "--feedback"], "--feedback needs a text"),
        (
            ["compress", "--weights", "MODEL", "--out", "x", "--calibration-text", "short.txt",
             "--text", "short.txt", "--window", "2"],
            "short.txt is in --calibration-text and in --text",
        ),
        (
            ["compress", "--weights", "MODEL", "--out", "x", "--feedback", "--recipe", "crvq.json",
             "--calibration-text", "short.txt"],
            "of method 'channel_relaxed' cannot be encoded in parts",
        ),
        (["pack", "--weights", "RUN", "--out", "x", "--data", "cifar10"], "--data is for images"),
        (["generate", "--prompt", "a"], "no model: give --model smollm2_135m"),
        (["generate", "--prompt", "a", "--model", "deit_digits"], "is no language model"),
        (["generate", "--prompt", "", "--weights", "MODEL"], "a prompt of 0 tokens"),
        (["generate", "--prompt", "a", "--weights", "MODEL", "--seed", "1"], "give --temperature"),
        (["generate", "--prompt", "a", "--weights", "MODEL", "--steps", "99"], "context of 64"),
        (["generate", "--prompt", "a", "--weights", "no.gguf"], "no weights at no.gguf"),
        (["train", "--model", "smollm2_135m", "--data", "x", "--out", "x"], "is for language"),
    ],
)  # fmt: skip
def test_errors_say_what_to_change(arguments, message, original, compressed, tmp_path):
    (tmp_path / "blank.txt").write_text("\n ")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "no.bz2").write_bytes(b"no")
    relaxed = {"method": "channel_relaxed", "codewords": 8}
    rules = [
        {"pattern": ".*kernel", "quantizer": relaxed}, {"pattern": ".*", "quantizer": None}
    ]  # fmt: skip
    (tmp_path / "crvq.json").write_text(json.dumps({"format": 1, "rules": rules}))
    (tmp_path / "short.txt").write_text("low low low low low"[:19])
    write_tokenizer(tmp_path / "other", "entirely other words " * 9, 290)
    places = {"MODEL": str(original), "RUN": str(compressed)}
    text = fails(*(places.get(argument, argument) for argument in arguments))
    assert text.startswith("ssvq: error: ")
    assert message in text
    assert not (tmp_path / "x").exists()


def test_a_plan_of_a_language_model_is_seen_before_anything_is_read(ssvq):
    printed = ssvq("plan", "--model", "smollm2_135m", "--recipe", "ssvq-21x-scanned", "--scan")
    assert "layers/mlp/gate/kernel" in printed
    assert "model 'smollm2_135m' has neither classes" in fails(
        "plan", "--model", "smollm2_135m", "--classes", "3"
    )


def test_finetune_learns_the_next_token_and_what_the_teacher_says(original, ssvq, tmp_path):
    (tmp_path / "held_out.txt").write_text(TEXT[::-1])
    finetune = ("finetune", "--weights", original, "--recipe", "ssvq-21x", "--out", "tuned",
                "--text", original / "text.txt", "--eval-text", "held_out.txt", *READ,
                "--batch-size", 2, "--remat", "--optimizer.accumulate", 2,
                "--distill", "0.5")  # fmt: skip
    ssvq(*finetune, "--steps", 24)
    results = json.loads((tmp_path / "tuned/results.json").read_text())
    records = [json.loads(x) for x in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    parts = [record for record in records if "teacher_loss" in record]
    assert parts[-1]["label_loss"] < parts[0]["label_loss"]
    assert results["after"]["examples"] == 3 * 31
    assert results["eval_split"] == "held_out.txt"
    text = ("--text", "held_out.txt", *READ, "--json")
    found = json.loads(ssvq("eval", "--weights", "tuned", *text))
    assert found["after"]["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)
    assert found["after"]["accuracy"] == pytest.approx(results["after"]["accuracy"])
    assert "agreement" in found
    assert "is finished: reading it back" in ssvq(*finetune, "--steps", 24)
    assert "steps: 24 there, 26 now" in fails(*finetune, "--steps", 26)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a.txt"], "give --text to train on, and --eval-text to judge by"),
        (["--text", "a.txt", "--eval-text", "a.txt"], "have a file in common"),
        (["--text", "a.txt", "--eval-text", "b.txt", "--augment", "cifar"], "--augment is for"),
        (["--text", "a.txt", "--eval-text", "b.txt"], "no text at a.txt"),
    ],
)
def test_finetune_says_what_to_change(arguments, message, original, tmp_path):
    finetune = ("finetune", "--weights", original, "--recipe", "vq-21x", "--out", "x")
    assert message in fails(*finetune, "--window", "9", *arguments)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_published_weights_at_four_bits(ssvq, monkeypatch, tmp_path):
    """See tests/models/test_published_smollm2.py for the folder."""
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    folder = Path(os.environ.get("SSVQ_TEST_WEIGHTS", "/nowhere"))
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    dump = folder / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    if not (file.exists() and dump.exists()):
        pytest.skip("SSVQ_TEST_WEIGHTS is no folder with SmolLM2 and a dump of Wikipedia")
    out = tmp_path / "small"
    ssvq("compress", "--weights", file, "--model", "smollm2_135m", "--recipe", "uniform-4bit",
         "--out", out, "--text", dump, "--windows", 4)  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["note"].startswith("already quantized: 106,168,320 weights to 5 bits (Q4_1)")
    assert 15 < results["float"]["perplexity"] < results["after"]["perplexity"] < 200
    assert 0.3 < results["agreement"] < 1
    found = json.loads(ssvq("eval", "--weights", out, "--text", dump, "--windows", 4, "--json"))
    assert found["agreement"] == pytest.approx(results["agreement"])
    prompt = "The capital of France is"
    going_on = ("generate", "--prompt", prompt, "--steps", 12, "--weights")
    said = [ssvq(*going_on, weights) for weights in (out, file)]
    assert said[0].startswith(prompt)
    assert said[1].startswith(f"{prompt} Paris")
