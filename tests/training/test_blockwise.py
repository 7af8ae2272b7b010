"""Block-wise fine-tuning: against least squares, a composition by hand, and a Llama's layers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.models.import_llama import stack_layers
from ssvq_jax.models.llama import Layer, Llama, LlamaConfig
from ssvq_jax.training.blockwise import finetune_blocks
from ssvq_jax.training.optimizer import OptimizerConfig

CONFIG = LlamaConfig(vocab=61, width=16, depth=2, heads=2, kv_heads=2, hidden=24, context=64)
LAYERS = [f"layers_{i}" for i in range(CONFIG.depth)]
RATES = OptimizerConfig(dense=1e-3, codebook=3e-3, sign=1e-3, scale=3e-3, freeze=None)
STILL = OptimizerConfig(dense=0.0, codebook=0.0, sign=0.0, scale=0.0, latent=0.0, freeze=None)


@pytest.fixture(autouse=True)
def users_promotion():
    """Optax computes with weak types."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def multiply(params, x):
    return x @ params["kernel"]


def layer(params, x):
    return Layer(CONFIG).apply({"params": params}, x, jnp.arange(x.shape[1]))


def two_kernels(shape=(8, 8)):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: {"kernel": jax.random.normal(keys[i], shape)} for i, name in enumerate("ab")}
    return params, jax.random.normal(keys[2], (12, 5, 8))


def relative(y, t):
    y, t = np.asarray(y, np.float64), np.asarray(t, np.float64)
    return np.mean(np.sum((y - t) ** 2, -1) / np.sum(t**2, -1))


@pytest.fixture(scope="module")
def llama():
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, CONFIG.vocab)
    params = Llama(CONFIG).init(jax.random.key(0), tokens)["params"]
    return params, params["embed"]["embedding"][tokens]


def test_the_least_squares_codebook_is_reached():
    params, inputs = two_kernels()
    params = {"a": params["a"]}
    plan = ssvq.make_plan(params, [(".*", ssvq.Vector(8, 2, codebook_dtype="float16"))])
    variables = plan.init(jax.random.key(2), params)
    targets = multiply(params["a"], inputs)
    length = jnp.linalg.norm(targets, axis=-1, keepdims=True)
    codebook = variables["vq"]["a/kernel"]["codebook"]

    def outputs(codebook):
        held = {**variables, "vq": {"a/kernel": {"codebook": codebook}}}
        return (multiply(plan.decode(held)["a"], inputs) / length).ravel()

    # The decoded weight is linear in the codebook, but for how it is rounded.
    matrix = np.asarray(jax.jacobian(outputs)(codebook), np.float64).reshape(-1, codebook.size)
    wanted = np.asarray(targets / length, np.float64).ravel()
    rest = np.linalg.lstsq(matrix, wanted)[1][0] / length.size
    _, (report,) = finetune_blocks(
        multiply, plan, variables, params, inputs, ["a"], steps=300, batch_size=12,
        optimizer=OptimizerConfig(codebook=0.03, freeze=None),
    )  # fmt: skip
    assert report.before > 1.04 * rest
    assert rest * (1 - 1e-5) < report.after < rest * 1.001


def test_a_block_gets_what_compressed_ones_put_out_and_learns_what_float_ones_do():
    params, inputs = two_kernels()
    plan = ssvq.make_plan(params, [(".*", ssvq.Uniform(bits=3))])
    variables = plan.init(jax.random.key(2), params)
    same, reports = finetune_blocks(
        multiply, plan, variables, params, inputs, ["a", "b"], steps=2, optimizer=STILL
    )
    decoded = plan.decode(variables)
    first, second = multiply(decoded["a"], inputs), multiply(params["a"], inputs)
    wanted = [
        relative(first, second),
        relative(multiply(decoded["b"], first), multiply(params["b"], second)),
    ]
    np.testing.assert_allclose([report.before for report in reports], wanted, rtol=1e-5)
    assert [report.path for report in reports] == ["a", "b"]
    assert all(report.after == report.before for report in reports)
    chex.assert_trees_all_equal(same, variables)


