"""Moving averages of weights: by hand, with frozen signs, through a run and its resumption."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.data import ArraySplit, eval_batches, train_batches
from ssvq_jax.training.average import start_average, update_average
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig, make_optimizer
from ssvq_jax.training.run import RunOptions, Task
from ssvq_jax.training.step import linen_forward, make_state, make_train_step


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


YES = jnp.array(True)


def test_by_hand():
    average = start_average({"w": jnp.array([4.0])}, {"s": jnp.array([0.0]), "n": jnp.array(1)})
    values = [2.0, 1.0, 7.0]
    expected, state = 4.0, 0.0
    for step, value in enumerate(values, start=1):
        new = {"w": jnp.array([value])}, {"s": jnp.array([2 * value]), "n": jnp.array(step)}
        average = update_average(average, *new, {}, jnp.int32(step), YES, 0.25)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        state = decay * state + (1 - decay) * 2 * value
    np.testing.assert_allclose(average.params["w"], [expected], rtol=1e-6)
    np.testing.assert_allclose(average.model_state["s"], [state], rtol=1e-6)
    assert int(average.model_state["n"]) == 3  # counted, not averaged


def test_narrow_weights_are_averaged_in_float32():
    weights = {"w": jnp.ones(1, jnp.bfloat16)}
    average = start_average({"w": jnp.zeros(1, jnp.bfloat16)}, {})
    for step in range(1_000_000, 1_000_100):
        average = update_average(average, weights, {}, {}, jnp.int32(step), YES, 0.9999)
    np.testing.assert_allclose(average.params["w"], [1 - 0.9999**100], rtol=1e-3)
    params, _ = average.read((weights, {}))
    assert params["w"].dtype == jnp.bfloat16


def test_frozen_signs_are_taken_as_they_are():
    path = "vq/w/sign_latent"
    tree = {"vq": {"w": {"sign_latent": jnp.array([1.0, 1.0])}}}
    average = start_average(tree, {})
    flipped = jax.tree.map(lambda x: -x, tree)
    frozen = {path: jnp.array([True, False])}
    average = update_average(average, flipped, {}, frozen, jnp.int32(1000), YES, 0.9)
    np.testing.assert_allclose(average.params["vq"]["w"]["sign_latent"], [-1.0, 0.8], rtol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Dense(32, name="fc1")(images.reshape(images.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="bn")(x)
        return nn.Dense(4, name="fc2")(nn.relu(x))


FAST = OptimizerConfig(
    dense=1e-2, codebook=1e-2, sign=5e-2, warmup_share=0.0,
    freeze=FreezeConfig(every=2, start=0.05, end=0.005, momentum=0.5, warmup_share=0.1),
)  # fmt: skip
STEPS, DECAY = 24, 0.8


@pytest.fixture(scope="module")
def setup():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (64, 4, 4, 1), dtype=np.uint8)
    labels = np.int32(np.argmax(images.reshape(64, -1)[:, :4], axis=1))
    split = ArraySplit(images, labels, num_classes=4)
    task = Task(
        linen_forward(Net()),
        lambda seed: train_batches(split, 32, seed=seed),
        lambda: eval_batches(split, 32),
    )
    variables = dict(Net().init(jax.random.key(1), jnp.zeros((1, 4, 4, 1))))
    params = variables.pop("params")
    sign_split = ssvq.SignSplit(codewords=4, dim=4, iterations=5)
    plan = ssvq.make_plan(params, [("fc1/kernel", sign_split), (".*", None)])
    return task, plan, params, variables


def tuned(setup, folder=None, decay=DECAY, **changes):
    task, plan, params, state = setup
    settings = {
        "key": jax.random.key(0), "seed": 0, "steps": STEPS, "name": "run", "optimizer": FAST,
        "model_state": state, "options": RunOptions(average_decay=decay),
    } | changes  # fmt: skip
    if folder is None:
        return finetune(task, plan, params, **settings)
    with Checkpoints(folder, seconds=0.0) as checkpoints:
        return finetune(task, plan, params, checkpoints=checkpoints, **settings)


def test_a_run_is_judged_and_packed_by_its_average(setup):
    task, plan, params, model_state = setup
    done, last = tuned(setup), tuned(setup, decay=0.0)
    assert [x["loss"] for x in done.records] == [x["loss"] for x in last.records]
    assert done.after != last.after
    assert last.state.average is None

    # The same steps once more, averaged here.
    variables = plan.init(jax.random.split(jax.random.key(0))[0], params)
    tx = make_optimizer(plan, STEPS, FAST)
    state = make_state(
        task.forward, variables, tx, jax.random.split(jax.random.key(0))[1], model_state
    )
    step, batches = make_train_step(plan), task.train_batches(0)
    mean, scalars = jax.tree.map(np.asarray, (state.params, state.model_state)), {}
    for i in range(1, STEPS + 1):
        state, scalars = step(state, next(batches))
        decay = min(DECAY, (1 + i) / (10 + i))
        new = jax.tree.map(np.asarray, (state.params, state.model_state))
        mean = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, mean, new)
        frozen = np.asarray(state.opt_state.frozen["vq/fc1/kernel/sign_latent"])
        latent = mean[0]["vq"]["fc1/kernel"]["sign_latent"]
        latent[frozen] = new[0]["vq"]["fc1/kernel"]["sign_latent"][frozen]
    assert float(scalars["frozen"]) > 0
    expected = plan.finalize({**mean[0], **state.fixed}).decode()
    chex.assert_trees_all_close(done.packed.decode(), expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(done.state.model_state, mean[1], rtol=1e-4, atol=1e-6)


def test_a_run_that_was_cut_ends_like_one_that_was_not(setup, tmp_path):
    whole = tuned(setup, tmp_path / "whole")
    task, *_ = setup

    def stopping(seed):
        return Stopping(task.train_batches(seed), STEPS // 2)

    cut = dataclasses.replace(task, train_batches=stopping), *setup[1:]
    with pytest.raises(KeyboardInterrupt):
        tuned(cut, tmp_path / "cut")
    assert int(Checkpoints(tmp_path / "cut", read_only=True).last or 0) > 0
    resumed = tuned(setup, tmp_path / "cut")
    again = tuned(setup, tmp_path / "cut")  # read back
    for other in (resumed, again):
        chex.assert_trees_all_equal(other.packed.decode(), whole.packed.decode())
        assert other.after == whole.after


def test_a_checkpoint_of_another_decay_is_refused(setup, tmp_path):
    tuned(setup, tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"average_decay: 0\.8 there, 0\.5 now"):
        tuned(setup, tmp_path, steps=2, decay=0.5)


def test_accumulated_steps_are_one_update(setup):
    task, plan, params, model_state = setup
    config = dataclasses.replace(FAST, accumulate=3)
    variables = plan.init(jax.random.key(0), params)
    tx = make_optimizer(plan, STEPS, config)
    state = make_state(task.forward, variables, tx, jax.random.key(1), model_state, average=True)
    step, batches = make_train_step(plan, average_decay=DECAY), task.train_batches(0)
    mean = np.asarray(state.params["params"]["fc2"]["kernel"])
    for i in range(1, 10):
        state, _ = step(state, next(batches))
        if i % 3 == 0:
            decay = min(DECAY, (1 + i // 3) / (10 + i // 3))
            mean = decay * mean + (1 - decay) * np.asarray(state.params["params"]["fc2"]["kernel"])
        found = state.average.params["params"]["fc2"]["kernel"]
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("average", "decay"), [(True, 0.0), (False, 0.5)])
def test_a_state_and_a_step_that_disagree(setup, average, decay):
    task, plan, params, model_state = setup
    tx = make_optimizer(plan, STEPS, FAST)
    variables = plan.init(jax.random.key(0), params)
    state = make_state(task.forward, variables, tx, jax.random.key(1), model_state, average=average)
    with pytest.raises(ValueError, match=f"give make_state average={not average}"):
        make_train_step(plan, average_decay=decay)(state, next(task.train_batches(0)))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range(setup, decay):
    with pytest.raises(ValueError, match=f"average_decay={decay}"):
        tuned(setup, decay=decay)


class Stopping:
    """Batches that are interrupted after some."""

    def __init__(self, batches, count):
        self.batches, self.left = batches, count

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)
