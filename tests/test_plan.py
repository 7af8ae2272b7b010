import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax import Calibration, Plan, Rule, SignSplit, Uniform, Vector, make_plan
from ssvq_jax.models import create, param_shapes

SMALL = SignSplit(codewords=4, dim=8, iterations=3)


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": {"kernel": jax.random.normal(keys[0], (3, 3, 1, 16))},
        "blocks": [
            {"kernel": jax.random.normal(keys[1], (16, 32)), "bias": jnp.zeros(32)},
            {"kernel": jax.random.normal(keys[2], (32, 16)), "bias": jnp.zeros(16)},
        ],
        "stack": jax.random.normal(keys[3], (3, 16, 8)).astype(jnp.bfloat16),
    }


RULES = (
    ("embed/kernel", Uniform(bits=8)),
    (r"blocks/\d/kernel", SMALL),
    Rule("stack", SMALL, stacked=1),
    (".*", None),
)


@functools.cache
def deit_tiny_shapes(scan=False):
    return param_shapes(create("deit_tiny", scan=scan))


def test_variables_hold_dense_leaves_and_entries_by_path(params):
    plan = make_plan(params, RULES)
    variables = plan.init(jax.random.key(1), params)
    assert variables["params"]["embed"] == {"kernel": None}
    assert variables["params"]["blocks"][0]["kernel"] is None
    assert set(variables["vq"]) == {"embed/kernel", "blocks/0/kernel", "blocks/1/kernel", "stack"}
    assert set(variables["vq_state"]) == {"blocks/0/kernel", "blocks/1/kernel", "stack"}
    assert variables["vq"]["stack"]["codebook"].shape == (3, 4, 8)


def test_decode_restores_structure_shapes_dtypes_and_dense_leaves(params):
    plan = make_plan(params, RULES)
    variables = plan.init(jax.random.key(1), params)
    decoded = jax.jit(plan.decode)(variables)
    assert jax.tree.structure(decoded) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), decoded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert np.array_equal(decoded["blocks"][0]["bias"], params["blocks"][0]["bias"])


def test_gradient_equals_the_quantizers_own(params):
    plan = make_plan(params, RULES)
    learned, fixed = ssvq.split(plan.init(jax.random.key(1), params))
    grads = jax.grad(lambda p: jnp.sum(plan.decode(p | fixed)["blocks"][0]["kernel"] ** 3))(learned)
    spec = ssvq.LeafSpec("blocks/0/kernel", (16, 32), "float32")
    own = jax.grad(
        lambda p: jnp.sum(SMALL.decode(p, fixed["vq_state"]["blocks/0/kernel"], spec) ** 3)
    )(learned["vq"]["blocks/0/kernel"])
    chex.assert_trees_all_equal(grads["vq"]["blocks/0/kernel"], own, strict=True)
    assert not np.any(grads["vq"]["blocks/1/kernel"]["codebook"])
    assert not np.any(grads["params"]["blocks"][0]["bias"])


def test_finalize_keeps_every_bit(params):
    plan = make_plan(params, RULES)
    variables = plan.init(jax.random.key(1), params)
    packed = plan.finalize(variables)
    chex.assert_trees_all_equal(packed.decode(), plan.decode(variables), strict=True)
    held = sum(
        8 * stream.nbytes for streams in packed.streams.values() for stream in streams.values()
    )
    assert held == plan.bits().compressed.total_bits


def test_equal_weights_are_clustered_by_their_own_keys_whatever_the_rest_of_the_tree(params):
    alone = {"blocks": [params["blocks"][0]]}
    plan, small = make_plan(params, RULES), make_plan(alone, RULES[1::2])
    key = jax.random.key(5)
    one = plan.init(key, params)["vq"]["blocks/0/kernel"]
    chex.assert_trees_all_equal(one, small.init(key, alone)["vq"]["blocks/0/kernel"], strict=True)


def test_labels_name_the_optimizer_groups(params):
    plan = make_plan(params, RULES)
    learned, _ = ssvq.split(plan.init(jax.random.key(1), params))
    labels = plan.labels(learned)
    assert labels["params"]["blocks"][0] == {"kernel": None, "bias": "dense"}
    assert labels["vq"]["stack"] == {"codebook": "codebook", "sign_latent": "sign"}
    assert labels["vq"]["embed/kernel"] == {"latent": "latent", "step": "scale"}


def test_init_works_on_shapes(params):
    plan = make_plan(jax.eval_shape(lambda: params), RULES)
    shapes = jax.eval_shape(plan.init, jax.random.key(0), params)
    real = plan.init(jax.random.key(0), params)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, real)


