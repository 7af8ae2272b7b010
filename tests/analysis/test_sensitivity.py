import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax import tree
from ssvq_jax.analysis import Sensitivity, loss_sensitivities


@pytest.fixture(autouse=True)
def users_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


COARSE = ssvq.SignSplit(codewords=2, dim=4, iterations=5)
RULES = [
    ssvq.Rule("[ab]", COARSE, share="both"),
    ("c", ssvq.Uniform(bits=8)),
    ("unused", COARSE),
    (".*", None),
]
PATHS = ("a", "b", "c", "unused")


class Model:
    """Logits x a b c + bias; counts its traces; `unused` is never read."""

    def __init__(self):
        self.traces = 0

    def __call__(self, params, model_state, images, key):
        assert key is None
        self.traces += 1
        product = images @ params["a"] @ params["b"] @ params["c"]
        return product * model_state.get("scale", 1.0) + params["bias"], model_state


@dataclasses.dataclass
class Case:
    model: Model
    plan: ssvq.Plan
    params: dict
    variables: dict
    passes: int = 0

    def batches(self):
        """Two batches; the second one ends in padding with wrong labels."""
        self.passes += 1
        images = np.asarray(jax.random.normal(jax.random.key(5), (2, 16, 8)))
        params = jax.tree.map(np.asarray, self.params)
        logits = images @ params["a"] @ params["b"] @ params["c"] + params["bias"]
        labels = np.argmax(logits, -1).astype(np.int32)
        masks = np.ones((2, 16), bool)
        masks[1, 12:] = False
        labels[1, 12:] = (labels[1, 12:] + 1) % 8
        for image, label, mask in zip(images, labels, masks, strict=True):
            yield {"image": image, "label": label, "mask": mask}

    def rows(self, **options):
        args = self.model, self.plan, self.params, self.variables, self.batches
        return list(loss_sensitivities(*args, **options))


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {path: jax.random.normal(k, (8, 8)) for path, k in zip(PATHS, keys, strict=True)} | {
        "bias": jnp.arange(8.0)
    }
    plan = ssvq.make_plan(params, RULES)
    return Case(Model(), plan, params, plan.init(jax.random.key(1), params))


def loss_by_hand(case, params):
    total, right, count = 0.0, 0, 0
    for batch in case.batches():
        logits, _ = Model()(params, {}, batch["image"], None)
        logs = np.asarray(jax.nn.log_softmax(logits))
        keep = np.flatnonzero(batch["mask"])
        total -= logs[keep, batch["label"][keep]].sum()
        right += (logs.argmax(1) == batch["label"])[keep].sum()
        count += len(keep)
    return total / count, right / count, count


def test_each_leaf_is_compressed_alone(case):
    rows = case.rows()
    assert [(row.scope, row.path) for row in rows] == [
        ("float", ""),
        ("all", ""),
        *(("leaf", entry_leaf) for entry_leaf in ("c", "unused", "a", "b")),
    ]
    decoded = case.plan.decode(case.variables)
    base = loss_by_hand(case, case.params)
    for row in rows:
        paths = {"float": (), "all": PATHS, "leaf": (row.path,)}[row.scope]
        mixed = case.params | {path: decoded[path] for path in paths}
        loss, accuracy, count = loss_by_hand(case, mixed)
        assert row.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert row.accuracy == pytest.approx(accuracy)
        assert row.examples == count == 28
        assert row.loss_increase == row.loss - rows[0].loss
        assert row.accuracy_drop == pytest.approx(base[1] - accuracy)


def test_a_leaf_that_the_model_ignores_costs_nothing(case):
    increases = {row.path: row.loss_increase for row in case.rows() if row.scope == "leaf"}
    assert increases["unused"] == 0
    assert increases["a"] > abs(increases["c"]) > 0  # 2 codewords against 8 bits


@pytest.mark.parametrize("host", [False, True])
def test_one_compiled_evaluation_for_all_leaves(case, host):
    if host:
        case.params = jax.tree.map(np.asarray, case.params)
    rows = case.rows()
    assert case.model.traces == 1
    assert case.passes == len(rows)


def test_an_interrupted_run_goes_on_where_it_stopped(case):
    whole = case.rows()
    for count in range(len(whole) + 1):
        case.passes = 0
        lines = [json.dumps(dataclasses.asdict(row)) for row in whole[:count]]
        done = [Sensitivity(**json.loads(line)) for line in lines]
        assert case.rows(done=done) == whole[count:]
        assert case.passes == len(whole) - count


def test_results_come_one_by_one(case):
    rows = loss_sensitivities(case.model, case.plan, case.params, case.variables, case.batches)
    for count, _ in enumerate(rows, start=1):
        assert case.passes == count


def test_the_models_collections_are_used(case):
    plain = case.rows()
    scaled = case.rows(model_state={"scale": jnp.array(0.0)})
    assert plain[0].loss != scaled[0].loss
    assert all(row.loss_increase == 0 for row in scaled)


def test_the_parameters_given_stay(case):
    before = jax.tree.map(np.asarray, case.params)
    case.rows()
    chex.assert_trees_all_equal(before, case.params)


def test_results_of_another_plan_are_an_error(case):
    (row,) = [row for row in case.rows() if row.path == "a"]
    with pytest.raises(ValueError, match=r"leaves \['x'\] are done, but the plan does not"):
        case.rows(done=[dataclasses.replace(row, path="x")])


def test_another_tree_is_an_error(case):
    case.params = tree.punch(case.params, {"a"})
    with pytest.raises(ValueError, match="'a' is float32.* missing in the parameters"):
        case.rows()
