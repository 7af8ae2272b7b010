import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.analysis import dense_gradients, gradient_dominance
from ssvq_jax.analysis.gradients import member_gradients
from ssvq_jax.bitstream import number_dtype
from ssvq_jax.quantizers import METHODS
from ssvq_jax.quantizers.codebook import CodebookQuantizer

CODEBOOK_METHODS = [m for m in METHODS.values() if issubclass(m, CodebookQuantizer)]
# The sum is (6, 8), of norm 10; the norms add up to 14, of which the largest has 8.
MEMBERS = [[1.0, 0.0], [0.0, 8.0], [1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]
BY_HAND = {"top": 0.2, "bottom": 0.6, "least_members": 5}  # the 1 largest, the 3 smallest


@pytest.fixture(autouse=True)
def any_clusters(monkeypatch):
    """Any codes and codebooks will do, and clustering takes seconds to compile."""

    def cluster(self, key, values, spec, *_):
        numbers = np.random.default_rng(self.layout(spec).count)
        codes = numbers.integers(0, self.codewords, self.layout(spec).count)
        codebook = numbers.normal(size=(self.codewords, self.dim))
        return jnp.asarray(codebook, jnp.float32), jnp.asarray(codes, number_dtype(self.code_width))

    monkeypatch.setattr(CodebookQuantizer, "cluster", cluster)


def random(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def planned(params, rules):
    plan = ssvq.make_plan(params, rules)
    return plan, jax.jit(plan.init)(jax.random.key(1), params)


def with_codes(codes, method=ssvq.Vector, **options):
    """A leaf of as many sub-vectors of dim 2, of which each has the given code."""
    codes = np.asarray(codes)
    quantizer = method(codewords=3, dim=2, **options)
    rule = ssvq.Rule("w", quantizer, stacked=codes.ndim - 1)
    plan, variables = planned({"w": random(*codes.shape, 2)}, [rule])
    variables["vq_state"]["w"]["codes"] = jnp.asarray(codes, jnp.uint8)
    return plan, variables


def figures(row):
    return row.top, row.bottom, row.top_norm_share, row.agreement


def test_by_hand():
    plan, variables = with_codes([0] * 5 + [1] * 5)
    gradients = {"w": jnp.array(MEMBERS + [[2.0, 0.0]] * 5)}
    (row,) = gradient_dominance(plan, variables, gradients, **BY_HAND)
    assert (row.path, row.method, row.codewords, row.left_out) == ("w", "vector", 2, 1)
    # The second codeword's members are all alike: cosines and agreement are 1.
    expected = (0.8 + 1) / 2, (0.6 + 1) / 2, (8 / 14 + 2 / 10) / 2, (10 / 14 + 1) / 2
    assert figures(row) == pytest.approx(expected)
    plain = dataclasses.asdict(row)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_split_signs_turn_their_members_by_hand():
    """What members of opposite signs disagree on is no loss: they follow one magnitude."""
    plan, variables = with_codes([0] * 5 + [1] * 5, ssvq.SignSplit)
    signs = jnp.array([[1.0, -1.0], [-1.0, 1.0]] * 5)
    variables["vq"]["w"]["sign_latent"] = signs
    gradients = {"w": signs * jnp.array(MEMBERS * 2)}
    (row,) = gradient_dominance(plan, variables, gradients, **BY_HAND)
    assert row.method == "sign_split"
    assert figures(row) == pytest.approx((0.8, 0.6, 8 / 14, 10 / 14))


def test_codewords_count_by_their_members():
    plan, variables = with_codes([0] * 5 + [1] * 15)
    gradients = {"w": jnp.array(MEMBERS + [[2.0, 0.0]] * 15)}
    (row,) = gradient_dominance(plan, variables, gradients, **BY_HAND)
    assert row.top == pytest.approx((5 * 0.8 + 15 * 1) / 20)


def test_few_members_and_zero_gradients_are_left_out():
    plan, variables = with_codes([0] * 5 + [1] * 4 + [2] * 6)
    opposite = [[1.0, 0.0], [-1.0, 0.0]] * 3  # codeword 2: members pull, but it stays
    gradients = {"w": jnp.array(MEMBERS + [[2.0, 0.0]] * 4 + opposite)}
    (row,) = gradient_dominance(plan, variables, gradients, **BY_HAND)
    assert (row.codewords, row.left_out) == (1, 2)
    assert figures(row) == pytest.approx((0.8, 0.6, 8 / 14, 10 / 14))


@pytest.mark.parametrize(("slopes", "options"), [(0.0, {}), (1.0, {"least_members": 16})])
def test_without_a_counted_codeword_there_are_no_figures(slopes, options):
    plan, variables = with_codes([0] * 15)
    gradients = {"w": jnp.full((15, 2), slopes)}
    (row,) = gradient_dominance(plan, variables, gradients, **({"least_members": 5} | options))
    assert (row.codewords, row.left_out) == (0, 3)
    assert figures(row) == (None,) * 4


def test_a_bottom_that_pulls_nowhere_has_cosine_zero():
    plan, variables = with_codes([0] * 5)
    gradients = {"w": jnp.zeros((5, 2)).at[3, 0].set(1.0)}
    (row,) = gradient_dominance(plan, variables, gradients, **BY_HAND)
    assert figures(row) == (1, 0, 1, 1)


def test_shares_are_of_whole_members():
    """7 % of 100 members are 7, though 0.07 * 100 > 7; the bottom is at least one member."""
    plan, variables = with_codes([0] * 100)
    gradients = {"w": jnp.zeros((100, 2)).at[:, 0].set(jnp.arange(1.0, 101))}
    (row,) = gradient_dominance(plan, variables, gradients, top=0.07, bottom=0.001)
    assert row.top_norm_share == pytest.approx(sum(range(94, 101)) / 5050)
    assert row.bottom == pytest.approx(1)


def test_every_slice_has_its_own_codewords():
    plan, variables = with_codes([[0] * 5, [0] * 5])
    gradients = {"w": jnp.array([MEMBERS, [[-2.0, 0.0]] * 5])}
    (row,) = gradient_dominance(plan, variables, gradients, **BY_HAND)
    assert (row.codewords, row.left_out) == (2, 4)
    assert row.top == pytest.approx((0.8 + 1) / 2)


def test_directions_without_agreement():
    """n random members agree by about 1 / sqrt(n), and the largest ones lead."""
    plan, variables = with_codes(np.arange(3000) % 3)
    (row,) = gradient_dominance(plan, variables, {"w": random(3000, 2, seed=3)})
    assert row.agreement is not None
    assert 0.1 < row.agreement * math.sqrt(1000) < 3
    assert row.top_norm_share is not None
    assert 0.05 < row.top_norm_share < 0.2


def by_brute_force(members, codes, top, bottom, least_members):
    rows, weights = [], []
    for code in np.unique(codes):
        g = sorted(members[codes == code], key=np.linalg.norm, reverse=True)
        if len(g) < least_members:
            continue
        high, low = math.ceil(top * len(g)), math.floor(bottom * len(g))
        s, t, b = sum(g), sum(g[:high]), sum(g[-low:])
        norms = [np.linalg.norm(x) for x in g]
        cosines = [s @ x / np.linalg.norm(s) / np.linalg.norm(x) for x in (t, b)]
        rows.append([*cosines, sum(norms[:high]) / sum(norms), np.linalg.norm(s) / sum(norms)])
        weights.append(len(g))
    return len(rows), np.average(rows, axis=0, weights=weights)


def test_against_brute_force():
    params = {"w": random(48, 64)}
    plan, variables = planned(params, [("w", ssvq.SignSplit(codewords=32, dim=4))])
    gradients = {"w": random(48, 64, seed=2) ** 3}
    (row,) = gradient_dominance(plan, variables, gradients, top=0.11, bottom=0.47)
    signed = np.asarray(
        gradients["w"] * jnp.sign(variables["vq"]["w"]["sign_latent"]), np.float64
    ).reshape(-1, 4)
    codes = np.asarray(variables["vq_state"]["w"]["codes"])
    count, expected = by_brute_force(signed, codes, 0.11, 0.47, 20)
    assert (row.codewords, row.left_out) == (count, 32 - count)
    assert 0 < count < 32
    np.testing.assert_allclose(figures(row), expected, rtol=1e-6)


def codebook_gradients(plan, variables, gradients):
    learned, fixed = ssvq.split(variables)

    def inner(vq):
        decoded = plan.decode({**learned, "vq": vq} | fixed)
        products = jax.tree.map(lambda w, g: jnp.sum(w * g), decoded, gradients)
        return jax.tree.reduce(jnp.add, products)

    return {
        name: fields["codebook"] for name, fields in jax.jit(jax.grad(inner))(learned["vq"]).items()
    }


@pytest.mark.parametrize("method", CODEBOOK_METHODS)
@pytest.mark.parametrize("kind", ["plain", "padded", "scaled", "stacked", "shared", "float16"])
def test_member_gradients_add_up_to_the_codebooks(method, kind):
    if kind == "shared" and not method.separable:
        pytest.skip("its leaves share no codebook")
    options = {
        "padded": {"pad": True},
        "scaled": {"channel_scale": True},
        "float16": {"codebook_dtype": "float16", "axis": 0},
    }.get(kind, {})
    shapes = {"padded": (16, 13), "stacked": (3, 16, 16)}
    params = {"a": random(*shapes.get(kind, (16, 16)))}
    quantizer = method(codewords=4, dim=8, **options)
    rule = ssvq.Rule(".*", quantizer, stacked=int(kind == "stacked"))
    if kind == "shared":
        params["b"] = random(8, 8, seed=1)
        rule = dataclasses.replace(rule, share="both")
    plan, variables = planned(params, [rule])
    gradients = {path: random(*w.shape, seed=2) for path, w in params.items()}

    (entry,) = plan.entries
    members = np.asarray(member_gradients(entry, variables, gradients))
    codes = np.asarray(variables["vq_state"][entry.name]["codes"])
    assert members.shape == (*codes.shape, 8)
    expected = codebook_gradients(plan, variables, gradients)[entry.name]
    summed = np.zeros((*codes.shape[:-1], 4, 8))
    for lead in np.ndindex(codes.shape[:-1]):
        np.add.at(summed[lead], codes[lead], members[lead])
    np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-5)


def test_members_of_a_plain_codebook_are_the_gradients_own_sub_vectors():
    params = {"w": random(4, 13)}
    plan, variables = planned(params, [("w", ssvq.Vector(codewords=4, dim=8, pad=True))])
    gradient = random(4, 13, seed=1)
    members = member_gradients(plan.entries[0], variables, {"w": gradient})
    np.testing.assert_array_equal(members, jnp.pad(gradient, ((0, 0), (0, 3))).reshape(8, 8))


def test_gradients_of_small_leaves_are_not_rounded():
    params = {"a": random(8, 8, dtype="bfloat16"), "b": random(8, 8, dtype="bfloat16")}
    gradients = {path: random(8, 8, seed=2) for path in params}
    rule = ssvq.Rule(".*", ssvq.Vector(codewords=2, dim=8), share="both")
    plan, variables = planned(params, [rule])
    members = member_gradients(plan.entries[0], variables, gradients)
    np.testing.assert_array_equal(members, jnp.concatenate(list(gradients.values())))


def test_leaves_without_a_codebook_are_skipped():
    params = {"a": random(16, 16), "b": random(16, 16), "c": random(16)}
    quantizer = ssvq.Vector(codewords=2, dim=4)
    plan, variables = planned(params, [("a", quantizer), ("b", ssvq.Uniform()), ("c", None)])
    rows = gradient_dominance(plan, variables, {"a": random(16, 16, seed=2)})
    assert [(row.path, row.codewords + row.left_out) for row in rows] == [("a", 2)]


def test_a_plan_without_codebooks_is_an_error():
    plan, variables = planned({"a": random(16, 16)}, [("a", ssvq.Uniform())])
    with pytest.raises(ValueError, match="no leaf by a codebook.*e.g. Vector or SignSplit"):
        gradient_dominance(plan, variables, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0.0}, "top=0.0: a share"),
        ({"top": math.nan}, "top=nan: a share"),
        ({"bottom": 1.1}, "bottom=1.1: a share"),
        ({"least_members": 0}, "least_members=0: it must be a whole number, at least 1"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_dominance(*with_codes([0] * 5), {"w": jnp.ones((5, 2))}, **options)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"v": jnp.ones((5, 2))}, "gradients of leaf 'w' are missing"),
        ({"w": None}, "gradients of leaf 'w' are missing"),
        ({"w": jnp.ones((2, 5))}, r"leaf 'w' have shape \(2, 5\), the leaf \(5, 2\)"),
        ({"w": jnp.full((5, 2), jnp.nan)}, "leaf 'w' hold 10 NaN or infinite values of 10"),
    ],
)
def test_gradients_that_do_not_fit_are_errors(gradients, message):
    with pytest.raises(ValueError, match=message):
        gradient_dominance(*with_codes([0] * 5), gradients)


