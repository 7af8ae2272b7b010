"""GGUF files that the package `gguf` writes here, read back."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

from ssvq_jax.models.import_gguf import load_gguf  # noqa: E402
from ssvq_jax.models.import_llama import import_llama, llama_shapes  # noqa: E402
from ssvq_jax.models.llama import Llama, LlamaConfig  # noqa: E402
from ssvq_jax.models.rope import llama3_factors  # noqa: E402

TYPES = gguf.GGMLQuantizationType
TINY = LlamaConfig(
    vocab=40, width=64, depth=2, heads=4, kv_heads=2, hidden=96, context=32, rope_theta=1000.0
)
KERNELS = {
    "attn_q": ("self_attn.q_proj", (64, 64)),
    "attn_k": ("self_attn.k_proj", (32, 64)),
    "attn_v": ("self_attn.v_proj", (32, 64)),
    "attn_output": ("self_attn.o_proj", (64, 64)),
    "ffn_gate": ("mlp.gate_proj", (96, 64)),
    "ffn_up": ("mlp.up_proj", (96, 64)),
    "ffn_down": ("mlp.down_proj", (64, 96)),
}


def interleaved(rows, heads):
    """What llama.cpp's converter does to query and key kernels of Hugging Face."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, kind, *, tied=True, skip=(), extra=(), architecture="llama", metadata=()):
    """Writes a random model; returns its weights as Hugging Face names and orders them."""
    random = np.random.default_rng(0)
    hub = {}
    writer = gguf.GGUFWriter(path, architecture)

    def add(name, hub_name, shape, kind=kind):
        if name in skip:
            return
        weights = random.normal(size=shape).astype(np.float32)
        data = gguf.quants.quantize(weights, kind)
        hub[hub_name] = gguf.quants.dequantize(data, kind)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            data = gguf.quants.quantize(interleaved(weights, shape[0] // 16), kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    plain = TYPES.F32
    for i in range(2):
        for name, (hub_name, shape) in KERNELS.items():
            add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{hub_name}.weight", shape)
        for name, hub_name in [("attn", "input"), ("ffn", "post_attention")]:
            hub_name = f"model.layers.{i}.{hub_name}_layernorm.weight"
            add(f"blk.{i}.{name}_norm.weight", hub_name, (64,), plain)
    add("token_embd.weight", "model.embed_tokens.weight", (40, 64), TYPES.Q8_0)
    add("output_norm.weight", "model.norm.weight", (64,), plain)
    if not tied:
        add("output.weight", "lm_head.weight", (40, 64))
    for name, weights in extra:
        writer.add_tensor(name, np.asarray(weights, np.float32))
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata:
        add_value = writer.add_string if isinstance(value, str) else writer.add_float32
        add_value(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hub


@pytest.mark.parametrize(
    ("kind", "tied", "scan", "note"),
    [
        (TYPES.F32, True, False, "2,560 weights to 8.5 bits (Q8_0)"),
        (TYPES.Q8_0, False, False, "already quantized: 66,560 weights to 8.5 bits (Q8_0); 320 at"),
        (TYPES.Q4_1, True, True, "already quantized: 61,440 weights to 5 bits (Q4_1); 2,560 at"),
    ],
)
def test_round_trip(kind, tied, scan, note, tmp_path):
    hub = write(tmp_path / "x.gguf", kind, tied=tied)
    config, variables, stored = model = load_gguf(tmp_path / "x.gguf", scan=scan)
    assert config.tied == tied
    assert config.norm_epsilon == np.float32(1e-5)
    shapes = llama_shapes(config, scan=scan)
    wanted = import_llama(hub, shapes, config, source="the tensors before they were written")
    chex.assert_trees_all_equal(variables, wanted)
    logits = Llama(config, scan=scan).apply(variables, jnp.array([[1, 2, 3]]))
    assert np.isfinite(logits).all()
    assert sum(part.weights for part in stored) == sum(x.size for x in jax.tree.leaves(shapes))
    assert note in model.note or kind == TYPES.F32


def test_full_precision_has_no_note(tmp_path):
    write(tmp_path / "x.gguf", TYPES.F32)
    stored = load_gguf(tmp_path / "x.gguf").stored
    assert {part.name: part.bits for part in stored} == {"F32": 32.0, "Q8_0": 8.5}
    model = load_gguf(tmp_path / "x.gguf")
    assert model._replace(stored=tuple(x for x in stored if x.bits == 32)).note == ""


def test_rope_factors(tmp_path):
    scaling = {"factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "trained_length": 64}
    factors = llama3_factors(16, 1000.0, **scaling)
    write(tmp_path / "llama3.gguf", TYPES.F32, extra=[("rope_freqs.weight", factors)])
    found = load_gguf(tmp_path / "llama3.gguf").config.rope_factors
    np.testing.assert_allclose(found, factors, rtol=1e-6)
    linear = [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)]
    write(tmp_path / "linear.gguf", TYPES.F32, metadata=linear)
    assert load_gguf(tmp_path / "linear.gguf").config.rope_factors == (4.0,) * 8
    yarn = [("llama.rope.scaling.type", "yarn")]
    write(tmp_path / "yarn.gguf", TYPES.F32, metadata=yarn)
    with pytest.raises(ValueError, match="rope scaling 'yarn': only 'linear'"):
        load_gguf(tmp_path / "yarn.gguf")


def test_refuses(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match="no GGUF file"):
        load_gguf(path)
    path.write_bytes(b"not a model, but long enough to look into")
    with pytest.raises(ValueError, match=r"x.gguf is not a GGUF file, or is damaged"):
        load_gguf(path)
    write(path, TYPES.F32, architecture="qwen2")
    with pytest.raises(ValueError, match=r"architecture 'qwen2': only 'llama'"):
        load_gguf(path)
    write(path, TYPES.F32, skip=["blk.1.ffn_up.weight"])
    with pytest.raises(ValueError, match=r"no tensor fills: params/layers_1/mlp/up/kernel"):
        load_gguf(path)
    layer = [f"blk.1.{name}.weight" for name in (*KERNELS, "attn_norm", "ffn_norm")]
    write(path, TYPES.F32, skip=layer)
    with pytest.raises(ValueError, match="tensors of 1 layers, and should have 2"):
        load_gguf(path)
    write(path, TYPES.F32, skip=["token_embd.weight"])
    with pytest.raises(ValueError, match=r"no tensor 'token_embd.weight'"):
        load_gguf(path)
    write(path, TYPES.F32, extra=[("blk.0.attn_q.bias", np.zeros(64))])
    with pytest.raises(ValueError, match=r"no place for: blk.0.attn_q.bias"):
        load_gguf(path)
    write(path, TYPES.F32, metadata=[("llama.rope.dimension_count", "8")])
    with pytest.raises(ValueError, match=r"metadata 'llama.rope.dimension_count' is '8'"):
        load_gguf(path)


@pytest.mark.parametrize("kept", [0.999, 0.7, 0.05, 0.002, 0])
def test_truncated_file(kept, tmp_path):
    path = tmp_path / "x.gguf"
    write(path, TYPES.Q8_0)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"x.gguf is not a GGUF file, or is damaged or cut short"):
        load_gguf(path)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"need the package gguf: pip install 'ssvq_jax\["):
        load_gguf(tmp_path / "x.gguf")
