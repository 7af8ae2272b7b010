"""The freezing rule, worked by hand: momentum 0.5, so that every average is exact."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax import cosine_threshold, freeze_signs
from ssvq_jax.training.freezing import FreezeState

PATH = "w/sign_latent"


@pytest.fixture(autouse=True)
def optax_promotion():
    """Optax's Adam multiplies integers with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def tree(values, dtype="float32"):
    return {"w": {"sign_latent": jnp.array(values, dtype)}}


def drive(tx, start, targets, dtype="float32"):
    """Moves the latents to each row of targets in turn (sgd with lr 1 does what it is told)."""
    params = tree(start, dtype)
    state = tx.init(params)
    assert isinstance(state, FreezeState)
    history = []
    for target in targets:
        grads = jax.tree.map(lambda p, t=target: p - jnp.array(t, dtype), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params["w"]["sign_latent"], state))
    return history


def frequencies(history):
    return [state.frequency[PATH].tolist() for _, state in history]


def frozen(history):
    return [state.frozen[PATH].tolist() for _, state in history]


@dtypes
def test_frequency_counts_every_flip_after_the_first(dtype):
    tx = freeze_signs(optax.sgd(1.0), every=1, threshold=2.0, momentum=0.5)
    #            oscillates, settles, stays, at zero (positive), from zero to negative
    start = [1.0, 1.0, -1.0, 0.0, 0.0]
    targets = [
        [-1.0, -1.0, -2.0, 0.0, -1.0],
        [1.0, -1.0, -2.0, 0.0, 0.0],
        [-1.0, -1.0, -2.0, 0.0, 0.0],
        [1.0, -1.0, -2.0, 0.0, 0.0],
    ]
    assert frequencies(drive(tx, start, targets, dtype)) == [
        [0.0, 0.0, -1.0, -1.0, 0.0],  # first flips only start the average
        [0.5, 0.0, -1.0, -1.0, 0.5],  # zero counts as positive: -1 -> 0 is a flip
        [0.75, 0.0, -1.0, -1.0, 0.25],
        [0.875, 0.0, -1.0, -1.0, 0.125],
    ]


@dtypes
def test_oscillating_sign_freezes_at_the_majority_and_never_moves_again(dtype):
    tx = freeze_signs(optax.sgd(1.0), every=4, threshold=0.5, momentum=0.5)
    start = [1.0, 1.0]
    # The first sign is negative after 3 of 4 updates but positive when it freezes.
    targets = [[-3.0, 2.0], [-1.5, 2.0], [-3.0, 2.0], [1.0, 2.0], [9.0, 3.0], [9.0, -3.0]]
    history = drive(tx, start, targets, dtype)
    # signs after each update: -, -, -, then + at the freezing step; flips at 1 and 4
    assert frequencies(history)[3][0] == 0.5
    assert frozen(history)[3] == [False, False]  # 0.5 is not above the threshold
    tx = freeze_signs(optax.sgd(1.0), every=4, threshold=0.4, momentum=0.5)
    history = drive(tx, start, targets, dtype)
    assert frozen(history)[3] == [True, False]
    # Three of four votes are negative: the latent stays at -3 instead of moving to 1.
    assert float(history[3][0][0]) == -3.0
    assert [float(latents[0]) for latents, _ in history[3:]] == [-3.0, -3.0, -3.0]
    assert [float(latents[1]) for latents, _ in history[3:]] == [2.0, 3.0, -3.0]


@dtypes
def test_freezing_update_is_exactly_minus_two_p(dtype):
    tx = freeze_signs(optax.sgd(1.0), every=4, threshold=0.1, momentum=0.5)
    value = float(jnp.asarray(0.1, dtype))  # not a power of two
    # positive, positive, positive, but negative before the freezing step; flips at 3 and 4
    history = drive(tx, [1.0], [[value], [value], [-value], [value]], dtype)
    assert frozen(history)[3] == [True]
    assert float(history[3][0][0]) == value  # -value - 2 * (-value)


@dtypes
def test_frozen_zero_gets_a_tiny_value_of_the_voted_sign(dtype):
    tx = freeze_signs(optax.sgd(1.0), every=4, threshold=0.1, momentum=0.5)
    # Three negative votes; the latent is zero (positive) before the freezing step.
    history = drive(tx, [-1.0], [[-1.0], [-1.0], [0.0], [-1.0]], dtype)
    assert frozen(history)[3] == [True]
    latent = float(history[3][0][0])
    assert latent == -float(jnp.finfo(dtype).tiny)


@dtypes
def test_draw_keeps_the_present_sign(dtype):
    tx = freeze_signs(optax.sgd(1.0), every=2, threshold=0.1, momentum=0.5)
    history = drive(tx, [1.0, -1.0], [[-1.0, 1.0], [1.0, -1.0]], dtype)
    assert frozen(history)[1] == [True, True]
    assert [float(x) for x in history[1][0]] == [-1.0, 1.0]


