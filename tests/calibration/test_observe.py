"""Inputs that are read out of a function, against those that flax or the test itself captured."""

import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssvq_jax.calibration import observe
from ssvq_jax.models.spatial import convolve
from ssvq_jax.quantizers.calibration import InputMoments, input_rows
from ssvq_jax.tree import leaf_specs


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def seen(apply, params, paths, *inputs):
    """Sums of a jitted call, whose outputs are checked to be the function's own."""
    found = jax.jit(lambda params, *inputs: observe(apply, params, paths, *inputs))(params, *inputs)
    for x, y in zip(*map(jax.tree.leaves, (found.outputs, apply(params, *inputs))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    return found


def gram(rows):
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    return rows.T @ rows


def check(sums, rows, axes=(0,)):
    assert sums.axes == axes
    assert int(sums.count) == math.prod(rows.shape[:-1])
    np.testing.assert_allclose(sums.matrix, gram(rows), rtol=1e-4, atol=1e-4)


def check_by_change(apply, params, path, sums, *inputs):
    """The mean squared change of an output by a small error E is trace(E^T H E), for any layer."""
    spec = leaf_specs(params)[path]
    error = drawn(*spec.shape, seed=9) * 0.1
    other = jax.tree_util.tree_map_with_path(
        lambda p, x: (
            x + error if jax.tree_util.keystr(p, simple=True, separator="/") == path else x
        ),
        params,
    )
    change = apply(other, *inputs) - apply(params, *inputs)
    rows = input_rows(error, sums.axes)
    expected = jnp.sum(jnp.square(change)) / int(sums.count)
    found = jnp.trace(rows.T @ (sums.matrix / int(sums.count)) @ rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    InputMoments(sums.matrix, sums.axes).check(spec)


def captured(module, params, *inputs):
    """First argument of every layer's call, by name."""
    found = {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__":
            found["/".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        module.apply({"params": params}, *inputs)
    return found


def test_dense_and_attention():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(8, name="first")(x))
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            return nn.Dense(3, name="last")(x)

    x = drawn(2, 5, 6)
    params = Net().init(jax.random.key(0), x)["params"]
    paths = {path: 0 for path in leaf_specs(params) if path.endswith("kernel")}
    sums = seen(lambda p, x: Net().apply({"params": p}, x), params, paths, x).sums
    inputs = captured(Net(), params, x)
    for name in ("first", "last", "attention/query", "attention/key", "attention/value"):
        check(sums[f"{name}/kernel"], inputs[name])
    mixed = inputs["attention/out"]
    check(sums["attention/out/kernel"], mixed.reshape(2, 5, 8), axes=(0, 1))
    assert set(sums) == set(paths)


CONVOLUTIONS = [
    {"kernel_size": (3, 3)},
    {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID"},
    {"kernel_size": (3, 3), "kernel_dilation": 2, "padding": ((2, 1), (0, 2))},
    {"kernel_size": (1, 1)},
    {"kernel_size": (1, 1), "conv_general_dilated": convolve},
    {"kernel_size": (3,), "strides": 2},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_convolutions(settings):
    size = settings["kernel_size"]
    x = drawn(2, *(7, 6)[: len(size)], 4)
    module = nn.Conv(5, use_bias=False, **settings)
    params = module.init(jax.random.key(0), x)["params"]

    def apply(params, x):
        return module.apply({"params": params}, x)

    sums = seen(apply, params, {"kernel": 0}, x).sums["kernel"]
    assert sums.axes == tuple(range(len(size) + 1))
    assert int(sums.count) == apply(params, x)[..., 0].size
    check_by_change(apply, params, "kernel", sums, x)


def test_windows_by_hand():
    """Rows of H are those of an HWIO kernel: height, width, then channels."""
    x = drawn(1, 3, 3, 2)
    module = nn.Conv(1, (2, 2), padding="VALID")
    params = module.init(jax.random.key(0), x)["params"]
    sums = seen(lambda p, x: module.apply({"params": p}, x), params, {"kernel": 0}, x).sums
    windows = [x[0, i : i + 2, j : j + 2].reshape(8) for i in range(2) for j in range(2)]
    check(sums["kernel"], jnp.stack(windows), axes=(0, 1, 2))


def test_other_layouts_of_convolutions():
    params = {"kernel": drawn(5, 4, 3, 2)}  # OIHW

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NHWC")
        )

    def transposed(params, x):
        kernel = params["kernel"].transpose(2, 3, 1, 0)
        return jax.lax.conv_transpose(x.transpose(0, 2, 3, 1), kernel, (2, 2), "SAME")

    x = drawn(2, 4, 6, 5)
    for function in (apply, transposed):
        sums = seen(function, params, {"kernel": 0}, x).sums["kernel"]
        assert sums.axes == (1, 2, 3)
        check_by_change(function, params, "kernel", sums, x)


def test_grouped_convolutions_are_said_to_be_missed():
    x = drawn(2, 6, 6, 4)
    module = nn.Conv(4, (3, 3), feature_group_count=4)
    params = module.init(jax.random.key(0), x)["params"]
    found = seen(lambda p, x: module.apply({"params": p}, x), params, {"kernel": 0}, x)
    assert not found.sums
    assert found.missed == (("kernel", "a grouped convolution"),)


def test_stacked_by_a_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(6, name="dense")(jnp.tanh(x)), None

    scanned = nn.scan(
        nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = drawn(4, 6)
    params = scanned.init(jax.random.key(0), x, None)["params"]

    def apply(params, x):
        return scanned.apply({"params": params}, x, None)[0]

    sums = seen(apply, params, {"dense/kernel": 1}, x).sums["dense/kernel"]
    assert sums.axes == (0,)
    assert sums.count.tolist() == [4, 4, 4]
    for i in range(3):
        np.testing.assert_allclose(sums.matrix[i], gram(np.tanh(x)), rtol=1e-5, atol=1e-5)
        x = x + jnp.tanh(x) @ params["dense"]["kernel"][i]  # biases are zeros
    whole = seen(apply, params, {"dense/kernel": 0}, x)
    assert not whole.sums
    assert "stacked=0" in dict(whole.missed)["dense/kernel"]


def test_tied_embedding():
    params = {"embedding": drawn(7, 4), "kernel": drawn(4, 4)}

    def apply(params, tokens):
        hidden = jnp.tanh(params["embedding"][tokens] @ params["kernel"])
        return hidden @ params["embedding"].T

    tokens = jnp.array([[0, 3, 3], [6, 1, 2]])
    found = seen(apply, params, {"embedding": 0, "kernel": 0}, tokens)
    embedded = params["embedding"][tokens]
    check(found.sums["embedding"], jnp.tanh(embedded @ params["kernel"]), axes=(1,))
    check(found.sums["kernel"], embedded)
    assert found.missed == (("embedding", "gather"),)


def test_an_nnx_model_and_an_equinox_one():
    x = drawn(3, 4)
    graph, state = nnx.split(nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)

    def apply(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    check(seen(apply, params, {"kernel": 0}, x).sums["kernel"], x)
    arrays, static = eqx.partition(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)), eqx.is_array)
    (path, _) = [path for path in leaf_specs(arrays) if path.endswith("weight")]
    found = seen(lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays, {path: 0}, x)
    check(found.sums[path], x, axes=(1,))


def shapes(params, x):
    """A product after casts, reshapes and transposes."""
    kernel = params["w"].astype(jnp.float32).reshape(2, 3, 4, 5).transpose(2, 3, 1, 0)
    return jnp.einsum("bji,koji->bko", x.reshape(-1, 3, 2), kernel)


def nested(params, x):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    inner = jax.jit(lambda w, x: jax.checkpoint(product)(x, w))
    return jax.jit(lambda p, x: inner(p["w"], x))(params, x)


def left(params, x):
    return jnp.swapaxes(params["w"], 0, 1) @ x.T


def chosen(params, x):
    return jax.lax.cond(x.sum() > -1e9, lambda w: x @ w, lambda w: jnp.zeros((8, 20)), params["w"])


@pytest.mark.parametrize("function", [shapes, nested, left, chosen])
def test_ways_to_multiply(function):
    x = drawn(8, 6)
    sums = seen(function, {"w": drawn(6, 20)}, {"w": 0}, x).sums["w"]
    # In `shapes` rows of the kernel are [2, 3], those of x [3, 2].
    rows = x.reshape(8, 3, 2).transpose(0, 2, 1).reshape(8, 6) if function is shapes else x
    check(sums, rows)


@pytest.mark.parametrize("rounds", [3, jnp.int32(3)])
def test_a_leaf_used_again_and_again_adds_up(rounds):
    """Both in a scan and in a while loop, and once after it."""

    def apply(params, x, rounds):
        x = jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ params["w"]), x)
        return x @ params["w"]

    params, x = {"w": drawn(5, 5)}, drawn(4, 5)
    kept = rounds if isinstance(rounds, int) else None
    inputs = (x,) if kept else (x, rounds)
    function = (lambda p, x: apply(p, x, kept)) if kept else apply
    sums = seen(function, params, {"w": 0}, *inputs).sums["w"]
    rows = [x]
    for _ in range(3):
        rows.append(jnp.tanh(rows[-1] @ params["w"]))
    check(sums, jnp.stack(rows))


def test_slices_of_a_stack_and_batched_products():
    params = {"w": drawn(3, 4, 5)}
    x = drawn(3, 2, 4)

    def by_hand(params, x):
        return [x[0] @ params["w"][0], x[1] @ params["w"][1], x[2] @ params["w"][2]]

    def in_two(params, x):
        first = jax.vmap(jnp.matmul)(x[:2], params["w"][:2])
        return first, x[2] @ jnp.squeeze(params["w"][2:], 0)

    def at_once(params, x):
        return jnp.einsum("exc,eco->exo", x, params["w"])

    for function in (by_hand, in_two, at_once):
        sums = seen(function, params, {"w": 1}, x).sums["w"]
        assert sums.axes == (0,)
        assert sums.count.tolist() == [2, 2, 2]
        for i in range(3):
            np.testing.assert_allclose(sums.matrix[i], gram(x[i]), rtol=1e-5, atol=1e-5)
    found = seen(at_once, params, {"w": 0}, x)
    assert not found.sums
    assert "stacked=0" in dict(found.missed)["w"]
    only = seen(lambda p, x: x[1] @ p["w"][1], params, {"w": 1}, x).sums["w"]
    assert only.count.tolist() == [0, 2, 0]
    assert not np.any(only.matrix[0])


def test_two_stacked_axes_in_nested_scans():
    params = {"w": drawn(2, 3, 4, 4)}

    def apply(params, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(lambda x, ws: jax.lax.scan(inner, x, ws), x, params["w"])[0]

    x = drawn(5, 4)
    sums = seen(apply, params, {"w": 2}, x).sums["w"]
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(sums.matrix[i, j], gram(x), rtol=1e-5, atol=1e-5)
            x = jnp.tanh(x @ params["w"][i, j])


def test_half_precision_activations_are_summed_in_32_bits():
    x = jnp.full((512, 4), 1.0, jnp.bfloat16)  # 8 bits of precision hold 256 and no 257

    def apply(params, x):
        return x @ params["w"].astype(jnp.bfloat16)

    sums = seen(apply, {"w": drawn(4, 3)}, {"w": 0}, x).sums["w"]
    assert sums.matrix.dtype == jnp.float32
    np.testing.assert_array_equal(sums.matrix, np.full((4, 4), 512.0))


def test_what_is_no_product_of_the_weight_itself():
    params = {"w": drawn(4, 4), "scale": drawn(4)}
    x = drawn(3, 4)
    changed = seen(lambda p, x: x @ (p["w"] * p["scale"][:, None]), params, {"w": 0}, x)
    assert not changed.sums
    assert changed.missed == (("w", "mul"),)
    part = seen(lambda p, x: x[:, :2] @ p["w"][:2], params, {"w": 0}, x)
    assert not part.sums
    assert part.missed == (("w", "slice"),)


def test_a_weight_whose_inputs_have_no_one_matrix():
    params = {"w": drawn(4, 4)}
    found = seen(lambda p, x: x @ p["w"] @ p["w"].T, params, {"w": 0}, drawn(2, 4))
    assert not found.sums
    assert found.missed == (("w", "products along its axes [(0,), (1,)]"),)


def test_a_stack_that_a_loop_goes_through_and_multiplies_whole():
    stack, x = drawn(3, 4, 4), drawn(2, 4)

    def apply(p, x):
        def layer(carry, w):
            whole = jnp.einsum("lbi,lio->lbo", jnp.stack([x, x, x]), p["w"])
            return carry + jnp.sum(whole) + jnp.sum(x @ w), None

        return jax.lax.scan(layer, jnp.float32(0), p["w"])[0]

    sums = seen(apply, {"w": stack}, {"w": 1}, x).sums["w"]
    # Every layer once by the loop, and in each of its three rounds.
    np.testing.assert_allclose(sums.matrix, np.stack([4 * x.T @ x] * 3), rtol=1e-5)


def test_errors():
    params = {"w": drawn(4, 4)}
    with pytest.raises(ValueError, match="'other'.*not in the tree"):
        observe(lambda p, x: x, params, {"other": 0}, drawn(1))
