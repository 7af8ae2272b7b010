"""What the options of a run change: accumulation, narrow latents and moments, recomputation."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssvq_jax as ssvq
from ssvq_jax.models.vit import Block, ViT, ViTConfig
from ssvq_jax.training.freezing import FreezeState
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig, make_optimizer
from ssvq_jax.training.step import linen_forward, make_state, make_train_step, sign_shares

LATENT = "fc1/kernel/sign_latent"  # its path in the training state


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax and optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Dense(32, name="fc1")(images.reshape(images.shape[0], -1))
        return nn.Dense(4, name="fc2")(nn.relu(x))


def batch_of(count, seed=0):
    images = np.asarray(jax.random.normal(jax.random.key(seed), (count, 4, 4, 1)))
    labels = np.int32(np.argmax(images.reshape(count, -1)[:, :4], axis=1))
    return {"image": images, "label": labels}


def begin(config, steps, latent_dtype=None, forward=None):
    params = Net().init(jax.random.key(1), batch_of(1)["image"])["params"]
    sign_split = ssvq.SignSplit(codewords=4, dim=4, iterations=5, latent_dtype=latent_dtype)
    plan = ssvq.make_plan(params, [("fc1/kernel", sign_split), (".*", None)])
    variables = plan.init(jax.random.key(0), params)
    tx = make_optimizer(plan, steps, config)
    return plan, make_state(forward or linen_forward(Net()), variables, tx, jax.random.key(2))


def freeze_state(state):
    """The one FreezeState, wherever it is nested."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, FreezeState))
    (found,) = [node for node in nodes if isinstance(node, FreezeState)]
    return found


def latents(state):
    return np.asarray(state.params["vq"]["fc1/kernel"]["sign_latent"].astype("float32"))


FAST = OptimizerConfig(
    dense=1e-2, codebook=1e-2, sign=3e-2, warmup_share=0.0,
    freeze=FreezeConfig(every=5, start=0.05, end=0.005, momentum=0.1, warmup_share=0.2),
)  # fmt: skip
PLAIN = dataclasses.replace(FAST, freeze=None)


# Gradient accumulation


def test_accumulated_batches_make_the_update_of_the_joined_batch():
    joined, parts = batch_of(64), 4
    plan, whole = begin(PLAIN, steps=2)
    _, split = begin(dataclasses.replace(PLAIN, accumulate=parts), steps=2 * parts)
    step = make_train_step(plan)
    for _ in range(2):  # the second update has another rate: schedules count updates
        whole, _ = step(whole, joined)
        before = jax.tree.map(np.asarray, split.params)
        for part in range(parts):
            chex.assert_trees_all_equal(split.params, before)
            split, _ = step(split, {k: v[part * 16 : (part + 1) * 16] for k, v in joined.items()})
        chex.assert_trees_all_close(split.params, whole.params, rtol=1e-4, atol=1e-6)  # fmt: skip
    assert int(split.step) == 2 * parts  # counts batches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_freezing_counts_real_updates_and_is_exact_through_accumulation(dtype):
    # optax 0.2.6 gives the accumulated gradients of bfloat16 leaves another dtype at first.
    newer = tuple(map(int, optax.__version__.split(".")[:3])) >= (0, 2, 8)
    traces = 1 if newer or dtype == "float32" else 2
    forward = chex.assert_max_traces(linen_forward(Net()), traces)
    config = dataclasses.replace(FAST, accumulate=2)
    plan, state = begin(config, 80, dtype, forward)
    step = make_train_step(plan)
    frozen, values, shares = [], [], []
    for seed in range(80):
        state, metrics = step(state, batch_of(32, seed))
        inner = freeze_state(state)
        assert int(inner.step) == (seed + 1) // 2
        frozen.append(np.asarray(inner.frozen["vq/" + LATENT]))
        values.append(latents(state))
        shares.append(float(metrics["frozen"]))
        new = frozen[-1] & ~frozen[-2] if seed else frozen[-1]
        if new.any():
            assert (seed + 1) % (2 * 5) == 0  # FAST's interval
            votes = np.asarray(inner.opinion["vq/" + LATENT])
            decided = new & (votes != 0)
            assert np.array_equal(values[-1][decided] < 0, votes[decided] < 0)
    assert 0 < shares[-1] < 1
    np.testing.assert_allclose(shares, [mask.mean() for mask in frozen], rtol=1e-6)
    for mask, now, later in zip(frozen, values, values[1:], strict=False):
        assert np.array_equal(now[mask], later[mask])


def test_shares_are_found_wherever_freezing_is_nested():
    plan, state = begin(FAST, 10)
    plain = make_optimizer(plan, 10, FAST)
    nested = optax.chain(optax.MultiSteps(plain, 2).gradient_transformation(), optax.identity())
    shares = sign_shares(nested.init(state.params))
    none = {"flipped": 0, "frozen": 0, "oscillation": 0}
    assert {name: float(share) for name, share in shares.items()} == none
    assert sign_shares(optax.adam(0.1).init(state.params)) == {}


