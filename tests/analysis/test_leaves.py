import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.analysis import code_statistics, leaf_reports, sign_statistics, weight_error

SPLIT = ssvq.SignSplit(codewords=4, dim=4, iterations=5)


def random(*shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def report_of(params, rules):
    plan = ssvq.make_plan(params, rules)
    variables = plan.init(jax.random.key(1), params)
    reports = leaf_reports(plan, params, variables)
    return plan, variables, {report.path: report for report in reports}


def test_error_by_hand():
    # ||W||^2 = 100, ||V||^2 = 25, <W, V> = 50, ||W - V||^2 = 25.
    found = weight_error(np.array([[6.0, 8.0]]), np.array([[3.0, 4.0]]))
    assert found.relative == 0.25
    assert found.sqnr == pytest.approx(10 * math.log10(4))
    assert found.cosine == 1.0


def test_error_where_a_figure_would_divide_by_zero():
    exact = weight_error(np.ones(3), np.ones(3))
    assert (exact.relative, exact.sqnr, exact.cosine) == (0.0, None, pytest.approx(1.0))
    lost = weight_error(np.ones(3), np.zeros(3))
    assert (lost.relative, lost.sqnr, lost.cosine) == (1.0, 0.0, None)
    nothing = weight_error(np.zeros(3), np.zeros(3))
    assert (nothing.relative, nothing.sqnr, nothing.cosine) == (None, None, None)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_error_does_not_depend_on_scale(scale):
    weight = np.asarray(random(8, 8), np.float64)
    decoded = np.round(weight)
    found, scaled = weight_error(weight, decoded), weight_error(scale * weight, scale * decoded)
    np.testing.assert_allclose(dataclasses.astuple(scaled), dataclasses.astuple(found))


def test_signs_by_hand():
    # rms = sqrt((16 + 16 + 4 + 0.01 + 0) / 5) = 2.68: the last two are near zero.
    weight = np.array([-4.0, 4.0, -2.0, 0.1, 0.0])
    decoded = np.array([-1.0, -1.0, 0.0, -1.0, -1.0])
    found = sign_statistics(weight, decoded)
    assert found.negative == 2 / 5
    assert found.wrong == 2 / 5  # a zero, before or after, is opposite to nothing
    assert found.near_zero == 2 / 5


def test_codes_by_hand():
    found = code_statistics(np.array([0, 0, 0, 0, 1, 1, 2, 3], np.uint8), codewords=8)
    assert (found.codewords, found.used) == (8, 4)
    assert found.entropy == 1 / 2 * 1 + 1 / 4 * 2 + 2 * 1 / 8 * 3
    assert found.entropy_limit == 3
    assert found.imbalance == 8 * (1 / 4 + 1 / 16 + 2 / 64)


def test_codes_at_the_limits():
    even = code_statistics(np.arange(16) % 4, codewords=4)
    assert (even.used, even.entropy, even.imbalance) == (4, even.entropy_limit, 1)
    one = code_statistics(np.zeros(16, np.uint8), codewords=4)
    assert (one.used, one.entropy, one.imbalance) == (1, 0, 4)
    assert math.copysign(1, one.entropy) == 1


def test_stacked_codes_are_counted_slice_by_slice():
    """Row 0 of one slice's codebook is not row 0 of the next one's."""
    one, other = np.array([0, 0, 1, 1]), np.array([2, 2, 2, 2])
    found = code_statistics(np.stack([one, other])[None], codewords=4)
    assert (found.codewords, found.used) == (8, 3)
    assert found.entropy == (1 + 0) / 2
    assert found.imbalance == (2 + 4) / 2


def test_reports_are_plain_data_about_every_compressed_leaf():
    params = {"a": random(8, 16), "b": random(8, 16, seed=1), "c": random(16)}
    rules = [("a", SPLIT), ("b", ssvq.Uniform(bits=4)), ("c", None)]
    plan, variables, reports = report_of(params, rules)
    assert list(reports) == ["a", "b"]
    decoded = plan.decode(variables)
    for path, report in reports.items():
        (row,) = (row for row in plan.bits().rows if row.name == path)
        assert (report.method, report.settings) == (row.method, row.settings)
        assert (report.entry, report.weights) == (path, 128)
        assert report.bits_per_weight == row.bits_per_weight
        noise = jnp.sum((params[path] - decoded[path]) ** 2) / jnp.sum(params[path] ** 2)
        assert report.error.relative == pytest.approx(float(noise), rel=1e-5)
    assert reports["b"].codes is None
    plain = dataclasses.asdict(reports["a"])
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_split_signs_are_all_kept_and_others_are_not():
    params = {"w": random(32, 32)}
    for quantizer, kept in [(SPLIT, True), (ssvq.Vector(codewords=8, dim=4), False)]:
        _, _, reports = report_of(params, [("w", quantizer)])
        assert (reports["w"].signs.wrong == 0) == kept
        assert reports["w"].signs.negative == np.mean(np.asarray(params["w"]) < 0)


def test_leaves_of_a_share_have_their_own_error_and_one_codebook():
    params = {"a": random(8, 16), "b": 0.1 * random(8, 16, seed=1)}
    plan, variables, reports = report_of(params, [ssvq.Rule(".*", SPLIT, share="both")])
    a, b = reports["a"], reports["b"]
    assert a.entry == b.entry == "both"
    assert a.codes == b.codes
    assert a.codes == code_statistics(np.asarray(variables["vq_state"]["both"]["codes"]), 4)
    assert a.bits_per_weight == b.bits_per_weight == plan.bits().compressed.bits_per_weight
    assert a.error.relative < b.error.relative  # the codebook fits the larger weights


def test_a_stacked_leaf_is_all_of_its_slices():
    params = {"w": jnp.stack([random(8, 16), random(8, 16, seed=1), random(8, 16, seed=2)])}
    plan, variables, reports = report_of(params, [ssvq.Rule("w", SPLIT, stacked=1)])
    found = reports["w"]
    codes = np.asarray(variables["vq_state"]["w"]["codes"])
    each = [code_statistics(one, 4) for one in codes]
    assert found.weights == 3 * 128
    assert found.codes is not None
    assert found.codes.codewords == 12
    assert found.codes.used == sum(one.used for one in each)
    assert found.codes.entropy == pytest.approx(np.mean([one.entropy for one in each]))
    decoded = np.asarray(plan.decode(variables)["w"], np.float64)
    assert found.error == weight_error(np.asarray(params["w"], np.float64), decoded)


def test_sixteen_bit_leaves_are_compared_as_they_are():
    params = {"w": random(16, 16, dtype="bfloat16")}
    plan, variables, reports = report_of(params, [("w", SPLIT)])
    decoded = np.asarray(plan.decode(variables)["w"]).astype(np.float64)
    expected = weight_error(np.asarray(params["w"]).astype(np.float64), decoded)
    assert reports["w"].error == expected


@pytest.mark.parametrize(
    ("params", "now"),
    [
        ({"w": np.zeros((8, 8), np.float32)}, r"float32\[8, 8\]"),
        ({"other": np.zeros((8, 16), np.float32)}, "missing"),
    ],
)
def test_another_tree_is_an_error(params, now):
    plan, variables, _ = report_of({"w": random(8, 16)}, [("w", SPLIT)])
    with pytest.raises(ValueError, match=rf"'w' is float32\[8, 16\] in the plan, but {now}"):
        leaf_reports(plan, params, variables)


def test_a_missing_collection_is_an_error():
    plan, variables, _ = report_of({"w": random(8, 16)}, [("w", SPLIT)])
    del variables["vq_state"]
    with pytest.raises(ValueError, match="lack the collections"):
        leaf_reports(plan, {"w": random(8, 16)}, variables)
