import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.training.batch_norm import reestimate_batch_norm
from ssvq_jax.training.evaluation import make_evaluate
from ssvq_jax.training.step import linen_forward

KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Norms(nn.Module):
    """Dense, norm, dropout, dense, norm: with a momentum a norm; None uses running averages."""

    momenta: tuple[float | None, float | None] = (0.9, 0.99)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i, momentum in enumerate(self.momenta):
            x = nn.Dense(4, name=f"dense{i}")(x)
            frozen = momentum is None or not train
            norm = nn.BatchNorm(frozen, momentum=0.9 if frozen else momentum, name=f"norm{i}")
            x = nn.relu(norm(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


def data(count=6, size=8, seed=0):
    images = 3.0 + 2.0 * jax.random.normal(jax.random.key(seed), (count, size, 4))
    return [{"image": image + i} for i, image in enumerate(np.asarray(images))]


def setup(model, stale=1.0):
    """Parameters, and statistics that fit nothing."""
    variables = model.init(jax.random.key(1), data()[0]["image"])
    stats = jax.tree.map(lambda s: s + stale, variables["batch_stats"])
    return variables["params"], {"batch_stats": stats}


def first_layer(params, batches):
    """Inputs of the first norm, in float64."""
    images = np.concatenate([batch["image"] for batch in batches]).astype(np.float64)
    dense = jax.tree.map(np.float64, params["dense0"])
    return images @ dense["kernel"] + dense["bias"]


def test_one_layer_by_hand():
    """Batch [1, 3] has mean 2 and variance 1, batch [5, 9] mean 7 and variance 4."""

    def forward(params, state, images, key):
        old, moments = state["batch_stats"], {"mean": jnp.mean(images), "var": jnp.var(images)}
        stats = {name: 0.5 * old[name] + 0.5 * moments[name] for name in old}
        return images, {**state, "batch_stats": stats}

    state = {"batch_stats": {"mean": jnp.array(100.0), "var": jnp.array(-3.0)}, "other": 1}
    batches = [{"image": np.array(x, np.float32)} for x in ([1, 3], [5, 9])]
    found = reestimate_batch_norm(forward, {}, state, batches, 2, KEY)
    mean, var = np.mean([1, 3, 5, 9]), np.var([1, 3, 5, 9])
    assert found == {"batch_stats": {"mean": mean, "var": var}, "other": 1}
    assert var == (1 + 4) / 2 + np.var([2, 7])  # the law of total variance


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 5)])
def test_first_layer_has_the_moments_of_all_examples(momentum, sizes):
    model = Norms(momenta=(momentum, 0.9))
    params, state = setup(model)
    batches = [{"image": b["image"][:n]} for b, n in zip(data(), sizes, strict=False)]
    found = reestimate_batch_norm(linen_forward(model), params, state, batches, 3, KEY)
    inputs, stats = first_layer(params, batches), found["batch_stats"]["norm0"]
    # float32 holds 1 - m to 3e-8 / (1 - m).
    rtol = 1e-5 + 1e-7 / (1 - momentum)
    np.testing.assert_allclose(stats["mean"], inputs.mean(0), rtol=rtol)
    np.testing.assert_allclose(stats["var"], inputs.var(0), rtol=rtol)


def test_layers_on_top_get_the_statistics_of_training_mode_whatever_the_momenta():
    """With momentum 0 the running averages are the batch's statistics."""
    params, state = setup(Norms())
    forward, bare = linen_forward(Norms()), linen_forward(Norms(momenta=(0.0, 0.0)))
    found = reestimate_batch_norm(forward, params, state, data(), 6, KEY)["batch_stats"]
    each = [
        bare(params, state, jnp.asarray(batch["image"]), KEY)[1]["batch_stats"] for batch in data()
    ]
    for name in ("norm0", "norm1"):
        means = np.stack([stats[name]["mean"] for stats in each])
        variances = np.stack([stats[name]["var"] for stats in each])
        np.testing.assert_allclose(found[name]["mean"], means.mean(0), rtol=2e-5)
        expected = variances.mean(0) + means.var(0)
        np.testing.assert_allclose(found[name]["var"], expected, rtol=2e-5)


def test_the_old_statistics_do_not_matter():
    params, state = setup(Norms())
    forward = linen_forward(Norms())
    found = reestimate_batch_norm(forward, params, state, data(), 6, KEY)
    for value in (-1e6, 0.0, np.inf, np.nan):
        other = jax.tree.map(lambda s, v=value: jnp.full_like(s, v), state)
        again = reestimate_batch_norm(forward, params, other, data(), 6, KEY)
        chex.assert_trees_all_equal(found, again)


def test_a_layer_in_evaluation_mode_keeps_its_statistics_and_is_computed_with_them():
    params, state = setup(Norms(momenta=(None, 0.99)), stale=2.7)
    forward = linen_forward(Norms(momenta=(None, 0.99)))
    found = reestimate_batch_norm(forward, params, state, data(), 3, KEY)["batch_stats"]
    chex.assert_trees_all_equal(found["norm0"], state["batch_stats"]["norm0"])
    bare = linen_forward(Norms(momenta=(None, 0.0)))
    each = [
        bare(params, state, jnp.asarray(batch["image"]), KEY)[1]["batch_stats"]
        for batch in data()[:3]
    ]
    expected = np.mean([stats["norm1"]["mean"] for stats in each], axis=0)
    np.testing.assert_allclose(found["norm1"]["mean"], expected, rtol=2e-5)