# Narrow latents and moments


def moments(state):
    """Adam's two moments of the sign latent, by name."""
    found = {}
    for path, leaf in ssvq.tree.leaves_by_path(state.opt_state).items():
        for name in ("mu", "nu"):
            if f"/{name}/" in path and path.endswith(LATENT):
                found[name] = leaf
    return found


@pytest.mark.parametrize(
    ("latent_dtype", "moment_dtype", "expected"),
    [
        ("float32", "float32", 12),
        ("bfloat16", "float32", 10),
        ("float32", "bfloat16", 10),
        ("bfloat16", "bfloat16", 8),
    ],
)
def test_bytes_a_latent_weight(latent_dtype, moment_dtype, expected):
    config = dataclasses.replace(FAST, moment_dtype=moment_dtype)
    plan, state = begin(config, 10, latent_dtype)
    state, _ = make_train_step(plan)(state, batch_of(64))
    latent, adam = state.params["vq"]["fc1/kernel"]["sign_latent"], moments(state)
    assert latent.dtype == latent_dtype
    assert adam["mu"].dtype == moment_dtype
    assert adam["nu"].dtype == "float32"
    assert (latent.nbytes + adam["mu"].nbytes + adam["nu"].nbytes) / latent.size == expected


@pytest.mark.parametrize(("latent", "moment"), [("bfloat16", "float32"), (None, "bfloat16")])
def test_narrow_runs_end_with_the_same_signs(latent, moment):
    def train(latent_dtype, moment_dtype):
        plan, state = begin(dataclasses.replace(PLAIN, moment_dtype=moment_dtype), 60, latent_dtype)
        start, step = latents(state) < 0, make_train_step(plan)
        losses = []
        for seed in range(60):
            state, metrics = step(state, batch_of(64, seed))
            losses.append(float(metrics["loss"]))
        return start, latents(state) < 0, losses[-1]

    start, wide, wide_loss = train("float32", "float32")
    _, narrow, narrow_loss = train(latent, moment)
    assert np.mean(start != wide) > 0.2
    assert np.mean(narrow == wide) > 0.9
    assert narrow_loss == pytest.approx(wide_loss, rel=0.1)


def test_the_second_moment_of_narrow_latents_forgets():
    """In bfloat16 it would not: a thousandth of it is less than its rounding."""
    params = {"params": {}, "vq": {"w": {"sign_latent": jnp.ones(1, jnp.bfloat16)}}}
    plan = ssvq.make_plan(
        {"w": jax.ShapeDtypeStruct((8, 8), "float32")},
        [("w", ssvq.SignSplit(codewords=2, dim=2))],
    )

    def second_moment(tx):  # after one gradient of 1 and a thousand of 0
        zero = jax.tree.map(jnp.zeros_like, params)
        _, state = tx.update(params, tx.init(params), params)
        state, _ = jax.lax.scan(
            lambda state, _: (tx.update(zero, state, params)[1], None), state, None, 1000
        )
        (found,) = [x for k, x in ssvq.tree.leaves_by_path(state).items() if "/nu/" in k]
        return float(found[0])

    assert second_moment(optax.adam(0.1)) == pytest.approx(0.001, rel=0.01)
    ours = make_optimizer(plan, 1001, PLAIN)
    assert second_moment(ours) == pytest.approx(0.001 * 0.999**1000, rel=1e-3)


# Recomputation


@pytest.mark.slow
def test_recomputing_takes_less_memory_for_the_same_gradients():
    config = ViTConfig(28, 1, patch_size=4, width=32, depth=3, heads=2, classes=10)
    model = ViT(config, scan=True)
    images = np.asarray(jax.random.normal(jax.random.key(3), (32, 28, 28, 1)))
    batch = {"image": images, "label": np.arange(32, dtype=np.int32) % 10}
    params = model.init(jax.random.key(0), jnp.asarray(images[:1]))["params"]
    sign_split = ssvq.SignSplit(codewords=4, dim=8, iterations=1)
    rules = [ssvq.Rule("blocks/mlp/fc1/kernel", sign_split, stacked=1), ssvq.Rule(".*", None)]
    plan = ssvq.make_plan(params, rules)
    variables = plan.init(jax.random.key(0), params)

    def run(*, remat=False, blocks=None):
        forward = linen_forward(model, remat=blocks)
        state = make_state(forward, variables, optax.sgd(1.0), jax.random.key(2))
        compiled = make_train_step(plan, remat=remat).lower(state, batch).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return compiled(state, batch)[0].params, memory.temp_size_in_bytes

    plain, most = run()
    decoded, less = run(remat=True)
    both, least = run(remat=True, blocks=Block)
    for again in (decoded, both):
        chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-6)
    assert less < most
    assert least < 0.6 * most


class Normed(nn.Module):
    """A block with every kind of state, and one of its own class inside."""

    inner: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return Normed(inner=False)(x, train) if self.inner else x


