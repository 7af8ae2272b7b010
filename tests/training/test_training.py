import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.training.evaluation import make_evaluate
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.loop import fit
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig, make_optimizer
from ssvq_jax.training.run import Task
from ssvq_jax.training.step import linen_forward, make_state, make_train_step


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Net(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Dense(32, name="fc1")(images.reshape(images.shape[0], -1))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        return nn.Dense(4, name="fc2")(nn.relu(x))


RULES = [("fc1/kernel", ssvq.SignSplit(codewords=4, dim=4, iterations=5)), (".*", None)]


def examples(count=64):
    images = np.asarray(jax.random.normal(jax.random.key(0), (count, 4, 4, 1)))
    labels = np.int32(np.argmax(images.reshape(count, -1)[:, :4], axis=1))
    return {"image": images, "label": labels}


def endless():
    while True:
        yield examples()


def task(model=None):
    batch = examples()
    return Task(
        linen_forward(model or Net()),
        lambda seed: endless(),
        lambda: [{**batch, "mask": np.ones(64, bool)}],
    )


def init(model=None):
    return (model or Net()).init(jax.random.key(1), examples()["image"])


FAST = OptimizerConfig(
    dense=1e-2, codebook=1e-2, sign=3e-2,
    freeze=FreezeConfig(every=5, start=0.05, end=0.005, momentum=0.1, warmup_share=0.2),
)  # fmt: skip


def test_finetune_recovers_what_compression_lost(tmp_path):
    floating = finetune(
        task(), ssvq.make_plan(init()["params"], [(".*", None)]), init()["params"],
        key=jax.random.key(0), seed=0, steps=150, name="float",
        optimizer=OptimizerConfig(dense=1e-2, freeze=None),
    )  # fmt: skip
    assert floating.after.accuracy > 0.95
    plan = ssvq.make_plan(floating.packed.params, RULES)
    file = tmp_path / "metrics.jsonl"
    done = finetune(
        task(), plan, floating.packed.params, key=jax.random.key(0), seed=0, steps=100,
        name="ssvq", optimizer=FAST, metrics=MetricsFile(file),
    )  # fmt: skip
    assert done.before.loss > floating.after.loss
    assert done.after.loss < done.before.loss
    lines = MetricsFile(file).read()
    assert lines == done.records
    assert [line["step"] for line in lines] == list(range(10, 101, 10))
    assert 0 < lines[-1]["frozen"] <= lines[-1]["flipped"] < 1
    assert [line["frozen"] for line in lines] == sorted(line["frozen"] for line in lines)
    assert set(done.seconds) == {"encode", "train", "evaluate"}
    # What is judged is the finalized model.
    again = make_evaluate(task().forward)(done.packed.decode(), {}, task().eval_batches())
    assert again == done.after


def test_the_step_equals_one_written_by_hand():
    params = init()["params"]
    plan = ssvq.make_plan(params, RULES)
    variables = plan.init(jax.random.key(0), params)
    tx = make_optimizer(plan, 100, FAST)
    state = make_state(task().forward, variables, tx, jax.random.key(2))
    learned, fixed = ssvq.split(variables)

    def loss(learned):
        logits = Net().apply({"params": plan.decode(learned | fixed)}, examples()["image"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), examples()["label"][:, None], 1)
        return -jnp.mean(picked)

    value, grads = jax.value_and_grad(loss)(learned)
    updates, _ = tx.update(grads, tx.init(learned), learned)
    by_hand = jax.tree.map(lambda p, u: p + u, learned, updates)
    state, metrics = make_train_step(plan)(state, examples())
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    chex.assert_trees_all_close(state.params, by_hand, atol=1e-6)


def test_one_trace_for_a_whole_run_with_freezing():
    forward = chex.assert_max_traces(linen_forward(Net()), 1)
    params = init()["params"]
    plan = ssvq.make_plan(params, RULES)
    state = make_state(
        forward, plan.init(jax.random.key(0), params), make_optimizer(plan, 40, FAST),
        jax.random.key(2),
    )  # fmt: skip
    _, records = fit(state, make_train_step(plan), endless(), 40, name="run")
    assert records[-1]["frozen"] > 0


def test_the_variables_given_survive_donation():
    params = init()["params"]
    plan = ssvq.make_plan(params, RULES)
    variables = plan.init(jax.random.key(0), params)
    state = make_state(task().forward, variables, make_optimizer(plan, 10, FAST), jax.random.key(2))
    make_train_step(plan)(state, examples())
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((variables, params)))


def test_batch_statistics_move_in_training_and_are_used_in_evaluation():
    model = Net(norm=True)
    variables = init(model)
    stats = {"batch_stats": variables["batch_stats"]}
    done = finetune(
        task(model), ssvq.make_plan(variables["params"], RULES), variables["params"],
        key=jax.random.key(0), seed=0, steps=60, name="norm", optimizer=FAST, model_state=stats,
    )  # fmt: skip
    mean = done.state.model_state["batch_stats"]["norm"]["mean"]
    assert np.any(np.asarray(mean) != 0)
    assert done.after.loss < done.before.loss
    evaluate = make_evaluate(linen_forward(model))
    stale = evaluate(done.packed.decode(), stats, task().eval_batches())
    assert stale.loss != done.after.loss


def test_padded_examples_do_not_count():
    params = init()["params"]
    batch = examples()
    batch["label"][32:] = (batch["label"][32:] + 1) % 4
    masked = {**batch, "mask": np.arange(64) < 32}
    half = {k: v[:32] for k, v in batch.items()} | {"mask": np.ones(32, bool)}
    evaluate = make_evaluate(linen_forward(Net()))
    first, second = evaluate(params, {}, [masked]), evaluate(params, {}, [half])
    assert first.examples == second.examples == 32
    assert first.accuracy == second.accuracy
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-6)
    assert first.standard_error == pytest.approx(
        (first.accuracy * (1 - first.accuracy) / 32) ** 0.5
    )


def test_empty_evaluation_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        make_evaluate(linen_forward(Net()))(init()["params"], {}, [])


def begun(steps):
    """A plan and the first state of a run."""
    params = init()["params"]
    plan = ssvq.make_plan(params, RULES)
    state = make_state(
        task().forward, plan.init(jax.random.key(0), params), make_optimizer(plan, steps, FAST),
        jax.random.key(2),
    )  # fmt: skip
    return plan, state


def test_divergence_is_named():
    plan, state = begun(10)
    broken = iter([examples() | {"image": np.full((64, 4, 4, 1), np.nan, np.float32)}] * 10)
    with pytest.raises(ValueError, match="run: the loss is nan at step 10: use lower"):
        fit(state, make_train_step(plan), broken, 10, name="run")


def test_a_signal_while_a_state_is_kept_ends_the_next_step_with_a_save():
    plan, state = begun(40)
    kept = []

    def keep(state, step, *, loss, force):
        kept.append((step, force))
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        fit(state, make_train_step(plan), endless(), 40, name="run", keep=keep)
    assert kept == [(10, False), (11, True)]


def test_without_freezing_signs_are_observed_and_never_frozen():
    params = init()["params"]
    plan = ssvq.make_plan(params, RULES)
    done = finetune(
        task(), plan, params, key=jax.random.key(0), seed=0, steps=40, name="free",
        optimizer=OptimizerConfig(sign=3e-2, freeze=None),
    )  # fmt: skip
    assert done.records[-1]["flipped"] > 0
    assert done.records[-1]["frozen"] == 0
