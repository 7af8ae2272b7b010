import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.training.perplexity import make_perplexity, make_reading

WINDOWS = [np.array(x, np.int32) for x in ([0, 1, 2, 2], [2, 2, 1, 0], [1, 1, 1, 1])]


def bigram(params, tokens):
    """Logits that depend on the last token alone."""
    return params["table"][tokens]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_perplexity_of_a_bigram_model(batch):
    table = np.random.default_rng(0).normal(size=(3, 3))
    shares = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    pairs = [(a, b) for window in WINDOWS for a, b in itertools.pairwise(window)]
    loss = -np.mean([np.log(shares[a, b]) for a, b in pairs])
    right = np.mean([np.argmax(shares[a]) == b for a, b in pairs])
    evaluate = make_perplexity(bigram, batch=batch)
    found = evaluate({"table": jnp.asarray(table, jnp.float32)}, iter(WINDOWS))
    np.testing.assert_allclose(found[:3], [loss, np.exp(loss), right], rtol=1e-6)
    assert found.tokens == 9


def test_bfloat16_logits_are_normalized_in_float32():
    table = jax.random.normal(jax.random.key(0), (3, 3)).astype(jnp.bfloat16)
    exact = make_perplexity(bigram)({"table": table.astype(jnp.float32)}, WINDOWS)
    assert make_perplexity(bigram)({"table": table}, WINDOWS) == exact


def test_what_is_filled_up_does_not_count():
    table = jnp.zeros((3, 3)).at[0].set(jnp.nan)  # the filling is of token 0
    windows = [np.array([1, 2, 1], np.int32)]
    found = make_perplexity(bigram, batch=4)({"table": table}, windows)
    assert found.perplexity == pytest.approx(3)


def test_hopeless_model():
    table = jnp.array([[0.0, -2000.0], [0.0, 0.0]])
    found = make_perplexity(bigram)({"table": table}, [np.array([0, 1], np.int32)])
    assert (found.loss, found.perplexity) == (2000.0, np.inf)


@pytest.mark.usefixtures("as_installed")
def test_refuses():
    evaluate = make_perplexity(bigram)
    params = {"table": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match="no windows"):
        evaluate(params, [])
    with pytest.raises(ValueError, match=r"windows of \[3, 4\] tokens: give windows of one"):
        evaluate(params, [WINDOWS[0], WINDOWS[0][:3]])
    with pytest.raises(ValueError, match=r"windows of \[1\] tokens"):
        evaluate(params, [WINDOWS[0][:1]])
    with pytest.raises(ValueError, match="batch=0"):
        make_perplexity(bigram, batch=0)


def test_agreement_is_the_share_of_places_with_the_same_likeliest_token():
    windows = [np.array([0, 1, 2, 3], np.int32), np.array([1, 1, 2, 0], np.int32)]

    def forward(params, tokens):  # the next token is the one that params say for this one
        return jax.nn.one_hot(params[tokens], 4)

    read = make_reading(forward, batch=3)
    counting, other = (read(jnp.array(table), windows) for table in ([1, 2, 3, 0], [1, 0, 3, 0]))
    assert counting.first.tolist() == [[1, 2, 3], [2, 2, 3]]
    assert other.first.tolist() == [[1, 0, 3], [0, 0, 3]]
    assert counting.agreement(other) == 3 / 6
    assert counting.agreement(counting) == 1
    assert counting.quality.accuracy == 4 / 6
    with pytest.raises(ValueError, match="compare readings of the same windows"):
        counting.agreement(read(jnp.array([0, 0, 0, 0]), windows[:1]))