def test_votes_count_all_updates_or_the_window_before_a_freezing_step():
    # 4 negative votes, then 2 positive ones; flips at 1, 5: f = 0.25 after 6.
    targets = [[-1.0]] * 4 + [[1.0]] * 2
    for window, expected in ((None, -1.0), (6, -1.0), (2, 1.0), (1, 1.0)):
        tx = freeze_signs(optax.sgd(1.0), every=6, threshold=0.1, momentum=0.5, vote_window=window)
        history = drive(tx, [1.0], targets)
        assert frozen(history)[5] == [True]
        assert float(history[5][0][0]) == expected


def test_window_forgets_votes_of_the_last_interval():
    tx = freeze_signs(optax.sgd(1.0), every=2, threshold=0.3, momentum=0.5, vote_window=2)
    # Flips at 1 and 4; votes of updates 1-2 are negative, of 3-4: -, +. A draw keeps p = -1.
    history = drive(tx, [1.0], [[-1.0], [-1.0], [-1.0], [1.0]])
    assert [s.opinion[PATH].tolist() for _, s in history] == [[-1], [0], [-1], [0]]
    assert frozen(history)[3] == [True]
    assert float(history[3][0][0]) == -1.0


def test_votes_of_the_warmup_are_outside_the_window():
    tx = freeze_signs(optax.sgd(1.0), every=2, threshold=0.1, momentum=0.5, warmup=4, vote_window=1)
    history = drive(tx, [1.0], [[-1.0], [-1.0], [1.0], [-1.0], [1.0], [1.0]])
    assert [f[0] for f in frozen(history)] == [False] * 5 + [True]
    assert float(history[5][0][0]) == 1.0  # the one vote in the window


def test_the_papers_ablations_average_and_current_sign():
    targets = [[-1.0]] * 3 + [[1.0]]  # flips at 1 and 4
    current = freeze_signs(
        optax.sgd(1.0), every=4, threshold=0.1, momentum=0.5, freeze_to="current"
    )
    history = drive(current, [1.0], targets)
    assert float(history[3][0][0]) == 1.0
    assert history[3][1].opinion == {}
    average = freeze_signs(
        optax.sgd(1.0), every=4, threshold=0.1, momentum=0.5, freeze_to="average"
    )
    history = drive(average, [1.0], targets)
    # 1 -> 0 -> -0.5 -> -0.75 -> 0.125: the average is positive although most votes are negative
    assert [s.opinion[PATH].item() for _, s in history] == [0.0, -0.5, -0.75, 0.125]
    assert float(history[3][0][0]) == 1.0


def test_nothing_freezes_in_the_warmup_or_between_intervals():
    targets = [[-1.0], [1.0]] * 5
    tx = freeze_signs(optax.sgd(1.0), every=3, threshold=0.1, momentum=0.5, warmup=4)
    history = drive(tx, [1.0], targets)
    assert [f[0] for f in frozen(history)] == [False] * 5 + [True] * 5


def test_threshold_schedule_is_read_at_the_update_count():
    seen = freeze_signs(
        optax.sgd(1.0), every=1, momentum=0.5,
        threshold=lambda count: jnp.where(count >= 4, 0.1, 2.0),
    )  # fmt: skip
    history = drive(seen, [1.0], [[-1.0], [1.0]] * 3)
    assert [f[0] for f in frozen(history)] == [False] * 3 + [True] * 3


def test_cosine_threshold():
    threshold = cosine_threshold(start=0.5, end=0.1, steps=10)
    np.testing.assert_allclose([threshold(t) for t in (0, 5, 10, 11)], [0.5, 0.3, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"start=0.1 to end=0.2: it must fall"):
        cosine_threshold(start=0.1, end=0.2, steps=10)


def test_frozen_entries_weigh_in_no_norm():
    params = {"dense": jnp.array([1.0]), **tree([1.0])}
    tx = freeze_signs(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), every=1, threshold=0.0
    )
    state = tx.init(params)
    state = state._replace(frozen={PATH: jnp.array([True])})
    grads = {"dense": jnp.array([0.5]), **tree([1e6])}
    updates, _ = tx.update(grads, state, params)
    assert updates["dense"].tolist() == [-0.5]  # not clipped
    assert updates["w"]["sign_latent"].tolist() == [0.0]


def test_frozen_entries_ignore_momentum_and_weight_decay():
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0, momentum=0.1))
    tx = freeze_signs(inner, every=2, threshold=0.1, momentum=0.5)
    params = tree([0.05, 5.0])
    state = tx.init(params)
    values = []
    for step in range(8):
        grads = tree([(-1.0) ** step * 9.0, 1.0])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        values.append(params["w"]["sign_latent"].tolist())
    first = state.frozen[PATH].tolist()
    assert first[1] is False
    tail = [v[0] for v in values[-3:]]
    assert first[0] is True
    assert tail[0] == tail[1] == tail[2]
    assert values[-1][1] != values[-2][1]


def test_other_leaves_and_trees_without_latents_pass_unchanged():
    params = {"kernel": jnp.arange(3.0), "bias": [jnp.ones(2), None]}
    grads = jax.tree.map(jnp.ones_like, params)
    plain, wrapped = optax.adam(0.1), freeze_signs(optax.adam(0.1), every=1, threshold=0.0)
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, state = wrapped.update(grads, wrapped.init(params), params)
    chex.assert_trees_all_equal(expected, updates)
    assert state.frozen == {}


