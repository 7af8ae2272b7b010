"""Language models on the command line: compressed, judged by a text, continuing one."""

import dataclasses
import json
import shutil

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

CONFIG = LlamaConfig(vocab=300, width=32, depth=2, heads=2, kv_heads=1, hidden=48, context=64)
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
    return folder


@pytest.fixture(scope="module")
def compressed(original):
    """What one run of `ssvq compress` left."""
    out = original.parent / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main([*map(str, ("compress", "--weights", original, "--recipe", "uniform-4bit", "--out",
                         out, "--text", original / "text.txt", *READ))])  # fmt: skip
    return out


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
    assert config == dataclasses.replace(CONFIG)
    tokenizer = load_tokenizer(original)
    documents = map(tokenizer.encode, read_documents([original / "text.txt"]))
    windows = list(token_windows(documents, 32, separator=tokenizer.separator))[:3]
    model = Llama(config)
    evaluate = make_perplexity(lambda params, tokens: model.apply({"params": params}, tokens))
    expected = evaluate(variables["params"], windows)
    assert results["float"]["tokens"] == 3 * 31
    assert results["float"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert results["after"]["perplexity"] != results["float"]["perplexity"]
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
    by_run = json.loads(ssvq("eval", "--weights", compressed, *text, "--json"))
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
    prompt = ("generate", "--prompt", "the lower ", "--steps", 8)
    found = ssvq(*prompt, "--weights", compressed)
    assert found.startswith("the lower ")
    assert found != "the lower \n"
    assert ssvq(*prompt, "--weights", file, "--tokenizer", compressed) == found
    drawn = [
        ssvq(*prompt, "--weights", original, "--temperature", "1.5", "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stacked_layers_say_the_same(original, compressed, ssvq, tmp_path):
    recipe = ("--scan", "True", "--recipe", "uniform-4bit-scanned")
    text = ("--eval-text", original / "text.txt", *READ)
    ssvq("compress", "--weights", original, *recipe, *text, "--out", tmp_path / "stacked")
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
    assert (tmp_path / "small.safetensors").stat().st_size < (
        compressed / "model.safetensors"
    ).stat().st_size
    found = ssvq("generate", "--prompt", "low", "--weights", "small.safetensors", "--tokenizer",
                 original, "--steps", 3)  # fmt: skip
    assert found == ssvq("generate", "--prompt", "low", "--weights", compressed, "--steps", 3)
