"""The objective against its equations, and training by it."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.models.vit import Block, ViT, ViTConfig
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.layout import local_layout
from ssvq_jax.training.objective import (
    Objective,
    Outputs,
    Teacher,
    feature_loss,
    features_of,
    label_loss,
    teacher_loss,
)
from ssvq_jax.training.optimizer import OptimizerConfig, make_optimizer
from ssvq_jax.training.run import Task
from ssvq_jax.training.step import linen_forward, make_state, make_train_step


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def log_softmax(logits):
    """In float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels(smoothing):
    logits, labels = drawn(5, 4), jnp.array([0, 3, 1, 1, 2])
    logs = log_softmax(logits)
    right = logs[np.arange(5), labels]
    expected = -((1 - smoothing) * right + smoothing * logs.mean(-1)).mean()
    found = label_loss(logits, {"label": labels}, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_smoothed_labels_are_pytorchs():
    torch = pytest.importorskip("torch", reason="the reference implementation")
    logits, labels = drawn(5, 7), jnp.array([0, 3, 1, 6, 2])
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(logits)),
        torch.from_numpy(np.array(labels)).long(),
        label_smoothing=0.1,
    )
    found = label_loss(logits, {"label": labels}, 0.1)
    np.testing.assert_allclose(found, float(expected), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_are_the_weighted_mean_of_both(smoothing):
    logits, labels, others = drawn(3, 4), jnp.array([0, 3, 1]), jnp.array([1, 3, 2])
    share = jnp.array([1.0, 0.3, 0.75], jnp.float32)
    found = label_loss(logits, {"label": labels, "other_label": others, "share": share}, smoothing)

    def each(label):
        return np.array(
            [
                label_loss(logits[i : i + 1], {"label": label[i : i + 1]}, smoothing)
                for i in range(3)
            ]
        )

    expected = (share * each(labels) + (1 - share) * each(others)).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_pixel_has_a_label():
    logits, labels = drawn(2, 3, 3, 4), jnp.asarray(np.arange(18).reshape(2, 3, 3) % 4)
    found = label_loss(logits, {"label": labels}, 0.1)
    flat = label_loss(logits.reshape(18, 4), {"label": labels.reshape(18)}, 0.1)
    np.testing.assert_allclose(found, flat, rtol=1e-6)


# Teachers


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teachers_logits(temperature):
    ours, theirs = drawn(5, 4), drawn(5, 4, seed=1)
    p, q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    np.testing.assert_allclose(teacher_loss(ours, theirs, temperature), expected, rtol=1e-5)
    assert abs(float(teacher_loss(ours, ours, temperature))) < 1e-6


def test_teachers_features_are_free_of_scale():
    ours = {"a": drawn(2, 3), "b": drawn(2, 5)}
    theirs = {"a": drawn(2, 3, seed=1), "b": ours["b"]}
    expected = np.sum((ours["a"] - theirs["a"]) ** 2) / np.sum(theirs["a"] ** 2) / 2
    np.testing.assert_allclose(feature_loss(ours, theirs), expected, rtol=1e-6)
    scaled = [{path: 1000 * x for path, x in tree.items()} for tree in (ours, theirs)]
    np.testing.assert_allclose(feature_loss(*scaled), expected, rtol=1e-5)


def test_parts_are_weighted():
    ours = Outputs(drawn(5, 4), {"a": drawn(2, 3)})
    theirs = Outputs(drawn(5, 4, seed=1), {"a": drawn(2, 3, seed=1)})
    batch = {"label": jnp.array([0, 3, 1, 1, 2])}
    aim = Objective(distill=0.25, temperature=2.0, feature_weight=3.0)
    loss, parts = aim(ours, batch, theirs)
    expected = 0.75 * parts["label_loss"] + 0.25 * parts["teacher_loss"] + 3 * parts["feature_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(parts["label_loss"], label_loss(ours.logits, batch, 0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"distill": 1.5}, "distill=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"feature_weight": -1.0}, "feature_weight=-1.0"),
        ({"distill": 1.0, "label_smoothing": 0.1}, "no label counts"),
        ({"distill": 0.5}, "needs a teacher"),
        ({"feature_weight": 1.0}, "needs a teacher"),
    ],
)
def test_bad_objectives(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings).check(None)


def test_a_teacher_of_whom_nothing_is_learned():
    with pytest.raises(ValueError, match="nothing is learned from it"):
        Objective().check(Teacher(linen_forward(Net()), {}, {}))


# Training


class Part(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width, name="fc")(x))


class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = images.reshape(images.shape[0], -1)
        x = Part(self.width, name="block_0")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="bn")(x)
        x = Part(self.width, name="block_1")(x)
        return nn.Dense(4, name="head")(x)


def batch_of(count, seed=0):
    images = np.asarray(jax.random.normal(jax.random.key(seed), (count, 2, 2, 2)))
    return {"image": images, "label": np.int32(np.arange(count) % 4)}


