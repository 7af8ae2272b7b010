"""Llama folders: equal to `transformers`, and imported strictly."""

import functools
import json

import chex
import jax
import numpy as np
import pytest
from tiny_llama import TINY, assert_close, tokens_of

from ssvq_jax.models.import_llama import (
    import_llama,
    llama_shapes,
    load_llama_folder,
    read_llama_config,
)
from ssvq_jax.models.llama import CONFIGS, Llama

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
REFERENCES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "heads alone": {"num_key_value_heads": 6},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
}


def reference(**changes):
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install the test extra")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    settings = {
        "vocab_size": 61,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.3)
    return model


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", REFERENCES)
def test_equals_transformers(case, scan, tmp_path):
    model = reference(**REFERENCES[case])
    model.save_pretrained(tmp_path)
    config, variables = load_llama_folder(tmp_path, scan=scan)
    tokens = tokens_of(2, 41)
    apply = functools.partial(Llama(config, scan=scan).apply, mutable=["intermediates"])
    logits, sown = jax.jit(apply)(variables, tokens)

    import torch

    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens)), output_hidden_states=True)
    assert_close(logits, theirs.logits)
    layers = sown["intermediates"]
    for i in range(2):  # what the reference lists for the last layer is after the norm
        ours = layers["layers"]["tokens"][0][i] if scan else layers[f"layers_{i}"]["tokens"][0]
        assert_close(ours, theirs.hidden_states[i + 1])


def test_sharded_folder_of_bfloat16(tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    model = reference(tie_word_embeddings=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, variables = load_llama_folder(tmp_path)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    embedding = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(variables["params"]["embed"]["embedding"], embedding)
    assert not config.tied
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["lm_tail"] = min(listed["weight_map"].values())
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="lists 1 missing tensors, e.g. 'lm_tail'"):
        load_llama_folder(tmp_path)


# What Hugging Face hosts as config.json, but for settings of training and tokens.
PUBLISHED = {
    "smollm2_135m": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "llama3_2_1b": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize(
    ("name", "count"), [("smollm2_135m", 134_515_008), ("llama3_2_1b", 1_235_814_400)]
)
def test_published_sizes(name, count):
    assert read_llama_config(PUBLISHED[name], name) == CONFIGS[name]
    shapes = llama_shapes(CONFIGS[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': only 'llama'"),
        ({"attention_bias": True}, "attention_bias=True: only False"),
        ({"head_dim": 32}, "head_dim=32"),
        ({"rope_scaling": {"type": "yarn"}}, "type 'yarn': only 'default', 'linear' and 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "c.json has no 'factor'"),
    ],
)
def test_settings_that_cannot_be_read(changes, message):
    with pytest.raises(ValueError, match=message):
        read_llama_config(PUBLISHED["smollm2_135m"] | changes, "c.json")


def hub_tensors(config):
    """Tensors in the names of Hugging Face."""
    sizes = {"q": 48, "k": 16, "v": 16, "o": 48}
    made = {"model.embed_tokens.weight": (61, 48), "model.norm.weight": (48,)}
    for i in range(config.depth):
        layer = f"model.layers.{i}."
        made |= {f"{layer}self_attn.{name}_proj.weight": (sizes[name], 48) for name in "qkvo"}
        made |= {f"{layer}mlp.{name}_proj.weight": (40, 48) for name in ("gate", "up")}
        made[f"{layer}mlp.down_proj.weight"] = (48, 40)
        made |= {f"{layer}{n}_layernorm.weight": (48,) for n in ("input", "post_attention")}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in made.items()}


def test_importer_is_strict():
    shapes = llama_shapes(TINY)
    tensors = hub_tensors(TINY)
    convert = functools.partial(import_llama, shapes=shapes, config=TINY, source="x.safetensors")
    variables = convert(tensors)
    kernel = variables["params"]["layers_1"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["model.layers.1.mlp.down_proj.weight"].T)
    # Of the bare LlamaModel, with the old buffers, or with the tied kernel spelled out: the same.
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    again = convert(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    for other in (convert(bare), again):
        chex.assert_trees_all_equal(other, variables)

    name = "model.layers.2.self_attn.k_proj.weight"
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(ValueError, match=r"no tensor fills: params/layers_2/attn/k/kernel"):
        convert(missing)
    with pytest.raises(ValueError, match=r"no place for: model.layers.3.mlp.up_proj.weight"):
        convert(tensors | {"model.layers.3.mlp.up_proj.weight": np.ones((40, 48))})
    with pytest.raises(ValueError, match=r"k_proj.weight \[48, 48\] for leaf"):
        convert(tensors | {name: np.ones((48, 48))})
    with pytest.raises(ValueError, match="lm_head.weight is not embed_tokens.weight"):
        convert(tensors | {"lm_head.weight": np.ones((61, 48))})


def test_folder_without_files(tmp_path):
    with pytest.raises(ValueError, match=r"config.json cannot be read .* give a model's folder"):
        load_llama_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["smollm2_135m"]))
    with pytest.raises(ValueError, match=r"holds no .safetensors file"):
        load_llama_folder(tmp_path)