def test_json_round_trip(params):
    plan = make_plan(params, RULES)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert hash(again) == hash(plan)
    with pytest.raises(ValueError, match=r"not a plan: .* \['rules'\]"):
        Plan.from_json({"rules": []})


# Shared codebooks


def test_shared_codebook_is_stored_once_and_clusters_all_leaves_together():
    params = {
        "a": jnp.array([[1.0, 1.0, 2.0, 2.0]]),
        "b": jnp.array([[2.0, 2.0], [1.0, 1.0]]).T.reshape(2, 2),
    }
    quantizer = Vector(codewords=2, dim=2, axis=0, codebook_dtype="float32")
    plan = make_plan({"a": params["a"].T, "b": params["b"]}, [Rule("a|b", quantizer, share="both")])
    variables = plan.init(jax.random.key(0), {"a": params["a"].T, "b": params["b"]})
    assert set(variables["vq"]) == {"both"}
    assert variables["vq"]["both"]["codebook"].shape == (2, 2)
    decoded = plan.decode(variables)
    chex.assert_trees_all_equal(decoded, {"a": params["a"].T, "b": params["b"]}, strict=True)
    assert plan.bits().compressed.bits == {"codes": 8, "codebook": 2 * 2 * 32}  # a whole byte
    chex.assert_trees_all_equal(plan.finalize(variables).decode(), decoded, strict=True)


def test_shared_leaves_may_have_several_rules_and_layouts(params):
    rules = [
        Rule("blocks/0/kernel", SMALL, share="s"),
        Rule("embed/.*", SMALL, share="s"),
        (".*", None),
    ]
    plan = make_plan(params, rules)
    variables = plan.init(jax.random.key(0), params)
    assert variables["vq"]["s"]["sign_latent"].shape == ((16 * 32 + 9 * 16) // 8, 8)
    decoded = plan.decode(variables)
    assert decoded["embed"]["kernel"].shape == (3, 3, 1, 16)
    assert np.array_equal(np.sign(decoded["embed"]["kernel"]), np.sign(params["embed"]["kernel"]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(".*kernel", Uniform(), share="s"), (".*", None)], "share='s': .* no codebook"),
        (
            [Rule(".*kernel", SignSplit(4, 8, channel_scale=True), share="s"), (".*", None)],
            "share='s': .* scales every channel",
        ),
        (
            [
                Rule("blocks/0/kernel", SMALL, share="s"),
                Rule("blocks/1/kernel", Vector(4, 8), share="s"),
                (".*", None),
            ],
            "share='s' is used with different quantizers",
        ),
        ([Rule(".*kernel", SMALL, share="stack"), (".*", None)], "share='stack' is also the path"),
        (
            [Rule("embed.*", SignSplit(4, 5, pad=True), share="s"), (".*", None)],
            "leaf 'embed/kernel' .* needs padding .* cannot share",
        ),
    ],
)
def test_what_cannot_be_shared_is_named(params, rules, message):
    with pytest.raises(ValueError, match=message):
        make_plan(params, rules)


# Calibration


def test_importance_reaches_the_clustering(params):
    plan = make_plan(params, RULES)
    importance = jnp.where(jnp.arange(16) < 2, 1e3, 1e-3)[:, None] * jnp.ones((1, 32))
    plain = plan.init(jax.random.key(0), params)
    guided = plan.init(
        jax.random.key(0), params, {"blocks/0/kernel": Calibration(importance=importance)}
    )

    def error(variables):
        weight = params["blocks"][0]["kernel"]
        return float(jnp.sum((plan.decode(variables)["blocks"][0]["kernel"] - weight)[:2] ** 2))

    assert error(guided) < error(plain)
    with pytest.raises(ValueError, match=r"calibration for \['embed/bias'\]"):
        plan.init(jax.random.key(0), params, {"embed/bias": Calibration()})