def test_one_trace_for_the_whole_schedule_and_equal_to_eager():
    tx = freeze_signs(
        optax.adam(0.3), every=3, threshold=cosine_threshold(0.4, 0.01, 20), momentum=0.2, warmup=2
    )
    noise = jax.random.normal(jax.random.key(0), (20, 64))

    @chex.assert_max_traces(n=1)
    def step(params, state, grad):
        updates, state = tx.update({"w": {"sign_latent": grad}}, state, params)
        return optax.apply_updates(params, updates), state

    results = []
    for run in (jax.jit(step), step):
        params = tree(0.1 * noise[0])
        state = tx.init(params)
        for grad in noise:
            params, state = run(params, state, grad)
        results.append((params, state.frozen))
    assert 0 < int(results[0][1][PATH].sum()) < 64
    assert np.array_equal(results[0][1][PATH], results[1][1][PATH])
    np.testing.assert_allclose(
        results[0][0]["w"]["sign_latent"], results[1][0]["w"]["sign_latent"], rtol=1e-4
    )


@pytest.mark.parametrize(("freeze_to", "most"), [("vote", 9), ("average", 9), ("current", 5)])
def test_state_bytes_a_latent_weight(freeze_to, most):
    params = tree(np.ones(1000))
    inner = optax.adam(0.1)
    wrapped = freeze_signs(inner, every=1, threshold=0.1, freeze_to=freeze_to)

    def size(tx):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))

    assert size(wrapped) - size(inner) == 1000 * most + 4  # and the step counter


def test_gradient_accumulation_goes_outside():
    tx = optax.MultiSteps(
        freeze_signs(optax.sgd(1.0), every=2, threshold=0.1, momentum=0.5), every_k_schedule=2
    )
    params = tree([1.0])
    state = tx.init(params)
    for grad in (2.0, 2.0, -2.0, -2.0):  # two real updates: to -1, and back
        updates, state = tx.update(tree([grad]), state, params)
        params = optax.apply_updates(params, updates)
    inner = state.inner_opt_state
    assert isinstance(inner, FreezeState)
    assert int(inner.step) == 2
    assert inner.frozen[PATH].tolist() == [True]


@given(
    st.lists(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]), min_size=3, max_size=3),
             min_size=6, max_size=6),
    st.sampled_from(["vote", "average", "current"]),
)  # fmt: skip
def test_frozen_is_for_good_and_keeps_the_sign(targets, freeze_to):
    tx = freeze_signs(optax.sgd(1.0), every=2, threshold=0.05, momentum=0.5, freeze_to=freeze_to)
    history = drive(tx, [1.0, -1.0, 0.0], targets)
    for (latents, state), (later, after) in itertools.pairwise(history):
        mask = np.asarray(state.frozen[PATH])
        assert np.all(np.asarray(after.frozen[PATH])[mask])
        assert np.array_equal(np.asarray(latents)[mask], np.asarray(later)[mask])


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5: it must be a whole number"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"momentum": 0.0}, "momentum=0.0: it must be above 0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"vote_window": 11}, "vote_window=11: .* every=10"),
        ({"vote_window": 5, "freeze_to": "current"}, "vote_window=5: it needs freeze_to='vote'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        freeze_signs(optax.sgd(1.0), **({"every": 10, "threshold": 0.1} | settings))


def test_params_are_needed():
    tx = freeze_signs(optax.sgd(1.0), every=1, threshold=0.1)
    params = tree([1.0])
    with pytest.raises(ValueError, match="freeze_signs needs params"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("name", ["threshold", "momentum"])
def test_numbers_may_be_injected_and_mapped(name):
    numbers = {"threshold": 0.05, "momentum": 0.1}
    params = {"w": {"sign_latent": jnp.array([0.5, -0.5])}}
    grads = {"w": {"sign_latent": jnp.array([1.0, 0.0])}}

    def make(value):
        return freeze_signs(optax.sgd(1.0), every=1, **(numbers | {name: value}))

    def run(tx):
        state = tx.init(params)
        for step in range(5):
            turned = jax.tree.map(lambda x, step=step: x * (-1.0) ** step, grads)
            _, state = jax.jit(tx.update)(turned, state, params)
        return state

    plain = run(make(numbers[name]))
    injected = run(optax.inject_hyperparams(make)(value=numbers[name]))
    chex.assert_trees_all_equal(injected.inner_state.frozen, plain.frozen)
    states = jax.vmap(lambda value: make(value).update(grads, make(value).init(params), params)[1])(
        jnp.array([numbers[name], 0.5])
    )
    assert states.frozen["w/sign_latent"].shape == (2, 2)


def test_the_ends_of_a_threshold_may_be_mapped():
    values = jax.vmap(lambda start: cosine_threshold(start, 0.0, 10)(5))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(values, [0.05, 0.1], rtol=1e-6)
