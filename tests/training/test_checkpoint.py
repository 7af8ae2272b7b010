import contextlib
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.data import ArraySplit, Shift, eval_batches, train_batches
from ssvq_jax.models import ViT, ViTConfig
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig
from ssvq_jax.training.run import RunOptions, Task
from ssvq_jax.training.step import linen_forward
from ssvq_jax.tree import leaves_by_path


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def dense_plan(tree):
    return ssvq.make_plan(tree, [(".*", None)])


def bits(tree):
    """Every leaf as bytes, so that NaN and -0 count too."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return array.dtype.name, array.shape, array.tobytes()

    return {path: raw(leaf) for path, leaf in leaves_by_path(tree).items()}


TREE = {
    "floats": [jnp.array([0.1, -0.0, jnp.nan, jnp.inf]), jnp.array([1.5], jnp.bfloat16)],
    "codes": {"a.b": jnp.arange(3, dtype=jnp.uint8), "a": {"b": jnp.zeros((2, 2), bool)}},
    "blocks/0%2E": (jnp.int32(7), None, jnp.zeros((0, 4))),
    "key": jax.random.key(3),
    "nothing": {},
}


def save(folder, tree, plan, step=1, **more):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, tree, plan, data={"batches": step}, notes={"n": step}, **more)


def test_every_leaf_comes_back_to_the_bit(tmp_path):
    plan = dense_plan({"w": jnp.ones(2)})
    save(tmp_path, TREE, plan)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(jax.eval_shape(lambda: TREE), plan)
    assert bits(found.state) == bits(TREE)
    assert found.data == {"batches": 1}
    assert found.notes == {"n": 1}


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"w": jnp.zeros(2_000_000)}
    plan = dense_plan(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, plan, data={}, notes={})
        for _ in range(5):
            state = jax.tree.map(step, state)  # the buffers are taken over while it is written
        checkpoints.wait()
        found = checkpoints.restore(state, plan).state
    assert float(jnp.max(jnp.abs(found["w"]))) == 0
    assert float(state["w"][0]) == 5


def test_last_and_best_are_kept(tmp_path):
    state = {"w": jnp.zeros(3)}
    plan = dense_plan(state)
    with Checkpoints(tmp_path) as checkpoints:
        for step, loss in enumerate([None, 3.0, 1.0, 2.0, None, None]):
            value = {"w": jnp.full(3, step, jnp.float32)}
            checkpoints.save(step, value, plan, data={}, notes={}, loss=loss)
        checkpoints.wait()
        assert (checkpoints.last, checkpoints.best) == (5, 2)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.last, checkpoints.best) == (5, 2)
        assert checkpoints.restore(state, plan).state["w"].tolist() == [5, 5, 5]
        assert checkpoints.restore(state, plan, "best").state["w"].tolist() == [2, 2, 2]
    assert sorted(x.name for x in tmp_path.iterdir() if x.is_dir()) == ["2", "5"]


def test_the_interval_is_kept(tmp_path):
    state = {"w": jnp.zeros(3)}
    with Checkpoints(tmp_path, seconds=3600.0) as checkpoints:
        assert checkpoints.due(1)
        checkpoints.save(1, state, dense_plan(state), data={}, notes={})
        checkpoints.wait()
        assert not checkpoints.due(2)
    with Checkpoints(tmp_path, seconds=0.0) as checkpoints:
        assert checkpoints.due(2)
    with pytest.raises(ValueError, match="save_seconds=-1.0: give 0 or more"):
        Checkpoints(tmp_path, seconds=-1.0)


def test_a_part_can_be_read(tmp_path):
    plan = dense_plan({"w": jnp.ones(2)})
    save(tmp_path, {"params": {"w": jnp.ones(2)}, "opt": jnp.zeros(4)}, plan)
    part = {"params": {"w": jnp.zeros(2)}}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(part, plan, partial=True).state["params"]["w"].tolist() == [1, 1]
        with pytest.raises(ValueError, match="holds 1 leaves that this run does not have.*'opt'"):
            checkpoints.restore(part, plan)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"w": jnp.zeros((2, 2))}, r"leaf 'w' is float32\[4\] there and float32\[2, 2\] in this"),
        ({"w": jnp.zeros(4, jnp.bfloat16)}, r"leaf 'w' is float32\[4\] there and bfloat16\[4\]"),
        ({"w": jnp.zeros(4), "v.x": jnp.zeros(1)}, "lacks the leaf 'v.x'"),
        ({}, "holds 1 leaves that this run does not have, e.g. 'w'"),
    ],
)
def test_another_shape_dtype_or_leaf_is_refused(tmp_path, template, message):
    plan = dense_plan({"w": jnp.ones(4)})
    save(tmp_path, {"w": jnp.ones(4)}, plan)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(template, plan)


def test_another_plan_is_refused(tmp_path):
    tree = {"w": jnp.ones((8, 8))}
    plan = ssvq.make_plan(tree, [("w", ssvq.SignSplit(codewords=4, dim=4))])
    save(tmp_path, tree, plan)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.plan() == plan
        other = ssvq.make_plan(tree, [("w", ssvq.SignSplit(codewords=8, dim=4))])
        with pytest.raises(ValueError, match="of another plan: it has the recipe.*'codewords': 4"):
            checkpoints.restore(tree, other)
        other = ssvq.make_plan({"w": jnp.ones((16, 8))}, plan.recipe)
        with pytest.raises(ValueError, match=r"another plan: it has for leaf 'w'.*\[8, 8\]"):
            checkpoints.restore(tree, other)


def test_another_format_and_other_checkpoints_are_refused(tmp_path):
    tree = {"w": jnp.ones(4)}
    plan = dense_plan(tree)
    save(tmp_path, tree, plan)
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"]["format"] = 99
    file.write_text(json.dumps(metadata))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="has format 99"):
        checkpoints.restore(tree, plan)
    del metadata["custom_metadata"]["format"]
    file.write_text(json.dumps(metadata))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="no checkpoint of"):
        checkpoints.restore(tree, plan)


@pytest.mark.parametrize("victim", ["state/manifest.ocdbt", "state/_METADATA", "state"])
def test_damage_is_named(tmp_path, victim):
    tree = {"w": jnp.ones(4)}
    plan = dense_plan(tree)
    save(tmp_path, tree, plan)
    path = tmp_path / "1" / victim
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(path.read_bytes()[:7])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="1 is damaged or incomplete"),
    ):
        checkpoints.restore(tree, plan)


def test_no_checkpoint_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last is None
        assert checkpoints.best is None
        with pytest.raises(ValueError, match="holds no last checkpoint"):
            checkpoints.plan()
        with pytest.raises(ValueError, match="holds no best checkpoint"):
            checkpoints.plan("best")


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no checkpoints can be kept in .*file"):
        Checkpoints(tmp_path / "file")


@contextlib.contextmanager
def small_files(limit):
    """Lets no file grow beyond so many bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    tree = {"w": jnp.arange(300_000, dtype=jnp.float32) ** 0.5}
    plan = dense_plan(tree)

    def second_save():
        with Checkpoints(tmp_path) as checkpoints, small_files(50_000):
            checkpoints.save(2, jax.tree.map(lambda x: -x, tree), plan, data={}, notes={})
            checkpoints.wait()

    save(tmp_path, tree, plan)
    with pytest.raises(
        OSError, match="could not be written to .*the last good one is 1: make room"
    ):
        second_save()
    with Checkpoints(tmp_path) as checkpoints:  # the next run
        assert checkpoints.last == 1
        assert bits(checkpoints.restore(tree, plan).state) == bits(tree)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["1"]