def test_missing_collections_are_an_error():
    plan, variables = with_codes([0] * 5)
    del variables["vq_state"]
    with pytest.raises(ValueError, match=r"lack the collections \['vq_state'\]"):
        gradient_dominance(plan, variables, {"w": jnp.ones((5, 2))})


def test_dense_gradients_are_means_over_batches_by_hand():
    # d/dw of (w x - 1)^2 at w = 2 is 2 x (2 x - 1): 2, 12 and 30 for x = 1, 2, 3.
    params = {"w": jnp.array(2.0), "unused": jnp.zeros(3, "bfloat16")}
    found = dense_gradients(lambda p, x: (p["w"] * x - 1) ** 2, params, iter([1.0, 2.0, 3.0]))
    assert float(found["w"]) == pytest.approx(44 / 3)
    assert found["unused"].dtype == jnp.float32
    assert not found["unused"].any()
    with pytest.raises(ValueError, match="no batches"):
        dense_gradients(lambda p, x: p["w"] * x, params, [])


def test_from_a_loss_to_the_figures():
    """The gradients of the decoded weights sum to the codebook's own."""
    plan, variables = planned({"w": random(32, 32)}, [("w", ssvq.SignSplit(codewords=4, dim=4))])
    batches = random(2, 16, 32, seed=3)

    def loss(params, batch):
        return jnp.mean((batch @ params["w"] - 1) ** 2)

    gradients = dense_gradients(loss, jax.jit(plan.decode)(variables), batches)
    (row,) = gradient_dominance(plan, variables, gradients)
    learned, fixed = ssvq.split(variables)

    def mean_loss(vq):
        params = plan.decode({**learned, "vq": vq} | fixed)
        return (loss(params, batches[0]) + loss(params, batches[1])) / 2

    expected = jax.jit(jax.grad(mean_loss))(learned["vq"])["w"]["codebook"]
    found = codebook_gradients(plan, variables, gradients)["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert row.codewords == 4
    assert row.top is not None
    assert row.top > 0
