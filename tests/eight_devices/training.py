"""Data-parallel runs on eight devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ssvq_jax as ssvq
from ssvq_jax.training.batch_norm import reestimate_batch_norm
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.checksums import leaf_checksums
from ssvq_jax.training.evaluation import make_evaluate
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.layout import AXIS, local_layout
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig, make_optimizer
from ssvq_jax.training.run import Task
from ssvq_jax.training.step import linen_forward, make_state, make_train_step

DEVICES, STEPS, BATCH = 8, 10, 64
LAYOUTS = {
    "none": lambda: None,
    "one": lambda: local_layout(1),
    "replicated": local_layout,
    "sharded": lambda: local_layout(shard_state=True),
}
OPTIMIZER = OptimizerConfig(
    dense=1e-2, codebook=1e-2, sign=3e-2, warmup_share=0.0,
    freeze=FreezeConfig(every=2, start=0.02, end=0.005, momentum=0.1, warmup_share=0.2),
)  # fmt: skip


class Net(nn.Module):
    """A bias before the norm has a gradient of rounding errors, which Adam would blow up."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Dense(64, use_bias=False, name="fc1")(images.reshape(images.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(8, name="fc2")(x)


def batches():
    for seed in range(STEPS):
        images = np.asarray(jax.random.normal(jax.random.key(seed), (BATCH, 8, 8, 1)))
        labels = np.int32(np.argmax(images.reshape(BATCH, -1)[:, :8], axis=1))
        yield {"image": images, "label": labels}


@pytest.fixture(autouse=True)
def users_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def start():
    """A plan, its encoded weights and batch statistics, and a forward pass that counts traces."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = Net().init(jax.random.key(0), next(batches())["image"])
        rules = [("fc1/kernel", ssvq.SignSplit(codewords=8, dim=4, iterations=5)), (".*", None)]
        plan = ssvq.make_plan(variables["params"], rules)
        encoded = plan.init(jax.random.key(1), variables["params"])
    return plan, encoded, {"batch_stats": variables["batch_stats"]}


@pytest.fixture(scope="module")
def runs(start):
    """Ten steps in every layout: start state's shardings, final state, losses; one trace each."""
    plan, encoded, statistics = start
    done = {}
    for name, make in LAYOUTS.items():
        chex.clear_trace_counter()
        forward = chex.assert_max_traces(linen_forward(Net()), 1)  # for the whole run
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            layout = make()
            tx = make_optimizer(plan, STEPS, OPTIMIZER)
            given = make_state(forward, encoded, tx, jax.random.key(2), statistics)
            state = given if layout is None else layout.place(given)
            step = make_train_step(plan, layout=layout)
            losses, frozen = [], []
            for batch in batches():
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
                frozen.append(float(metrics["frozen"]))
        done[name] = {
            "given": given, "state": state, "losses": losses, "frozen": frozen,
            "layout": layout, "step": step,
        }  # fmt: skip
    return done


def test_there_are_eight_devices():
    assert len(jax.local_devices()) == DEVICES
    assert local_layout().devices == DEVICES
    assert local_layout(4).mesh.devices.tolist() == jax.local_devices()[:4]


def test_a_layout_of_one_device_gives_the_same_bits(runs):
    assert runs["one"]["losses"] == runs["none"]["losses"]
    plain, placed = runs["none"]["state"], runs["one"]["state"]
    chex.assert_trees_all_equal(plain.variables, placed.variables)


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_eight_devices_compute_what_one_computes(runs, name):
    one, many = runs["one"], runs[name]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < one["losses"][0]
    for part in ("params", "model_state"):  # the latter: statistics of the global batch
        chex.assert_trees_all_close(
            getattr(many["state"], part), getattr(one["state"], part), rtol=1e-4, atol=1e-5
        )
    chex.assert_trees_all_equal(many["state"].fixed, one["state"].fixed)


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_the_same_signs_freeze(runs, name):
    one, many = runs["one"]["state"].opt_state, runs[name]["state"].opt_state
    assert runs["one"]["frozen"][-1] > 0
    assert runs[name]["frozen"] == runs["one"]["frozen"]
    chex.assert_trees_all_equal(many.frozen, one.frozen)


@pytest.mark.parametrize("name", ["one", "replicated", "sharded"])
def test_the_state_keeps_its_sharding_and_the_given_arrays(runs, name):
    layout, state = runs[name]["layout"], runs[name]["state"]
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(layout.state(state)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(runs[name]["given"]))


def test_a_sharded_state_takes_an_eighth_a_device(runs):
    def bytes_on_first(state):
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        return here, sum(leaf.nbytes for leaf in leaves)

    here, total = bytes_on_first(runs["sharded"]["state"])
    assert total / DEVICES <= here < 1.01 * total / DEVICES
    assert len(set(bytes_on_first(runs["replicated"]["state"]))) == 1


