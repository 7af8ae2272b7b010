import itertools

import numpy as np
import pytest

from ssvq_jax.data.token_batches import eval_token_batches, train_token_batches

WINDOWS = np.arange(35, dtype=np.int32).reshape(7, 5)


def test_labels_are_the_tokens_that_follow_and_an_epoch_has_every_window():
    batches = list(itertools.islice(train_token_batches(WINDOWS, 2, seed=3), 7))
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], batch["image"] + 1)
    firsts = np.concatenate([batch["image"][:, 0] for batch in batches])
    for epoch in (firsts[:7], firsts[7:]):
        assert sorted(epoch) == list(range(0, 35, 5))
    assert firsts[:7].tolist() != firsts[7:].tolist()


def test_goes_on_where_it_was_and_not_with_another_text():
    batches = train_token_batches(WINDOWS, 3, seed=1)
    for _ in range(4):
        next(batches)
    state, expected = batches.get_state(), next(batches)["image"]
    again = train_token_batches(WINDOWS, 3, seed=1)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["image"], expected)
    with pytest.raises(ValueError, match="the state is of batches made with windows="):
        train_token_batches(WINDOWS + 1, 3, seed=1).set_state(state)


def test_evaluation_passes_once_and_masks_what_fills_up():
    batches = list(eval_token_batches(WINDOWS, 3))
    assert [batch["mask"].tolist() for batch in batches][-1] == [True, False, False]
    kept = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(kept, WINDOWS[:, :-1])


@pytest.mark.parametrize("windows", [WINDOWS[:0], WINDOWS[:, :1]])
def test_refuses(windows):
    with pytest.raises(ValueError, match="give some, of 2 tokens or more"):
        train_token_batches(windows, 1, seed=0)
    with pytest.raises(ValueError, match="batch_size=0: give 1 or more"):
        eval_token_batches(WINDOWS, 0)