class Stack(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        x = Normed()(images.reshape(images.shape[0], -1), train)
        return Normed()(x, train)


def test_recomputed_blocks_keep_dropout_and_batch_statistics():
    batch = batch_of(16)
    variables = Stack().init(jax.random.key(0), batch["image"])
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss(forward, params):
        logits, state = forward(params, rest, jnp.asarray(batch["image"]), jax.random.key(1))
        return jnp.sum(jnp.sin(logits)), state

    def jaxpr_and_gradients(forward):
        function = jax.grad(lambda p: loss(forward, p), has_aux=True)
        return str(jax.make_jaxpr(function)(params)), jax.jit(function)(params)

    plain_text, plain = jaxpr_and_gradients(linen_forward(Stack()))
    text, again = jaxpr_and_gradients(linen_forward(Stack(), remat=Normed))
    assert "remat" not in plain_text
    assert "remat" in text
    chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-5)


# Settings


def test_settings_are_plain_data():
    config = dataclasses.replace(FAST, accumulate=2, moment_dtype="bfloat16")
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    assert OptimizerConfig(**data | {"freeze": FreezeConfig(**data["freeze"])}) == config


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense": -1e-3}, "dense=-0.001: a rate must be finite and at least 0"),
        ({"sign": float("nan")}, "sign=nan"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"clip_norm": float("inf")}, "clip_norm=inf: it must be above 0, and finite"),
        ({"rule": "adam"}, "rule='adam': choose one of"),
        ({"rule": "sgd", "momentum": 1.0}, "momentum=1.0: give at least 0"),
        ({"momentum": 0.5}, "momentum=0.5 is of rule='sgd'"),
        ({"clip_norm": 0.0}, "clip_norm=0.0: it must be above 0"),
        ({"warmup_share": 1.5}, "warmup_share=1.5: a share of the run is between 0 and 1"),
        ({"freeze": FreezeConfig(warmup_share=-0.1)}, "freeze.warmup_share=-0.1: a share"),
        ({"accumulate": 0}, "accumulate=0: .* at least 1"),
        ({"accumulate": 3}, "accumulate=3 does not divide steps=10, .* give steps=12, or another"),
        ({"moment_dtype": "float16"}, "moment_dtype='float16': choose one of"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    plan = ssvq.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, [(".*", None)])
    with pytest.raises(ValueError, match=message):
        make_optimizer(plan, 10, OptimizerConfig(**settings))


@pytest.mark.parametrize(("steps", "share"), [(0, 0.05), (1, 1.0), (10, 1.0)])
def test_runs_of_any_length_have_a_schedule(steps, share):
    plan = ssvq.make_plan({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, [(".*", None)])
    make_optimizer(plan, steps, OptimizerConfig(warmup_share=share))


# SGD


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sgd_is_pytorchs(dtype):
    torch = pytest.importorskip("torch", reason="the reference implementation")
    generator = np.random.default_rng(0)
    start = generator.normal(size=(5, 3)).astype(np.float32)
    grads = generator.normal(size=(4, 5, 3)).astype(np.float32)
    config = OptimizerConfig(
        rule="sgd", dense=0.1, weight_decay=0.05, momentum=0.8, warmup_share=0.0, clip_norm=None,
        freeze=None, moment_dtype=dtype,
    )  # fmt: skip
    params = {"w": jnp.asarray(start)}
    plan = ssvq.make_plan(params, [(".*", None)])
    tx = make_optimizer(plan, 4, config)
    learned, _ = ssvq.split(plan.init(jax.random.key(0), params))
    state = tx.init(learned)
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.8, weight_decay=0.05, nesterov=True)
    for i, grad in enumerate(grads):
        updates, state = tx.update(jax.tree.map(lambda x, g=grad: jnp.asarray(g), learned), state,
                                   learned)  # fmt: skip
        learned = optax.apply_updates(learned, updates)
        sgd.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + np.cos(np.pi * i / 4))
        weight.grad = torch.from_numpy(grad)
        sgd.step()
    tolerance = 1e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(
        learned["params"]["w"], weight.detach().numpy(), rtol=tolerance, atol=tolerance
    )


def test_oscillation_is_the_mean_frequency_of_signs_that_go_back():
    # Of four signs one flips three times: the first starts its average, the others raise it.
    params = {"w": {"sign_latent": jnp.array([0.5, 0.5, 0.5, 0.5])}}
    tx = ssvq.freeze_signs(optax.sgd(1.0), every=100, threshold=1.0, momentum=0.5)
    state = tx.init(params)
    for step, mean in enumerate((0.0, 0.5 / 4, 0.75 / 4)):
        gradient = jnp.array([(-1.0) ** step, 0.0, 0.0, 0.0])
        updates, state = tx.update({"w": {"sign_latent": gradient}}, state, params)
        params = optax.apply_updates(params, updates)
        assert float(sign_shares(state)["oscillation"]) == mean
        assert float(sign_shares(state)["flipped"]) == 0.25