def test_momentum_one_keeps_the_statistics():
    params, state = setup(Norms(momenta=(1.0, 1.0)), stale=2.7)
    found = reestimate_batch_norm(
        linen_forward(Norms(momenta=(1.0, 1.0))), params, state, data(size=3), 3, KEY
    )
    chex.assert_trees_all_equal(found, state)


def test_dtypes_and_whole_numbers_stay():
    params, state = setup(Norms(momenta=(0.99, 0.99)))
    exact = reestimate_batch_norm(linen_forward(Norms()), params, state, data(), 6, KEY)
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), state["batch_stats"])
    inner = linen_forward(Norms(momenta=(0.99, 0.99)))

    def forward(params, state, images, key):
        stats = dict(state["batch_stats"])
        steps = stats.pop("steps")
        logits, new = inner(params, {"batch_stats": stats}, images, key)
        return logits, {"batch_stats": {**new["batch_stats"], "steps": steps + 1}}

    given = {"batch_stats": {**half, "steps": jnp.array(5)}}
    found = reestimate_batch_norm(forward, params, given, data(), 6, KEY)["batch_stats"]
    assert int(found.pop("steps")) == 5
    for leaf, expected in zip(
        jax.tree.leaves(found), jax.tree.leaves(exact["batch_stats"]), strict=True
    ):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(jnp.float32), expected, rtol=2**-8)


def test_only_as_many_batches_as_asked_are_taken_and_only_one_trace_made():
    forward = chex.assert_max_traces(linen_forward(Norms()), 2)  # of its shapes, of the program
    params, state = setup(Norms())
    batches = iter(data())
    first = reestimate_batch_norm(forward, params, state, batches, 1, KEY)
    assert len(list(batches)) == 5
    more = reestimate_batch_norm(forward, params, state, data(), 6, KEY)
    assert np.any(first["batch_stats"]["norm0"]["mean"] != more["batch_stats"]["norm0"]["mean"])


def test_dropout_is_drawn_anew_for_every_batch_and_follows_the_key():
    model = Norms(dropout=0.5)
    params, state = setup(model)
    batch = data(size=64)[0]

    def upper(batches, key=KEY):
        found = reestimate_batch_norm(
            linen_forward(model), params, state, batches, len(batches), key
        )
        return np.asarray(found["batch_stats"]["norm1"]["mean"])

    np.testing.assert_array_equal(upper([batch]), upper([batch]))
    assert np.any(upper([batch]) != upper([batch], jax.random.key(8)))
    assert np.any(upper([batch]) != upper([batch, batch]))


@pytest.mark.parametrize("state", [{}, {"cache": {"x": 1.0}}, {"batch_stats": {}}])
def test_a_model_without_statistics_is_not_run(state):
    def forward(*args):
        raise AssertionError

    assert reestimate_batch_norm(forward, {}, state, [], 3, KEY) is state


def test_corrupted_statistics_recover():
    model = Norms()
    params, state = setup(model)
    forward = linen_forward(model)
    evaluate = make_evaluate(forward)
    good = reestimate_batch_norm(forward, params, state, data(), 6, KEY)
    batches = data(seed=9)
    for batch in batches:
        logits, _ = forward(params, good, jnp.asarray(batch["image"]), None)
        batch["label"] = np.argmax(logits, -1).astype(np.int32)
        batch["mask"] = np.ones(len(batch["label"]), bool)
    corrupted = jax.tree.map(lambda s: 10.0 * s + 5.0, good)
    repaired = reestimate_batch_norm(forward, params, corrupted, data(), 6, KEY)
    losses = [evaluate(params, s, batches).loss for s in (good, corrupted, repaired)]
    assert losses[1] > losses[0]
    assert losses[2] == losses[0]


def test_too_few_batches_are_an_error():
    params, state = setup(Norms())
    with pytest.raises(ValueError, match="count=7, but the data gave 6 batches"):
        reestimate_batch_norm(linen_forward(Norms()), params, state, data(), 7, KEY)
    with pytest.raises(ValueError, match="count=0: it must be a whole number, at least 1"):
        reestimate_batch_norm(linen_forward(Norms()), params, state, data(), 0, KEY)


def test_padded_batches_are_an_error():
    params, state = setup(Norms())
    (batch,) = data(count=1)
    forward = linen_forward(Norms())
    whole = {**batch, "mask": np.ones(8, bool)}
    reestimate_batch_norm(forward, params, state, [whole], 1, KEY)
    with pytest.raises(ValueError, match="padded examples"):
        reestimate_batch_norm(forward, params, state, [{**batch, "mask": np.arange(8) < 5}], 1, KEY)


def test_a_sum_is_not_taken_for_an_average():
    def forward(params, state, images, key):
        return images, {"batch_stats": {"total": state["batch_stats"]["total"] + jnp.sum(images)}}

    state = {"batch_stats": {"total": jnp.array(1.0)}}
    with pytest.raises(ValueError, match=r"does not update \['total'\] of 'batch_stats'"):
        reestimate_batch_norm(forward, {}, state, data(), 2, KEY)