MODEL = ViT(
    ViTConfig(image_size=8, channels=1, patch_size=4, width=16, depth=1, heads=2, classes=4)
)
RULES = [("blocks_0/.*kernel", ssvq.SignSplit(codewords=4, dim=4, iterations=3)), (".*", None)]
OPTIMIZER = OptimizerConfig(
    dense=1e-2, codebook=1e-2, sign=3e-2,
    freeze=FreezeConfig(every=4, start=0.05, end=0.005, momentum=0.1, warmup_share=0.1),
)  # fmt: skip


class CutError(Exception):
    """Stands for whatever ends a process."""


class CutIterator:
    """Batches that end the run after so many."""

    def __init__(self, inner, after):
        self.inner, self.left = inner, after

    def __iter__(self):
        return self

    def __next__(self):
        if self.left == 0:
            raise CutError
        self.left -= 1
        return next(self.inner)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def run(folder, *, cut=None, steps=30, rules=RULES, optimizer=OPTIMIZER, scale=1.0, **options):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (48, 8, 8, 1), dtype=np.uint8)
    source = ArraySplit(images, np.arange(48, dtype=np.int32) % 4, 4)

    def batches(seed):
        found = train_batches(source, 8, seed=seed, augment=(Shift(1),))
        return found if cut is None else CutIterator(found, cut)

    task = Task(linen_forward(MODEL), batches, lambda: eval_batches(source, 48))
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    params = jax.tree.map(lambda leaf: scale * leaf, params)
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder / "checkpoints", seconds=0.0) as checkpoints:
        return finetune(
            task, ssvq.make_plan(params, rules), params, key=jax.random.key(1), seed=5,
            steps=steps, optimizer=optimizer, name="run", checkpoints=checkpoints,
            metrics=MetricsFile(folder / "metrics.jsonl"), options=RunOptions(**options),
        )  # fmt: skip