def variables_of(module=None, seed=0):
    return dict((module or Net()).init(jax.random.key(seed), batch_of(1)["image"]))


def dense_plan(params):
    return ssvq.make_plan(params, [(".*", None)])


# The whole update is the gradient times the rate: there is no warm-up, momentum or decay.
RATE = 0.5
PLAIN = OptimizerConfig(
    rule="sgd", dense=RATE, weight_decay=0.0, momentum=0.0, warmup_share=0.0,
    clip_norm=None, freeze=None,
)  # fmt: skip


def begin(forward, variables):
    state = dict(variables)
    params = state.pop("params")
    plan = dense_plan(params)
    tx = make_optimizer(plan, 100, PLAIN)
    encoded = plan.init(jax.random.key(0), params)
    return plan, make_state(forward, encoded, tx, jax.random.key(2), state)


@pytest.mark.parametrize("devices", [None, 1])
def test_a_step_follows_the_gradient_of_the_whole_objective(devices):
    forward = linen_forward(Net(), features=r"block_\d")
    ours, theirs = variables_of(), variables_of(seed=1)
    teacher = Teacher(forward, theirs["params"], {"batch_stats": theirs["batch_stats"]})
    aim = Objective(label_smoothing=0.1, distill=0.5, temperature=2.0, feature_weight=0.3)
    batch = batch_of(8)

    def loss(params):
        logits, found = Net().apply(
            {**ours, "params": params}, batch["image"], train=True,
            mutable=["batch_stats", "intermediates"], capture_intermediates=True,
        )  # fmt: skip
        wanted, known = Net().apply(theirs, batch["image"], capture_intermediates=True, mutable=[
            "intermediates"])  # fmt: skip
        pairs = [
            (found["intermediates"][x]["__call__"][0], known["intermediates"][x]["__call__"][0])
            for x in ("block_0", "block_1")
        ]
        distances = [jnp.sum((f - t) ** 2) / jnp.sum(t**2) for f, t in pairs]
        return (
            0.5 * label_loss(logits, batch, 0.1)
            + 0.5 * teacher_loss(logits, wanted, 2.0)
            + 0.3 * (distances[0] + distances[1]) / 2
        )

    expected, gradient = jax.value_and_grad(loss)(ours["params"])
    moved = jax.tree.map(lambda p, g: p - RATE * g, ours["params"], gradient)
    layout = None if devices is None else local_layout(devices)
    plan, state = begin(forward, ours)
    if layout is not None:
        state = layout.place(state)
    step = make_train_step(plan, layout=layout, objective=aim, teacher=teacher)
    state, scalars = step(state, batch)
    np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-5)
    chex.assert_trees_all_close(state.params["params"], moved, rtol=1e-4, atol=1e-6)
    assert set(state.model_state) == {"batch_stats"}  # features are not kept
    state, _ = step(state, batch)  # neither state nor teacher were lost
    np.testing.assert_array_equal(teacher.params["head"]["bias"], theirs["params"]["head"]["bias"])


