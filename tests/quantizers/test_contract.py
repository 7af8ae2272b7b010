"""What every registered method must do. A new method is added to CASES and gets all of it."""

import dataclasses
import functools
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax import (
    ChannelRelaxed,
    ChannelRelaxedSignSplit,
    LeafSpec,
    Masked,
    MaskedSignSplit,
    Pyramid,
    Rule,
    SignSplit,
    Uniform,
    Vector,
    load,
    make_plan,
    save,
)
from ssvq_jax.quantizers import METHODS, Calibration, from_json, to_json
from ssvq_jax.quantizers.streams import (
    decode_streams,
    pack_fields,
    stream_shape,
    unpack_fields,
)
from ssvq_jax.tree import split

CASES = {
    "vector": Vector(codewords=8, dim=4, iterations=5),
    "vector float32": Vector(codewords=8, dim=4, iterations=5, codebook_dtype="float32"),
    "vector float16, odd k": Vector(codewords=5, dim=2, iterations=5, codebook_dtype="float16"),
    "vector padded": Vector(codewords=8, dim=3, pad=True, iterations=5),
    "vector axis -2, scaled": Vector(codewords=8, dim=4, axis=-2, channel_scale=True, iterations=5),
    "sign split": SignSplit(codewords=4, dim=8, iterations=5),
    "sign split fixed": SignSplit(codewords=4, dim=8, learn_signs=False, iterations=5),
    "sign split scaled": SignSplit(codewords=4, dim=8, channel_scale=True, iterations=5),
    "sign split padded, small alpha": SignSplit(
        codewords=4, dim=5, pad=True, alpha=0.1, iterations=5
    ),
    "sign split scaled, axes as in Equinox": SignSplit(
        codewords=4, dim=8, channel_scale=True, channel_axis=0, iterations=5
    ),
    "sign split, bfloat16 latents": SignSplit(
        codewords=4, dim=8, iterations=5, latent_dtype="bfloat16"
    ),
    "masked 2:4": Masked(codewords=8, dim=4, keep=2, group=4, iterations=5),
    "masked 3:4, two groups, padded": Masked(
        codewords=8, dim=8, keep=3, group=4, pad=True, iterations=5
    ),
    "masked 1:2, axis -2, scaled": Masked(
        codewords=8, dim=2, keep=1, group=2, axis=-2, channel_scale=True, iterations=5
    ),
    "masked sign split": MaskedSignSplit(codewords=8, dim=8, keep=3, group=8, iterations=5),
    "masked sign split fixed, padded": MaskedSignSplit(
        codewords=4, dim=10, keep=3, group=5, pad=True, learn_signs=False, iterations=5
    ),
    "channel relaxed": ChannelRelaxed(
        codewords=8, dim=4, axis=-2, critical=0.5, extended=2, extended_codewords=4, iterations=5
    ),
    "channel relaxed padded, as in the paper": ChannelRelaxed(
        codewords=7,
        dim=3,
        axis=-2,
        pad=True,
        critical=0.4,
        extended=1,
        extended_codewords=5,
        iterations=5,
        codebook_dtype="float16",
        channel_scale=False,
        importance="inverse",
        order="importance",
    ),
    "channel relaxed sign split": ChannelRelaxedSignSplit(
        codewords=4,
        dim=4,
        axis=-2,
        critical=0.5,
        extended=1,
        extended_codewords=4,
        iterations=5,
    ),
    "pyramid": Pyramid(dim=8, pulses=5, amplitude_bits=3, rotate=False, axis=-2),
    "pyramid rotated": Pyramid(dim=8, pulses=5, amplitude_bits=3),
    "pyramid rotated, padded, no amplitudes": Pyramid(
        dim=7, pulses=5, amplitude_bits=0, seed=1, axis=-2, pad=True
    ),
    "pyramid, several words": Pyramid(dim=8, pulses=60, amplitude_bits=5, rotate=False),
    "uniform 2 bit": Uniform(bits=2),
    "uniform 4 bit, axes as in Equinox": Uniform(bits=4, channel_axis=0),
    "uniform 8 bit a tensor": Uniform(bits=8, per_channel=False),
}
SPECS = {
    "dense": LeafSpec("w", (16, 24), "float32"),
    "bfloat16": LeafSpec("w", (16, 24), "bfloat16"),
    "convolution": LeafSpec("w", (2, 2, 8, 16), "float32"),
    "stacked": LeafSpec("w", (3, 16, 24), "float32", stacked=1),
    "stacked twice": LeafSpec("w", (2, 2, 16, 8), "float32", stacked=2),
}
# Their methods have another case; these take long to compile.
SLOW = ("channel relaxed padded, as in the paper", "pyramid, several words")
# In the daily suite every case meets one kind of leaf, so that every kind meets several methods;
# nightly, every case meets every kind. Tests of dense leaves alone take a method's first case.
KIND_OF = dict(zip(CASES, itertools.cycle(SPECS), strict=False))
FIRST = list({q.method: name for name, q in reversed(CASES.items())}.values())