def timeless(records):
    return [{k: v for k, v in record.items() if k != "steps_per_second"} for record in records]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param({"accumulate": 2, "moment_dtype": "bfloat16"}, id="accumulated"),
    ],
)
def test_a_run_that_was_cut_ends_like_one_that_was_not(tmp_path, options):
    optimizer = OptimizerConfig(**{**vars(OPTIMIZER), **options})
    whole = run(tmp_path / "whole", optimizer=optimizer, validate_every=12)
    for cut in (13, 3, 11):  # batches until the process ends; the last may be at a save
        with pytest.raises(CutError):
            run(tmp_path / "cut", cut=cut, optimizer=optimizer, validate_every=12)
    resumed = run(tmp_path / "cut", optimizer=optimizer, validate_every=12)
    assert bits(resumed.state) == bits(whole.state)
    assert timeless(resumed.records) == timeless(whole.records)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert whole.records[-1]["frozen"] > 0
    assert [r["step"] for r in whole.records if "validation_loss" in r] == [12, 24]
    read_back = run(tmp_path / "cut", optimizer=optimizer, validate_every=12)
    assert bits(read_back.state) == bits(whole.state)
    assert read_back.records == resumed.records
    assert read_back.after == whole.after


def test_the_best_validation_is_kept(tmp_path):
    done = run(tmp_path, validate_every=6)
    losses = {r["step"]: r["validation_loss"] for r in done.records if "validation_loss" in r}
    losses[30] = done.after.loss
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.best == min(losses, key=losses.get)
        assert checkpoints.last == 30


def test_a_run_with_another_recipe_or_optimizer_is_not_continued(tmp_path):
    with pytest.raises(CutError):
        run(tmp_path, cut=12)
    other = [("blocks_0/.*kernel", ssvq.SignSplit(codewords=8, dim=4)), (".*", None)]
    with pytest.raises(ValueError, match="is of another plan"):
        run(tmp_path, rules=other)
    with pytest.raises(ValueError, match="optimizer.moment_dtype: 'float32' there"):
        run(tmp_path, optimizer=OptimizerConfig(**{**vars(OPTIMIZER), "moment_dtype": "bfloat16"}))
    assert run(tmp_path).records[-1]["step"] == 30


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; nobody writes to it."""
    folder = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 40}, "steps: 30 there, 40 now"),
        ({"optimizer": OptimizerConfig(dense=0.5)}, "optimizer.dense: 0.01 there, 0.5 now"),
        ({"batch_norm_batches": 2}, "batch_norm_batches: 0 there, 2 now"),
        ({"scale": 2.0}, "weights: '"),
    ],
)
def test_a_finished_run_is_not_taken_for_another(finished, change, message):
    with pytest.raises(ValueError, match=f"is of another run .*{message}"):
        run(finished, **change)


def test_reading_leaves_alone_what_is_being_written(tmp_path):
    tree = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
    plan = dense_plan(tree)
    with Checkpoints(tmp_path) as writer:
        writer.save(1, tree, plan, data={}, notes={})
        writer.wait()
        writer.save(2, tree, plan, data={}, notes={})
        with Checkpoints(tmp_path, read_only=True) as reader:
            assert reader.last in (1, 2)
        writer.wait()  # nothing was taken from under it
        assert bits(writer.restore(tree, plan).state) == bits(tree)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_batches_without_a_position_cannot_be_resumed(tmp_path):
    task = Task(linen_forward(MODEL), lambda seed: iter(()), list)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="without get_state"):
        finetune(
            task, ssvq.make_plan({"w": jnp.ones(2)}, [(".*", None)]), {"w": jnp.ones(2)},
            key=jax.random.key(0), seed=0, steps=1, optimizer=OptimizerConfig(), name="x",
            checkpoints=checkpoints,
        )  # fmt: skip


def test_options_out_of_range():
    with pytest.raises(ValueError, match="validate_every=0"):
        RunOptions(validate_every=0).check()
    with pytest.raises(ValueError, match="batch_norm_batches=-1"):
        RunOptions(batch_norm_batches=-1).check()