def test_labels_out_of_range_do_no_harm_where_they_are_not_read():
    ours, theirs = (Outputs(drawn(5, 4, seed=seed), {}) for seed in (0, 1))
    loss, parts = Objective(distill=1.0)(ours, {"label": jnp.full(5, 99)}, theirs)
    np.testing.assert_allclose(loss, teacher_loss(ours.logits, theirs.logits, 1.0))
    assert set(parts) == {"teacher_loss"}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_narrow_logits_are_widened(temperature):
    ours, theirs = (drawn(50, 9, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    theirs = ours + 0.01 * theirs  # a small divergence of large logarithms
    wide = [x.astype(jnp.float32) for x in (ours, theirs)]
    found, expected = teacher_loss(ours, theirs, temperature), teacher_loss(*wide, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    labels = {"label": jnp.arange(50) % 9}
    np.testing.assert_allclose(label_loss(ours, labels, 0.1), label_loss(wide[0], labels, 0.1))


def test_a_feature_of_the_teacher_that_is_dead():
    found = feature_loss({"a": jnp.array([2.0])}, {"a": jnp.array([0.0])})
    assert float(found) == 4.0


def test_distillation_alone_needs_no_labels():
    forward, theirs = linen_forward(Net()), variables_of(seed=1)
    teacher = Teacher(forward, theirs["params"], {"batch_stats": theirs["batch_stats"]})
    found = []
    for shift in (0, 1):
        plan, state = begin(forward, variables_of())
        step = make_train_step(plan, objective=Objective(distill=1.0), teacher=teacher)
        scalars: dict = {}
        for seed in range(5):
            batch = batch_of(16, seed)
            state, scalars = step(state, {**batch, "label": (batch["label"] + shift) % 4})
        found.append((state.params, float(scalars["teacher_loss"])))
    chex.assert_trees_all_equal(found[0][0], found[1][0])
    plan, state = begin(forward, variables_of())
    first = make_train_step(plan, objective=Objective(distill=1.0), teacher=teacher)(
        state, batch_of(16)
    )[1]
    assert found[0][1] < float(first["teacher_loss"])


def test_accuracy_of_mixed_images_is_the_expected_one():
    plan, state = begin(linen_forward(Net()), variables_of())
    batch = batch_of(16)
    logits = Net().apply(variables_of(), batch["image"], train=True, mutable=["batch_stats"])[0]
    predicted = np.argmax(logits, -1)
    share = np.linspace(0, 1, 16, dtype=np.float32)
    other = np.int32((batch["label"] + 1) % 4)
    expected = np.mean(share * (predicted == batch["label"]) + (1 - share) * (predicted == other))
    _, scalars = make_train_step(plan)(state, {**batch, "other_label": other, "share": share})
    np.testing.assert_allclose(scalars["accuracy"], expected, rtol=1e-6)


def test_features_have_the_paths_of_modules():
    variables = variables_of()
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    images, key = jnp.asarray(batch_of(2)["image"]), jax.random.key(0)
    forward = linen_forward(Net(), features=r"block_\d+(/fc)?|bn")
    for given in (None, key):
        found = features_of(forward(params, state, images, given)[1])
        assert set(found) == {"block_0", "block_0/fc", "block_1", "block_1/fc", "bn"}
        assert {x.shape for x in found.values()} == {(2, 8)}
    assert features_of(linen_forward(Net())(params, state, images, None)[1]) == {}


def test_features_are_those_of_blocks_that_are_computed_again():
    config = ViTConfig(image_size=8, channels=1, patch_size=4, width=8, depth=2, heads=2, classes=4)
    model, images = ViT(config), drawn(2, 8, 8, 1)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    pattern = r"blocks_\d+"
    again = linen_forward(model, remat=Block, features=pattern)
    kept = linen_forward(model, features=pattern)

    def loss(forward, params, key):
        features = features_of(forward(params, {}, images, key)[1])
        assert set(features) == {"blocks_0", "blocks_1"}
        return sum(jnp.sum(x**2) for x in features.values())

    expected = jax.jit(jax.grad(lambda p: loss(kept, p, None)))(params)
    found = jax.jit(jax.grad(lambda p: loss(again, p, jax.random.key(1))))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match=r"features: '\[' is not a regular expression"):
        linen_forward(Net(), features="[")


class Endless:
    def __init__(self, seed):
        self.seed = seed

    def __iter__(self):
        return self

    def __next__(self):
        self.seed += 1
        return batch_of(16, self.seed)


def task_of(forward, **settings):
    judged = {**batch_of(16), "mask": np.ones(16, bool)}
    return Task(forward, lambda seed: Endless(seed), lambda: [judged], **settings)


def run(task, **settings):
    variables = variables_of()
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    return finetune(
        task, dense_plan(params), params, key=jax.random.key(0), seed=0, steps=2, name="run",
        optimizer=dataclasses.replace(PLAIN, dense=1e-3), model_state=state, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ("nothing", "nothing", "matches no inner module"),
        ("block_0", "block_[01]", r"feature 'block_1' is missing of the model and \(16, 8\)"),
    ],
)
def test_features_that_cannot_be_compared_are_refused_at_once(ours, theirs, message):
    teacher = variables_of(seed=1)
    task = task_of(
        linen_forward(Net(), features=ours),
        objective=Objective(feature_weight=1.0),
        teacher=Teacher(
            linen_forward(Net(), features=theirs),
            teacher["params"],
            {"batch_stats": teacher["batch_stats"]},
        ),
    )
    with pytest.raises(ValueError, match=message):
        run(task)


def test_features_of_another_size_are_refused():
    wide = variables_of(Net(width=12))
    task = task_of(
        linen_forward(Net(), features="block_0"),
        objective=Objective(feature_weight=1.0),
        teacher=Teacher(
            linen_forward(Net(width=12), features="block_0"),
            wide["params"],
            {"batch_stats": wide["batch_stats"]},
        ),
    )
    message = r"'block_0' is \(16, 8\) of the model and \(16, 12\) of the teacher"
    with pytest.raises(ValueError, match=message):
        run(task)


def test_a_wider_teacher_teaches_by_its_logits():
    wide = variables_of(Net(width=12))
    task = task_of(
        linen_forward(Net()),
        objective=Objective(distill=0.9),
        teacher=Teacher(
            linen_forward(Net(width=12)), wide["params"], {"batch_stats": wide["batch_stats"]}
        ),
    )
    record = run(task).records[-1]
    mixed = 0.1 * record["label_loss"] + 0.9 * record["teacher_loss"]
    np.testing.assert_allclose(record["loss"], mixed, rtol=1e-5)