def nightly_unless(daily):
    return [] if daily else [pytest.mark.slow]


every_case = pytest.mark.parametrize(
    ("quantizer", "spec"),
    [
        pytest.param(
            q, s, id=f"{name}-{kind}",
            marks=nightly_unless(kind == KIND_OF[name] and name not in SLOW),
        )
        for name, q in CASES.items()
        for kind, s in SPECS.items()
    ],
)  # fmt: skip
every_quantizer = pytest.mark.parametrize(
    "quantizer",
    [pytest.param(q, id=name, marks=nightly_unless(name in FIRST)) for name, q in CASES.items()],
)


def weight_of(spec: LeafSpec) -> jax.Array:
    # Heavy tails and one tiny channel, as trained weights have.
    weight = jax.random.t(jax.random.key(1), 5.0, spec.shape)
    return weight.at[..., 0].multiply(1e-6).astype(spec.dtype)


# Compiled once for all tests, which the jit of a bound method would not be. Encoding is not: cases
# share the compiled k-means of their shape.
decode = jax.jit(lambda quantizer, *given: quantizer.decode(*given), static_argnums=(0, 3))
unpack = jax.jit(lambda quantizer, *given: quantizer.unpack(*given), static_argnums=(0, 2))
fields_of_streams = jax.jit(unpack_fields, static_argnums=(0, 2))


@functools.cache
def encode(quantizer, spec, key=0):
    return quantizer.init(jax.random.key(key), weight_of(spec), spec)


@functools.cache
def trained(quantizer, spec):
    """Encoded, and moved off the values that the arrays were made with, as training does."""
    learned, fixed = encode(quantizer, spec)
    moves = {name: 0.01 * np.cos(np.arange(x.size)).reshape(x.shape) for name, x in learned.items()}
    return {name: x + jnp.asarray(moves[name], x.dtype) for name, x in learned.items()}, fixed


@functools.cache
def packed_fields(quantizer, spec):
    return quantizer.pack(*trained(quantizer, spec), spec)


def pointers(tree):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}


@every_quantizer
def test_what_is_trained_shares_no_memory_with_what_is_given(quantizer):
    spec = SPECS["dense"]
    weight = weight_of(spec)
    encoded = quantizer.init(jax.random.key(0), weight, spec)
    assert not pointers(weight) & pointers(encoded)
    try:
        quantizer.slice_parts(spec)
    except ValueError:
        return
    again = quantizer.slice_requantize(weight, encoded.learned, spec, None)
    assert not pointers(weight) & pointers(again)


