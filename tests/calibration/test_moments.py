"""Moments over batches: as of all data at once, resumed to the same bits, in groups, refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssvq_jax as ssvq
from ssvq_jax.calibration import (
    calibrations,
    importance_of_inputs,
    input_moments,
    load_sums,
    moments_bytes,
    moments_in_groups,
    save_sums,
)
from ssvq_jax.models.import_llama import llama_shapes, stack_layers
from ssvq_jax.models.llama import Llama, LlamaConfig

METHOD = ssvq.Uniform(bits=4)
RULES = [("first|second", METHOD), (".*", None)]


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"] + params["bias"][None]


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    shapes = {"first": (6, 8), "second": (8, 4), "bias": (4,)}
    return {
        name: jnp.asarray(generator.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def plan(params):
    return ssvq.make_plan(params, RULES)


@pytest.fixture(scope="module")
def batches():
    generator = np.random.default_rng(1)
    return [jnp.asarray(generator.normal(size=(5, 6)), jnp.float32) for _ in range(4)]


def same(one, other):
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].axes == other[path].axes
        np.testing.assert_array_equal(one[path].matrix, other[path].matrix)


def test_batches_are_as_all_at_once(params, plan, batches):
    moments = input_moments(network, params, plan, batches)
    x = np.concatenate(batches).astype(np.float64)
    hidden = np.tanh(x @ np.asarray(params["first"], np.float64))
    for path, rows in (("first", x), ("second", hidden)):
        found = moments.inputs[path]
        np.testing.assert_allclose(found.matrix, rows.T @ rows / 20, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.matrix, found.matrix.T)
    assert moments.rows == {"first": 20, "second": 20}
    assert not moments.few
    whole = input_moments(network, params, plan, [jnp.concatenate(batches)])
    for path, found in moments.inputs.items():
        np.testing.assert_allclose(found.matrix, whole.inputs[path].matrix, rtol=1e-5, atol=1e-6)
    # What they are for: quantizers take them.
    importance = {
        leaf.path: importance_of_inputs(moments.inputs[leaf.path], leaf)
        for leaf in plan.leaves
        if leaf.path in plan.compressed
    }
    np.testing.assert_allclose(importance["first"][:, 3], np.mean(x**2, 0), rtol=1e-5)
    plan.init(jax.random.key(0), params, calibrations(moments.inputs, importance))


def test_few_inputs_are_reported(params, plan, batches):
    moments = input_moments(network, params, plan, [batches[0]])
    assert moments.few == {"first": (5, 6), "second": (5, 8)}
    assert "second: 5 inputs of 8 channels" in str(moments)


def test_groups_need_a_pass_each_and_give_the_same(params, plan, batches):
    sizes = moments_bytes(network, params, plan, batches[0])
    assert sizes == {"first": 4 * 6 * 6, "second": 4 * 8 * 8}
    whole = input_moments(network, params, plan, batches)
    for most, number in ((sum(sizes.values()), 1), (300, 2), (1, 2)):
        groups = list(moments_in_groups(network, params, plan, batches, most_bytes=most))
        assert len(groups) == number
        same({path: x for group in groups for path, x in group.inputs.items()}, whole.inputs)


class StoppedError(Exception):
    pass


class Stopping:
    """Batches that end with an error after some, in one pass."""

    def __init__(self, batches, after):
        self.batches, self.after = batches, after

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == self.after:
                raise StoppedError
            yield batch


def test_resumed_to_the_same_bits(params, plan, batches, tmp_path):
    whole = input_moments(network, params, plan, batches)
    settings = {"folder": tmp_path, "save_seconds": 0.0}
    with pytest.raises(StoppedError):
        input_moments(network, params, plan, Stopping(batches, 3), **settings)
    begun = load_sums(tmp_path / "sums-0.safetensors")
    assert (begun.batches, begun.done) == (3, False)
    seen = []

    def counting(params, x):
        jax.debug.callback(lambda _: seen.append(1), x)
        return network(params, x)

    again = input_moments(counting, params, plan, batches, **settings)
    jax.effects_barrier()
    assert len(seen) == 1  # one batch was left
    same(again.inputs, whole.inputs)
    assert again.rows == whole.rows
    # A finished one is read, and no batch.
    same(input_moments(network, params, plan, Stopping(batches, 1), folder=tmp_path).inputs,
         whole.inputs)  # fmt: skip


def test_sums_of_another_run_are_refused(params, plan, batches, tmp_path):
    input_moments(network, params, plan, batches, folder=tmp_path)
    other = params | {"bias": params["bias"] + 1}
    with pytest.raises(ValueError, match=r"sums-0.safetensors holds .* other weights"):
        input_moments(network, other, plan, batches, folder=tmp_path)
    with pytest.raises(ValueError, match="other data"):
        input_moments(network, params, plan, batches[1:], folder=tmp_path)
    groups = moments_in_groups(network, params, plan, batches, folder=tmp_path, most_bytes=1)
    with pytest.raises(ValueError, match="sums of other leaves.*'second'"):
        next(groups)
    file = tmp_path / "sums-0.safetensors"
    save_sums(file, dataclasses.replace(load_sums(file), done=False, batches=9))
    with pytest.raises(ValueError, match="of 9 batches, but there are 4"):
        input_moments(network, params, plan, batches, folder=tmp_path)
    for content in (b"", file.read_bytes()[:-8]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"sums-0.safetensors holds no sums"):
            input_moments(network, params, plan, batches, folder=tmp_path)


def test_sums_of_half_precision_weights_are_saved(params, batches, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    plan = ssvq.make_plan(half, RULES)
    data = [batch.astype(jnp.bfloat16) for batch in batches]
    moments = input_moments(network, half, plan, data, folder=tmp_path).inputs
    same(input_moments(network, half, plan, data, folder=tmp_path).inputs, moments)
    x = np.concatenate(data).astype(np.float32)
    np.testing.assert_allclose(moments["first"].matrix, x.T @ x / 20, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_inputs_that_are_no_numbers(params, plan, batches, bad):
    spoiled = [*batches[:2], batches[2].at[1, 1].set(bad), batches[3]]
    with pytest.raises(ValueError, match="inputs of leaf 'first' are NaN.* in batch 2,"):
        input_moments(network, params, plan, spoiled)


def test_other_errors(params, plan, batches):
    with pytest.raises(ValueError, match="give at least one"):
        input_moments(network, params, plan, [])
    with pytest.raises(ValueError, match="once only"):
        input_moments(network, params, plan, iter(batches))
    with pytest.raises(ValueError, match="'first'.*make the plan from this tree"):
        input_moments(network, params | {"first": jnp.ones((6, 9))}, plan, batches)

    def scaled(params, x):
        return jnp.tanh(x @ params["first"]) @ (2 * params["second"])

    with pytest.raises(ValueError, match="leaf 'second' is in no product.*mul"):
        input_moments(scaled, params, plan, batches)
    moments = input_moments(scaled, params, plan, batches, optional=True)
    assert set(moments.inputs) == {"first"}
    assert moments.missed == {"second": "mul"}
    assert "second: not read (mul)" in str(moments)


def test_passes_with_different_batches(params, plan, batches):
    class Fewer:
        passes = 0

        def __iter__(self):
            self.passes += 1  # the first one is a look at a batch's shape
            return iter(batches[: 5 - self.passes])

    with pytest.raises(ValueError, match="one pass had 3 batches and another 2"):
        list(moments_in_groups(network, params, plan, Fewer(), most_bytes=1))


def test_several_arguments_and_shapes(params, plan, batches):
    def apply(params, x, scale):
        return network(params, x * scale["by"])

    pairs = [(x, {"by": np.float32(2)}) for x in (batches[0], batches[1][:2])]
    moments = input_moments(apply, params, plan, pairs, progress=True)
    x = 2 * np.concatenate([batches[0], batches[1][:2]])
    np.testing.assert_allclose(moments.inputs["first"].matrix, x.T @ x / 7, rtol=1e-5, atol=1e-6)


def test_llama_with_and_without_scan():
    config = LlamaConfig(vocab=17, width=12, depth=2, heads=2, kv_heads=1, hidden=10, context=16)
    generator = np.random.default_rng(0)
    noise = lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32)  # noqa: E731
    layers = jax.tree.map(noise, llama_shapes(config))
    tokens = [jnp.asarray(generator.integers(0, 17, (2, 8))) for _ in range(2)]
    found = {}
    for scan, variables in ((False, layers), (True, stack_layers(layers))):
        params = jax.tree.map(jnp.asarray, variables["params"])
        kernels = ssvq.Rule("layers.*kernel", METHOD, stacked=int(scan))
        plan = ssvq.make_plan(params, [kernels, ("embed/embedding", METHOD), (".*", None)])
        model = Llama(config, scan=scan)

        def apply(params, tokens, model=model):
            return model.apply({"params": params}, tokens)

        found[scan] = input_moments(apply, params, plan, tokens).inputs
        for leaf in plan.leaves:
            if leaf.path in plan.compressed:
                found[scan][leaf.path].check(leaf)
    assert found[True].pop("embed/embedding").axes == (1,)
    assert len(found[True]) == 7
    for path, moments in found[True].items():
        for i in range(config.depth):
            one = found[False][path.replace("layers/", f"layers_{i}/")]
            assert one.axes == moments.axes
            np.testing.assert_allclose(moments.matrix[i], one.matrix, rtol=1e-4, atol=1e-5)