def test_a_slice_without_importance_is_clustered_as_if_all_counted():
    params = {"experts": jax.random.normal(jax.random.key(0), (3, 8, 16))}
    plan = make_plan(params, [Rule(".*", Vector(codewords=4, dim=4), stacked=1)])
    key = jax.random.key(1)
    importance = jnp.ones((3, 8, 16)).at[1].set(0.0)
    with pytest.warns(UserWarning, match="no data reached slices 1 of 3"):
        some = plan.init(key, params, {"experts": Calibration(importance)})
    equal = plan.init(key, params, {"experts": Calibration(jnp.ones((3, 8, 16)))})
    for one, other in zip(jax.tree.leaves(some), jax.tree.leaves(equal), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_entry_that_cannot_be_encoded_is_named():
    params = {"kernel": jnp.ones((8, 16)).at[0].set(3e38)}
    quantizer = Vector(codewords=4, dim=4, channel_scale=True)
    plan = make_plan(params, [(".*", quantizer)])
    with pytest.raises(ValueError, match="'kernel' cannot be encoded: points: NaN or infinity"):
        plan.init(jax.random.key(0), params)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (jnp.ones((32, 16)), r"leaf 'blocks/0/kernel': the importance has shape \(32, 16\)"),
        (jnp.full((16, 32), jnp.nan), "leaf 'blocks/0/kernel': .* finite"),
        (jnp.full((16, 32), -1.0), "leaf 'blocks/0/kernel': .* nowhere negative"),
        (jnp.zeros((16, 32)), "leaf 'blocks/0/kernel': .* somewhere positive"),
    ],
)
def test_calibration_that_does_not_fit_is_named(params, importance, message):
    plan = make_plan(params, RULES)
    with pytest.raises(ValueError, match=message):
        plan.init(jax.random.key(0), params, {"blocks/0/kernel": Calibration(importance)})


def test_forgotten_collection_is_named(params):
    plan = make_plan(params, RULES)
    learned, _ = ssvq.split(plan.init(jax.random.key(0), params))
    for function in (plan.decode, plan.finalize):
        with pytest.raises(ValueError, match=r"lack the collections \['vq_state'\]"):
            function(learned)


def test_double_precision_is_refused(params):
    params["stack"] = np.zeros((3, 16, 8))
    with pytest.raises(ValueError, match="leaf 'stack' has dtype float64, but JAX computes in 32"):
        make_plan(params, RULES)


# What bad input gets


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("blocks/.*", None)], "no rule covers 'embed/kernel', 'stack': add a rule"),
        (
            [("kernel", SMALL), (".*", None)],
            r"rules 'kernel' match no leaf .* whole leaf paths, which here are 'blocks/0/bias'",
        ),
        ([Rule("kernel", SMALL, optional=True), (".*", None)], "the recipe matches no leaf"),
        ([(".*", None), (".*kernel", SMALL)], "rules '.*kernel' match no leaf that an earlier"),
        (
            [(".*kernel", SignSplit(4, 7)), (".*", None)],
            r"leaf 'blocks/0/kernel' .* dim=7 does not",
        ),
        ([(".*kernel", Vector(512, 8)), (".*", None)], "leaf 'blocks/0/kernel' .* 64 sub-vectors"),
        (
            [Rule("blocks/0/bias", SMALL, stacked=2), (".*", None)],
            "leaf 'blocks/0/bias' .*stacked=2",
        ),
    ],
)
def test_bad_rules_fail_before_any_computation(params, rules, message):
    with pytest.raises(ValueError, match=message):
        make_plan(jax.eval_shape(lambda: params), rules)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_not_finite_weights_are_named(params, bad):
    plan = make_plan(params, RULES)
    params["blocks"][1]["kernel"] = params["blocks"][1]["kernel"].at[0, :2].set(bad)
    with pytest.raises(ValueError, match="leaf 'blocks/1/kernel' holds 2 NaN or infinite values"):
        plan.init(jax.random.key(0), params)


def test_another_tree_than_the_plans_is_named(params):
    plan = make_plan(params, RULES)
    other = params | {"stack": params["stack"].astype(jnp.float32)}
    with pytest.raises(ValueError, match=r"leaf 'stack' is float32\[3, 16, 8\], .* bfloat16"):
        plan.init(jax.random.key(0), other)
    with pytest.raises(ValueError, match=r"leaves \['new'\] are not in the plan"):
        plan.init(jax.random.key(0), params | {"new": jnp.zeros(2)})
    del params["stack"]
    with pytest.raises(ValueError, match="leaf 'stack' of the plan is not in the tree"):
        plan.init(jax.random.key(0), params)


# Bits of real models