@every_quantizer
def test_finite_float16_weights_decode_to_finite_ones(quantizer):
    spec = LeafSpec("w", (16, 24), "float16")
    limit = float(jnp.finfo("float16").max)
    sign = jnp.sign(jax.random.normal(jax.random.key(2), spec.shape))
    weight = (limit * sign * jax.random.uniform(jax.random.key(3), spec.shape, minval=0.9)).astype(
        "float16"
    )
    weight = weight.at[0].set(limit).at[:, 1].set(-limit)
    decoded = decode(quantizer, *quantizer.init(jax.random.key(0), weight, spec), spec)
    assert decoded.dtype == jnp.float16
    assert jnp.isfinite(decoded).all()


def test_every_method_has_a_case():
    assert {q.method for q in CASES.values()} == set(METHODS)


@every_case
def test_decode_gives_shape_and_dtype_and_depends_on_the_weight(quantizer, spec):
    decoded = decode(quantizer, *encode(quantizer, spec), spec)
    assert decoded.shape == spec.shape
    assert decoded.dtype == spec.dtype
    weight, decoded = np.float32(weight_of(spec)), np.float32(decoded)
    assert np.sum((weight - decoded) ** 2) < 0.6 * np.sum(weight**2)


@every_case
def test_encoding_can_be_traced(quantizer, spec):
    traced = jax.eval_shape(partial(quantizer.init, spec=spec), jax.random.key(0), weight_of(spec))
    chex.assert_trees_all_equal_shapes_and_dtypes(traced, encode(quantizer, spec))


JITTED = ("sign_split", "uniform", "pyramid")  # the others, whose k-means is the same, nightly


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=nightly_unless(m in JITTED)) for m in METHODS]
)
@pytest.mark.parametrize("kind", ["dense", pytest.param("stacked", marks=pytest.mark.slow)])
def test_encoding_under_jit(method, kind):
    quantizer = next(q for q in CASES.values() if q.method == method)
    spec = SPECS[kind]
    weight = weight_of(spec)
    encode = jax.jit(lambda key, weight: quantizer.init(key, weight, spec))
    decoded = decode(quantizer, *encode(jax.random.key(0), weight), spec)
    assert np.sum((weight - decoded) ** 2) < 0.6 * np.sum(weight**2)


@every_quantizer
def test_decoding_without_jit_gives_the_same_bits(quantizer):
    spec = SPECS["dense"]
    encoded = encode(quantizer, spec)
    decoded = decode(quantizer, *encoded, spec)
    np.testing.assert_array_equal(quantizer.decode(*encoded, spec), decoded)


@every_case
def test_learned_are_floats_with_groups_and_fixed_are_not(quantizer, spec):
    learned, fixed = encode(quantizer, spec)
    assert set(learned) <= set(quantizer.groups)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in learned.values())
    assert not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in fixed.values())
    lead = spec.shape[: spec.stacked]
    assert all(x.shape[: spec.stacked] == lead for x in (learned | fixed).values())


@every_case
def test_pack_and_unpack_keep_every_bit_of_the_decoded_weight(quantizer, spec):
    fields = packed_fields(quantizer, spec)
    restored = decode(quantizer, *unpack(quantizer, fields, spec), spec)
    assert np.array_equal(decode(quantizer, *trained(quantizer, spec), spec), restored)


@every_case
def test_storage_is_what_pack_gives(quantizer, spec):
    fields = packed_fields(quantizer, spec)
    storage = quantizer.storage(spec)
    assert {s.field: s.count for s in storage.streams} == {k: v.size for k, v in fields.items()}
    lead = spec.shape[: spec.stacked]
    for stream in storage.streams:
        field = fields[stream.field]
        assert (field.shape, field.dtype) == ((*lead, *stream.shape), jnp.dtype(stream.dtype))
        if stream.values is not None:  # codes, signs, levels: numbers of few bits
            assert field.dtype.kind in "ub"
            assert int(field.max()) < stream.values <= 2**stream.width
    assert storage.bits == sum(fields[s.field].size * s.width for s in storage.streams)