def test_batches_go_to_their_shards_and_the_state_is_donated(runs):
    run = runs["sharded"]
    batch = next(batches())
    compiled = run["step"].lower(run["state"], batch).compile()
    _, images = compiled.input_shardings[0]
    assert images["image"].is_equivalent_to(run["layout"].batch, 4)
    before = run["layout"].place(run["state"])
    run["step"](before, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))


def test_evaluation_is_equal(runs, start):
    plan = start[0]
    state = runs["one"]["state"]
    params = plan.finalize(state.variables).decode()
    found = [{**batch, "mask": np.arange(BATCH) < 60} for batch in batches()]
    plain = make_evaluate(linen_forward(Net()))(params, state.model_state, found)
    for name in ("one", "replicated", "sharded"):
        evaluate = make_evaluate(linen_forward(Net()), runs[name]["layout"])
        many = evaluate(params, runs[name]["state"].model_state, found)
        assert (many.accuracy, many.examples) == (plain.accuracy, plain.examples)
        assert many.loss == pytest.approx(plain.loss, rel=1e-5)


def test_a_batch_that_the_devices_do_not_divide_is_named(runs, start):
    layout = runs["replicated"]["layout"]
    layout.check_batch(64)
    with pytest.raises(ValueError, match="100 .* 8 devices: give batch_size=96 or 104, or dev.*=5"):
        layout.check_batch(100)
    with pytest.raises(ValueError, match="batch of 7 .* give batch_size=8, or devices=7"):
        layout.check_batch(7)
    evaluate = make_evaluate(linen_forward(Net()), layout)
    batch = {key: value[:9] for key, value in next(batches()).items()} | {"mask": np.ones(9)}
    with pytest.raises(ValueError, match="batch of 9 .* batch_size=8 or 16, or devices=3"):
        evaluate(start[1]["params"], start[2], [batch])


def test_more_devices_than_there_are_is_named():
    with pytest.raises(ValueError, match="devices=16: there are 8 local devices .*pass devices=8"):
        local_layout(16)


def test_what_no_axis_allows_to_cut_stays_whole():
    layout = local_layout(shard_state=True)
    shapes = {
        "scalar": (), "odd": (7, 9), "longest": (8, 16, 3), "first of equals": (16, 16),
        "shorter": (16, 31),
    }  # fmt: skip
    specs = layout.state({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})
    assert {name: tuple(sharding.spec) for name, sharding in specs.items()} == {
        "scalar": (), "odd": (), "longest": (None, "data"), "first of equals": ("data",),
        "shorter": ("data",),
    }  # fmt: skip


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_step_for_eight_devices_lowers_for_accelerators(runs, platform):
    """Lowering to StableHLO, not compilation."""
    run = runs["sharded"]
    exported = jax.export.export(run["step"], platforms=(platform,))(run["state"], next(batches()))
    assert exported.nr_devices == DEVICES


def test_a_checkpoint_goes_on_with_another_number_of_devices(runs, start, tmp_path):
    plan, saved = start[0], runs["sharded"]["state"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(STEPS, saved, plan, data={}, notes={})
        checkpoints.wait()
        for name in ("one", "replicated", "sharded"):
            layout = runs[name]["layout"]
            found = checkpoints.restore(layout.shapes(runs[name]["state"]), plan).state
            chex.assert_trees_all_equal(found.variables, saved.variables)
            for leaf, sharding in zip(
                jax.tree.leaves(found), jax.tree.leaves(layout.state(found)), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            _, metrics = runs[name]["step"](found, next(batches()))
            assert np.isfinite(metrics["loss"])


def test_batch_statistics_are_measured_on_all_devices(runs, start):
    plan = start[0]
    state = runs["one"]["state"]
    params = plan.finalize(state.variables).decode()
    arguments = (params, state.model_state, batches(), 3, jax.random.key(0))
    forward = linen_forward(Net())
    one = reestimate_batch_norm(forward, *arguments)
    arguments = (params, state.model_state, batches(), 3, jax.random.key(0))
    many = reestimate_batch_norm(forward, *arguments, runs["replicated"]["layout"])
    chex.assert_trees_all_close(many, one, rtol=1e-4, atol=1e-5)


def test_finetune_refuses_a_batch_before_it_encodes(start):
    task = Task(
        linen_forward(Net()),
        lambda seed: ({k: v[:20] for k, v in batch.items()} for batch in batches()),
        list,
    )
    with pytest.raises(ValueError, match="a batch of 20 cannot be divided over 8 devices"):
        finetune(
            task, start[0], {}, key=jax.random.key(0), seed=0, steps=1, optimizer=OPTIMIZER,
            name="x",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_checksums_do_not_depend_on_how_a_leaf_lies(dtype):
    leaf = jnp.asarray(np.random.default_rng(0).integers(-100, 100, (16, 24, 8)), dtype)
    (alone,) = leaf_checksums({"leaf": leaf}).values()
    layout = local_layout()
    for axes in ((AXIS,), (None, AXIS), (None, None, AXIS), ()):
        placed = jax.device_put(leaf, NamedSharding(layout.mesh, PartitionSpec(*axes)))
        assert leaf_checksums({"leaf": placed}) == {"leaf": alone}