def test_deit_tiny_at_21x():
    plan = make_plan(deit_tiny_shapes(), ssvq.load_recipe("ssvq-21x"))
    table = plan.bits()
    # 12 blocks of 442,368 weights and 4 kernels: 1.5 bits each, 1040 bits a codebook.
    assert table.main.weights == 12 * 442368
    assert table.main.total_bits == 12 * (442368 * 3 // 2 + 4 * 1040)
    assert table.main.bits == {
        "codes": 12 * 442368 // 2,
        "codebook": 48 * 1024,
        "codebook_scale": 48 * 16,
        "signs": 12 * 442368,
    }
    assert 21.1 < table.main.compression_ratio < 21.34
    # Patch embedding and head: 8 bits and a 16-bit step a channel.
    int8 = table.methods["uniform 8 bit a channel"]
    assert int8.total_bits == 8 * (16 * 16 * 3 * 192 + 192 * 1000) + 16 * (192 + 1000)
    assert table.model.weights == 5717416
    assert table.file_ratio == pytest.approx(4 * 5717416 / table.model.stored_bytes, rel=1e-4)


def test_scanned_and_unrolled_models_store_the_same_bits():
    recipe, for_scan = ssvq.load_recipe("ssvq-21x"), ssvq.load_recipe("ssvq-21x-scanned")
    unrolled = make_plan(deit_tiny_shapes(), recipe).bits()
    scanned = make_plan(deit_tiny_shapes(scan=True), for_scan).bits()
    assert scanned.compressed.bits == unrolled.compressed.bits
    assert len(scanned.rows) < len(unrolled.rows)


@pytest.mark.parametrize("name", sorted(ssvq.PRESETS))
def test_every_preset_binds_to_deit_tiny(name):
    shapes = deit_tiny_shapes(name.endswith("-scanned"))
    table = make_plan(shapes, ssvq.load_recipe(name)).bits()
    assert table.main.weights > 5_000_000
    if "21x" in name:
        assert table.main.compression_ratio == pytest.approx(21, abs=0.4)
    if "26x" in name:
        assert table.main.compression_ratio == pytest.approx(25.6, abs=0.4)


@pytest.mark.parametrize("ratio", ["21x", "26x"])
def test_ssvq_presets_store_no_more_than_vq(ratio):
    def bits(method):
        recipe = ssvq.load_recipe(f"{method}-{ratio}")
        return make_plan(deit_tiny_shapes(), recipe).bits().main.total_bits

    assert bits("ssvq") == bits("ssvq-fixed") <= bits("vq")


def test_table_as_text(params):
    text = str(make_plan(params, RULES))
    assert "blocks/0/kernel" in text
    assert "sign_split k=4 d=8" in text
    assert "whole model" in text


def test_init_shares_no_memory_with_the_users_arrays():
    kernel, bias = jax.random.normal(jax.random.key(0), (16, 16)), jnp.ones(16)
    host = np.zeros(64, np.float32)  # JAX may share the memory of NumPy's arrays
    params = {"a": {"kernel": kernel}, "b": {"kernel": kernel}, "bias": bias, "host": host}
    plan = ssvq.make_plan(params, [(".*kernel", ssvq.Uniform(bits=4)), (".*", None)])
    learned, _ = ssvq.split(plan.init(jax.random.key(1), params))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    step(learned)  # tied arrays are not donated twice
    assert not kernel.is_deleted()
    assert not bias.is_deleted()
    assert not host.any()


def test_packed_variables_share_no_memory_with_the_packed_model():
    params = {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)}
    plan = ssvq.make_plan(params, [("kernel", ssvq.Uniform(bits=4)), (".*", None)])
    packed = plan.finalize(plan.init(jax.random.key(1), params))
    jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)(packed.variables())
    chex.assert_trees_all_close(packed.decode(), params, atol=1e-2)


def test_all_misfits_are_in_one_error():
    shapes = {name: jax.ShapeDtypeStruct((6, 6), "float32") for name in "abc"}
    with pytest.raises(ValueError, match="3 problems:") as error:
        ssvq.make_plan(shapes, [(".*", ssvq.Vector(codewords=4, dim=4))])
    assert [f"leaf '{name}'" in str(error.value) for name in "abc"] == [True] * 3
    bad = {"a": jnp.arange(3), "b": 1.0, "c": np.ones(3, ">f4"), "d": np.ones(3, "float32")}
    with pytest.raises(ValueError, match="3 problems:") as error:
        ssvq.make_plan(bad, [(".*", None)])
    for part in ("leaf 'a' has dtype int32", "leaf 'b' is a float", "leaf 'c' has dtype >f4"):
        assert part in str(error.value)
    plan = ssvq.make_plan(shapes, [(".*", None)])
    other = {"a": jnp.ones((6, 5)), "b": jnp.ones((6, 6)), "d": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"3 problems:\n- leaf 'a' is .*\n- leaf 'c' of the plan"):
        plan.init(jax.random.key(0), other)
    nan = {name: jnp.full((6, 6), jnp.nan) for name in "abc"}
    plan = ssvq.make_plan(shapes, [(".*", ssvq.Uniform(bits=4))])
    with pytest.raises(ValueError, match="3 problems:\n- leaf 'a' holds 36 NaN"):
        plan.init(jax.random.key(0), nan)