@every_case
def test_streams_hold_what_pack_gives_in_the_bytes_that_storage_counts(quantizer, spec):
    fields = packed_fields(quantizer, spec)
    streams = pack_fields(quantizer, fields, spec)
    for stream in quantizer.storage(spec).streams:
        assert streams[stream.field].nbytes == stream.bytes
        assert streams[stream.field].shape == stream_shape(stream, spec)
    back = fields_of_streams(quantizer, streams, spec)
    chex.assert_trees_all_equal(dict(fields), back, strict=True)
    decoded = decode_streams(quantizer, streams, spec)
    assert np.array_equal(decoded, decode(quantizer, *trained(quantizer, spec), spec))


@every_case
def test_the_file_keeps_every_bit(quantizer, spec, tmp_path):
    specs = {"w": spec, "b": LeafSpec("b", (3,), "float32")}
    plan = make_plan(specs, [Rule("w", quantizer, stacked=spec.stacked), ("b", None)])
    learned, fixed = encode(quantizer, spec)
    bias = jnp.array([1.0, -0.0, jnp.inf])
    packed = plan.finalize(
        {"params": {"w": None, "b": bias}, "vq": {"w": learned}, "vq_state": {"w": fixed}}
    )
    for codec in ("plain", "entropy"):
        save(tmp_path / "model.safetensors", packed, codec=codec)
        with load(tmp_path / "model.safetensors") as file:
            assert file.plan == plan
            read, decoded = file.read(), file.decode()
            held = file.file_bytes - file.header_bytes
            assert 8 * held == file.bits().model.total_bits
            if codec == "plain":
                assert file.bits() == plan.bits()
            else:
                assert held <= plan.bits().stored_bytes
        chex.assert_trees_all_equal_shapes_and_dtypes(read, packed)
        chex.assert_trees_all_equal(read, packed)
        assert decoded["w"].dtype == spec.dtype
        assert np.array_equal(decoded["w"], packed.decode()["w"])
        assert np.array_equal(decoded["b"], bias)


@every_quantizer
def test_stacked_slices_are_what_single_weights_are(quantizer):
    spec = SPECS["stacked"]
    learned, fixed = encode(quantizer, spec)
    decoded = decode(quantizer, learned, fixed, spec)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: np.asarray(x)[i], (learned, fixed))
        assert np.array_equal(decode(quantizer, *one, spec.slice_spec()), decoded[i])
    assert quantizer.storage(spec).bits == 3 * quantizer.storage(spec.slice_spec()).bits


@every_quantizer
def test_decode_under_vmap(quantizer):
    spec = SPECS["dense"]
    one, two = encode(quantizer, spec, key=0), encode(quantizer, spec, key=1)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), one, two)
    decoded = jax.jit(jax.vmap(lambda e: quantizer.decode(*e, spec)))(both)
    np.testing.assert_array_equal(decoded[1], decode(quantizer, *two, spec))


@every_quantizer
def test_gradients_reach_everything_learned(quantizer):
    spec = SPECS["dense"]
    learned, fixed = encode(quantizer, spec)

    @jax.jit
    def gradient(learned):
        return jax.grad(lambda x: jnp.sum(jnp.sin(3 * quantizer.decode(x, fixed, spec))))(learned)

    grads = gradient(learned)
    assert all(np.any(np.asarray(grad)) for grad in grads.values())
    assert all(np.all(np.isfinite(grad)) for grad in grads.values())


@every_quantizer
def test_same_key_same_bits(quantizer):
    spec = SPECS["dense"]
    first, second = encode(quantizer, spec), encode.__wrapped__(quantizer, spec)
    chex.assert_trees_all_equal(first, second)


@every_quantizer
def test_a_weight_of_zeros_stays_zero(quantizer):
    spec = SPECS["dense"]
    encoded = quantizer.init(jax.random.key(0), jnp.zeros(spec.shape), spec)
    assert not np.any(decode(quantizer, *encoded, spec))