@pytest.mark.parametrize(
    "quantizer",
    [
        pytest.param(ssvq.Vector(codewords=8, dim=4), marks=pytest.mark.slow, id="vector"),
        pytest.param(ssvq.SignSplit(codewords=4, dim=4), id="sign_split"),
    ],
)
def test_a_llama_s_layers_get_better_and_codes_stay(quantizer, llama):
    params, hidden = llama
    plan = ssvq.make_plan(params, [("layers_.*/kernel", quantizer), (".*", None)])
    variables = plan.init(jax.random.key(2), params)
    tuned, reports = finetune_blocks(
        layer, plan, variables, params, hidden, LAYERS, steps=8, batch_size=4, optimizer=RATES
    )
    assert all(report.after < report.before for report in reports), reports
    y = t = hidden
    for name, report in zip(LAYERS, reports, strict=True):
        y, t = layer(plan.decode(tuned)[name], y), layer(params[name], t)
        assert relative(y, t) == pytest.approx(report.after, rel=1e-3)
    chex.assert_trees_all_equal(tuned["vq_state"], variables["vq_state"])
    for leaf in ("embed", "norm"):
        chex.assert_trees_all_equal(tuned["params"][leaf], params[leaf])
    scale = tuned["params"]["layers_1"]["attn_norm"]["scale"]
    assert not jnp.all(scale == params["layers_1"]["attn_norm"]["scale"])


def test_stacked_layers_learn_what_single_ones_do(llama):
    params, hidden = llama
    stacked = stack_layers({"params": params})["params"]
    quantizer = ssvq.SignSplit(codewords=4, dim=4)
    plan = ssvq.make_plan(params, [("layers_.*/kernel", quantizer), (".*", None)])
    plan_stacked = ssvq.make_plan(
        stacked, [ssvq.Rule("layers/.*/kernel", quantizer, stacked=1), (".*", None)]
    )
    whole = plan_stacked.init(jax.random.key(2), stacked)
    single = {
        collection: {
            f"layers_{i}/{name.removeprefix('layers/')}": jax.tree.map(lambda x, i=i: x[i], fields)
            for name, fields in whole[collection].items()
            for i in range(CONFIG.depth)
        }
        for collection in ("vq", "vq_state")
    }
    single["params"] = plan.init(jax.random.key(2), params)["params"]
    options = {"steps": 4, "batch_size": 4, "optimizer": RATES, "seed": 3}
    one, reports = finetune_blocks(layer, plan, single, params, hidden, LAYERS, **options)
    other, stacked_reports = finetune_blocks(
        layer, plan_stacked, whole, stacked, hidden, "layers", **options
    )
    assert [report.path for report in stacked_reports] == ["layers[0]", "layers[1]"]
    for ours, theirs in zip(reports, stacked_reports, strict=True):
        assert (ours.before, ours.after) == pytest.approx((theirs.before, theirs.after), rel=1e-5)
    mine = stack_layers({"params": plan.decode(one)})["params"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), mine, plan_stacked.decode(other)
    )


def test_crvq_learns_both_codebooks():
    params, inputs = two_kernels()
    quantizer = ssvq.ChannelRelaxed(4, 2, critical=0.5, extended=1, extended_codewords=4)
    plan = ssvq.make_plan(params, [(".*", quantizer)])
    variables = plan.init(jax.random.key(2), params)
    tuned, reports = finetune_blocks(
        multiply, plan, variables, params, inputs, ["a", "b"], steps=8, optimizer=RATES
    )
    assert all(report.after < report.before for report in reports)
    for name in ("codebook", "extended_codebook"):
        was, now = (each["vq"]["b/kernel"][name] for each in (variables, tuned))
        assert not jnp.any(was == now)


