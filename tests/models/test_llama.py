"""Llama against the reference of `transformers`, and against itself: scan, cache, generation."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.models.generate import empty_cache, extend, generate
from ssvq_jax.models.import_llama import (
    import_llama,
    llama_shapes,
    load_llama_folder,
    read_llama_config,
    stack_layers,
    unstack_layers,
)
from ssvq_jax.models.llama import CONFIGS, Llama, LlamaConfig
from ssvq_jax.models.variables import paths_of

TINY = LlamaConfig(vocab=61, width=48, depth=3, heads=6, kv_heads=2, hidden=40, context=64)
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


def tensors_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens):
    return model.apply(variables, tokens)


@functools.cache
def random_variables(config, *, scan=False):
    random = np.random.default_rng(1)
    noise = lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32)  # noqa: E731
    variables = jax.tree.map(noise, llama_shapes(config))
    return stack_layers(variables) if scan else variables


def tokens_of(*shape):
    return jnp.asarray(np.random.default_rng(2).integers(0, TINY.vocab, shape))


def assert_close(ours, theirs, most=1e-4):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() <= most


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
    with pytest.raises(ValueError, match="lacks 1 tensors of its index, e.g. 'lm_tail'"):
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


def test_leaf_paths():
    config = dataclasses.replace(TINY, tied=False)
    layer = {f"attn/{name}/kernel" for name in "qkvo"}
    layer |= {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    layer |= {"attn_norm/scale", "mlp_norm/scale"}
    rest = {"params/embed/embedding", "params/norm/scale", "params/lm_head/kernel"}
    single = {f"params/layers_{i}/{path}" for i in range(3) for path in layer}
    assert set(paths_of(llama_shapes(config))) == rest | single
    stacked = paths_of(llama_shapes(config, scan=True))
    assert set(stacked) == rest | {f"params/layers/{path}" for path in layer}
    assert stacked["params/layers/attn/k/kernel"].shape == (3, 48, 16)


def test_scan_and_remat_change_nothing():
    variables = random_variables(TINY)
    stacked = stack_layers(variables)
    for found, wanted in zip(
        jax.tree.leaves(unstack_layers(stacked)), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    tokens = tokens_of(2, 12)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_gradient(model, variables):
        return jax.grad(loss, argnums=1, has_aux=True)(model, variables)

    def loss(model, variables):
        logits = model.apply(variables, tokens)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1)), logits

    wanted, wanted_logits = loss_and_gradient(Llama(TINY), variables)
    for scan in (False, True):
        for remat in (False, True):
            model = Llama(TINY, scan=scan, remat=remat)
            given = stacked if scan else variables
            found, logits = loss_and_gradient(model, given)
            assert_close(logits, wanted_logits, 1e-6)
            found = unstack_layers(found) if scan else found
            jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, wanted)


@pytest.mark.parametrize("scan", [False, True])
def test_cache_gives_the_logits_of_the_full_forward(scan):
    model = Llama(TINY, scan=scan)
    variables = random_variables(TINY, scan=scan)
    tokens = tokens_of(2, 12)
    full = forward(model, variables, tokens)
    cache = empty_cache(model, 2, 15)
    step = jax.jit(extend, static_argnums=0)
    parts = []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        logits, cache = step(model, variables["params"], cache, tokens[:, start:stop])
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), full, 2e-6)
    assert int(cache["length"]) == 12


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_generation_takes_the_likeliest_token(scan):
    model = Llama(TINY, scan=scan)
    variables = random_variables(TINY, scan=scan)
    tokens = tokens_of(2, 6)
    found = generate(model, variables["params"], tokens, 6)
    text = jnp.pad(tokens, ((0, 0), (0, 6)))  # what stands after a token does not change its logits
    for i in range(6, 12):
        best = jnp.argmax(forward(model, variables, text)[:, i - 1], axis=-1)
        text = text.at[:, i].set(best)
    np.testing.assert_array_equal(found, text[:, 6:])

    # Sequences that met the end repeat it, the others do not change.
    end = int(found[0, 2])
    ended = np.asarray(generate(model, variables["params"], tokens, 6, end=end))
    for row, free in zip(ended, np.asarray(found), strict=True):
        stop = np.flatnonzero(free == end)
        first = stop[0] if len(stop) else len(free)
        np.testing.assert_array_equal(row[:first], free[:first])
        assert (row[first:] == end).all()


def test_temperature_draws_from_the_softmax():
    model = Llama(dataclasses.replace(TINY, vocab=5))
    variables = random_variables(model.config)
    prompt = jnp.array([[1, 2, 3]])
    draws = 4000
    draw = functools.partial(
        generate, model, variables["params"], jnp.tile(prompt, (draws, 1)), 1, temperature=1.5
    )
    found = draw(key=jax.random.key(5))[:, 0]
    probabilities = jax.nn.softmax(forward(model, variables, prompt)[0, -1] / 1.5)
    shares = np.bincount(found, minlength=5) / draws
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(shares - probabilities) <= 5 * deviation + 1e-6).all()
    np.testing.assert_array_equal(found, draw(key=jax.random.key(5))[:, 0])
    assert (found != draw(key=jax.random.key(6))[:, 0]).any()


def test_generation_refuses():
    model, params = Llama(TINY), random_variables(TINY)["params"]
    with pytest.raises(ValueError, match="4 tokens and 61 steps are more than .* context of 64"):
        generate(model, params, tokens_of(1, 4), 61)
    with pytest.raises(ValueError, match="4 tokens and 0 steps"):
        generate(model, params, tokens_of(1, 4), 0)
    with pytest.raises(ValueError, match=r"temperature=0.5: give 0, or more and a key"):
        generate(model, params, tokens_of(1, 4), 1, temperature=0.5)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16(scan):
    variables = random_variables(TINY, scan=scan)
    tokens = tokens_of(2, 12)
    wanted = np.asarray(forward(Llama(TINY, scan=scan), variables, tokens))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        model = Llama(TINY, jnp.bfloat16, scan=scan)
        logits = forward(model, variables, tokens)
        cache = empty_cache(model, 2, 12)
        step = jax.jit(extend, static_argnums=0)
        cached, _ = step(model, variables["params"], cache, tokens)
    assert logits.dtype == jnp.float32
    for found in (logits, cached):
        assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth=0: give at least 1"),
        ({"heads": 5}, "heads=5 does not divide width=48"),
        ({"kv_heads": 4}, "kv_heads=4 does not divide heads=6"),
        ({"rope_factors": (1.0,)}, "rope_factors has 1 numbers: give 4"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


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
        jax.tree.map(np.testing.assert_array_equal, other, variables)

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
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_llama_folder(tmp_path)