@every_quantizer
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_weights_does_not_matter(quantizer, scale):
    if getattr(quantizer, "codebook_dtype", "") == "float16":
        pytest.skip("a float16 codebook has float16's range")
    spec = SPECS["dense"]
    weight = scale * weight_of(spec)
    decoded = decode(quantizer, *quantizer.init(jax.random.key(0), weight, spec), spec)
    assert np.sum(np.square((weight - decoded) / scale)) < 0.6 * np.sum(np.square(weight / scale))


@every_quantizer
def test_importance_moves_error_away_from_what_matters(quantizer):
    if isinstance(quantizer, Uniform) and quantizer.channel_axis == 0:
        pytest.skip("the importance is the same within a channel: nothing to move")
    if isinstance(quantizer, Pyramid) and quantizer.axis == -1:
        pytest.skip("the importance is the same within a row: nothing to move")
    if isinstance(quantizer, Pyramid) and quantizer.rotate:
        pytest.skip("rotation mixes what matters with what does not")
    spec = SPECS["dense"]
    weight = weight_of(spec)
    importance = jnp.where(jnp.arange(16) < 4, 100.0, 0.01)[:, None] * jnp.ones((1, 24))
    plain = decode(quantizer, *encode(quantizer, spec), spec)
    encoded = quantizer.init(jax.random.key(0), weight, spec, Calibration(importance))
    guided = decode(quantizer, *encoded, spec)
    assert np.sum((weight - guided)[:4] ** 2) < np.sum((weight - plain)[:4] ** 2)


@pytest.mark.parametrize("quantizer", CASES.values(), ids=CASES)
def test_json_round_trip(quantizer):
    assert from_json(to_json(quantizer)) == quantizer
    assert hash(from_json(to_json(quantizer))) == hash(quantizer)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_json({"method": "vector", "codewords": 1}), "codewords=1: .* 2 to"),
        (lambda: from_json({"method": "sign_split", "dim": 0}), "dim=0: .* at least 1"),
        (lambda: from_json({"method": "vector", "codewords": "64"}), "codewords='64': .* whole"),
        (
            lambda: from_json({"method": "uniform", "bits": 2.5}),
            "bits=2.5: .* 2 to 8",
        ),
        (lambda: from_json({"method": "vector", "dim": True}), "dim=True: .* whole number"),
        (lambda: from_json("uniform"), "quantizer 'uniform' is no mapping"),
        (lambda: from_json({"method": []}), r"method \[\] is unknown"),
        (lambda: SignSplit(alpha=float("inf")), "alpha=inf"),
        (lambda: SignSplit(alpha=0.0), r"alpha=0.0: .* positive"),
        (lambda: SignSplit(alpha=float("nan")), "alpha=nan"),
        (lambda: SignSplit(latent_dtype="float16"), "latent_dtype='float16': choose one of"),
        (lambda: Vector(iterations=0), "iterations=0"),
        (lambda: Uniform(bits=1), "bits=1: .* 2 to 8"),
        (lambda: from_json({"method": "magic"}), "method 'magic' is unknown: choose one of"),
        (lambda: from_json({"method": "uniform", "bit": 2}), r"no field \['bit'\]: it has"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("quantizer", [Vector(codewords=64, dim=4), SignSplit(64, 4)])
def test_more_codewords_than_sub_vectors(quantizer):
    with pytest.raises(ValueError, match=r"leaf 'w' .* 32 sub-vectors of dim 4, fewer than"):
        quantizer.storage(LeafSpec("w", (8, 16), "float32"))


def test_uniform_per_channel_needs_a_channel():
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(\) has no channel_axis -1"):
        Uniform().storage(LeafSpec("w", (), "float32"))
    assert dataclasses.replace(Uniform(), per_channel=False).storage(
        LeafSpec("w", (), "float32")
    ).bits == 24  # fmt: skip


def test_split_is_used_by_hand():
    learned, fixed = split({"params": {"b": 1}, "vq": {}, "vq_state": {"w": 2}})
    assert learned | fixed == {"params": {"b": 1}, "vq": {}, "vq_state": {"w": 2}}