def test_leaves_that_share_a_codebook_inside_of_a_block():
    kernels = jax.random.normal(jax.random.key(2), (2, 2, 8, 8))
    own = jax.random.normal(jax.random.key(3), (8, 8))  # has the name of a's share
    params = {
        name: {"kernel": one, "other": other, "a": own}
        for name, (one, other) in zip("ab", kernels, strict=True)
    }
    method = ssvq.Vector(4, 2, codebook_dtype="float16")
    rules = [("./a", method), *(ssvq.Rule(f"{name}/.*", method, share=name) for name in "ab")]
    plan = ssvq.make_plan(params, rules)
    variables = plan.init(jax.random.key(0), params)
    tuned, reports = finetune_blocks(
        lambda params, x: x @ params["kernel"] @ params["other"] @ params["a"],
        plan, variables, params,
        jax.random.normal(jax.random.key(1), (8, 8)), ["a", "b"], steps=30, batch_size=8,
        optimizer=RATES,
    )  # fmt: skip
    assert set(tuned["vq"]) == {"a", "b", "a/a", "b/a"}
    assert all(report.after < report.before for report in reports), reports


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ["c"]}, r"no leaf in 'c': give .* e.g. \['a', 'b'\]"),
        ({"paths": "a/kernel"}, "no leaf in 'a/kernel'"),
        ({"paths": []}, "there is no block"),
        ({"paths": "a"}, "give its rule stacked=1"),
        ({"steps": 0}, "give at least 1 step"),
        ({"batch_size": 13}, "batches of 1 to 12 examples"),
        ({"block": lambda params, x: x[..., :4]}, "the block 'a' gives shape"),
        ({"block": lambda params, x: x / 0.0}, "not finite"),
        ({"params": {"a": {"kernel": jnp.eye(4)}}}, "leaf 'a/kernel'"),
    ],
)
def test_what_is_refused(changes, message):
    params, inputs = two_kernels()
    plan = ssvq.make_plan(params, [(".*", ssvq.Vector(8, 2))])
    given = {"block": multiply, "plan": plan, "variables": plan.init(jax.random.key(0), params)}
    given |= {"params": params, "hidden": inputs, "paths": ["a", "b"], "steps": 1}
    with pytest.raises(ValueError, match=message):
        finetune_blocks(**{**given, "optimizer": RATES, **changes})


def test_blocks_that_are_encoded_together_are_refused():
    params, inputs = two_kernels()
    plan = ssvq.make_plan(params, [ssvq.Rule(".*", ssvq.Vector(8, 2), share="both")])
    variables = plan.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="'both' is encoded for several blocks at once"):
        finetune_blocks(
            multiply, plan, variables, params, inputs, ["a", "b"], steps=1, optimizer=RATES
        )


@pytest.mark.parametrize("scale", [(2, 8), ()])
def test_stacks_of_other_depths_are_refused(scale):
    params = {"layers": {"kernel": jnp.ones((3, 8, 8)), "scale": jnp.ones(scale)}}
    rules = [ssvq.Rule("layers/kernel", ssvq.Uniform(bits=4), stacked=1), (".*", None)]
    plan = ssvq.make_plan(params, rules)
    variables = plan.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="layers/scale.* not stacked blocks"):
        finetune_blocks(
            multiply, plan, variables, params, jnp.ones((2, 8)), "layers", steps=1, optimizer=RATES
        )


def test_a_block_that_diverges_stays_as_it_was():
    params, inputs = two_kernels()
    plan = ssvq.make_plan(params, [(".*", ssvq.Uniform(bits=4))])
    variables = plan.init(jax.random.key(0), params)
    high = dataclasses.replace(RATES, latent=1e38, clip_norm=None)
    with pytest.warns(UserWarning, match="block 'a' is left .* lower learning rates"):
        same, (report,) = finetune_blocks(
            multiply, plan, variables, params, inputs, ["a"], steps=3, optimizer=high
        )
    assert report.after == report.before > 0
    chex.assert_trees_all_equal(same, variables)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_errors_of_half_precision_are_summed_in_float32(dtype):
    params, _ = two_kernels()
    inputs = (100 * jax.random.normal(jax.random.key(3), (1500, 8))).astype(dtype)
    plan = ssvq.make_plan(params, [(".*", ssvq.Vector(4, 2))])
    variables = plan.init(jax.random.key(0), params)

    def half(params, x):
        return x @ params["kernel"].astype(dtype)

    _, (report,) = finetune_blocks(
        half, plan, variables, params, inputs, ["a"], steps=20, batch_size=500, optimizer=RATES
    )
    y, t = half(plan.decode(variables)["a"], inputs), half(params["a"], inputs)
    assert report.before == pytest.approx(relative(y, t), rel=1e-3)
    assert report.after < report.before


def test_a_block_that_is_not_compressed_makes_good_what_comes_before():
    params, inputs = two_kernels()
    plan = ssvq.make_plan(params, [("b/kernel", None), (".*", ssvq.Vector(8, 2))])
    variables = plan.init(jax.random.key(0), params)
    tuned, reports = finetune_blocks(
        multiply, plan, variables, params, inputs, ["a", "b"], steps=20, batch_size=12,
        optimizer=dataclasses.replace(RATES, dense=1e-2),
    )  # fmt: skip
    assert reports[1].after < reports[1].before
    assert set(tuned["vq"]) == {"a/kernel"}
    assert not jnp.any(tuned["params"]["b"]["kernel"] == params["b"]["kernel"])
