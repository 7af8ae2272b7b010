"""Reading workloads: counted by hand, for every kind of model and of control flow."""

import collections
import csv
import functools
import math
import pathlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl

from ssvq_jax.hardware.reader import read_workload
from ssvq_jax.hardware.workload import Workload
from ssvq_jax.models import create, param_shapes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "scalesim_deit_tiny.csv"


@pytest.fixture(autouse=True)
def users_promotion():
    """Flax mixes dtypes, as its users' code does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes(workload):
    """M, K, N and count of the products, by name."""
    return {x.name: (x.m, x.k, x.n, x.count * x.rounds) for x in workload.products}


def feeding(workload):
    return {x.name: x.leaves for x in workload.products}


def read_linen(model, *inputs, **kwargs):
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    params, state = variables.pop("params"), variables
    apply = lambda params, state, *inputs: model.apply({"params": params, **state}, *inputs)  # noqa: E731
    return read_workload(apply, params, state, *inputs, **kwargs)


@functools.cache
def deit_tiny(scan=False, batch=1):
    model = create("deit_tiny", scan=scan)
    apply = lambda params, images: model.apply({"params": params}, images)  # noqa: E731
    return read_workload(apply, param_shapes(model), array(batch, 224, 224, 3))


def by_sizes(workload):
    """How many products there are of every M, N and K."""
    counts = collections.Counter()
    for product in workload.products:
        counts[product.m, product.n, product.k] += product.count * product.rounds
    return counts


PATCH, HEAD = 196 * 768 * 192, 192 * 1000
ATTENTION = 197 * 192 * 576 + 2 * 3 * 197 * 197 * 64 + 197 * 192 * 192
DEIT_TINY = PATCH + 12 * (ATTENTION + 2 * 197 * 192 * 768) + HEAD


@pytest.mark.parametrize("scan", [False, True])
def test_deit_tiny(scan):
    workload = deit_tiny(scan)
    assert workload.macs == DEIT_TINY == 1_253_683_200
    with GOLDEN.open() as file:
        golden = {tuple(int(row[x]) for x in "MNK"): row for row in csv.DictReader(file)}
    assert len(golden) == 8
    counts = {key: int(row["count_in_deit_tiny"]) for key, row in golden.items()}
    assert by_sizes(workload) == counts
    names = {golden[x.m, x.n, x.k]["layer"]: x for x in workload.products}
    block = "blocks" if scan else "blocks_11"
    assert names["qkv"].leaves == (f"{block}/attn/qkv/kernel",)
    assert names["qkv"].name == f"{block}/attn/qkv/kernel"
    assert names["fc2"].leaves == (f"{block}/mlp/fc2/kernel",)
    assert names["head"].leaves == ("head/kernel",)
    assert names["patch_embed"].leaves == ("patch_embed/kernel",)
    assert names["patch_embed"].input_elements is None  # windows do not overlap
    assert (names["attn_qk"].leaves, names["attn_av"].leaves) == ((), ())
    assert block in names["attn_qk"].name
    assert len(workload.products) == (8 if scan else 74)
    assert len({x.name for x in workload.products}) == len(workload.products)
    assert sum(workload.leaves.values()) == 5_717_416
    assert workload.operations == deit_tiny().operations
    assert Workload.from_json(workload.to_json()) == workload


def test_batch():
    one, eight = deit_tiny(), deit_tiny(batch=8)
    assert eight.macs == 8 * one.macs
    assert eight.operations == {kind: 8 * number for kind, number in one.operations.items()}
    heads = [x for x in eight.products if not x.leaves]
    assert {(x.m, x.count) for x in heads} == {(197, 8 * 3)}


class InvertedResidual(nn.Module):
    stride: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        wide = 6 * x.shape[-1]
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.relu6(norm()(nn.Conv(wide, (1, 1), use_bias=False, name="expand")(x)))
        step = (self.stride, self.stride)
        depthwise = nn.Conv(
            wide, (3, 3), step, feature_group_count=wide, use_bias=False, name="depthwise"
        )
        y = nn.relu6(norm()(depthwise(y)))
        y = norm()(nn.Conv(self.outputs, (1, 1), use_bias=False, name="project")(y))
        return x + y if y.shape == x.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(8, (3, 3), (2, 2), name="stem")(x))
        x = InvertedResidual(2, 12, name="down")(x)
        x = InvertedResidual(1, 12, name="same")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def test_mobilenet():
    workload = read_linen(MobileNet(), array(2, 32, 32, 3))
    assert sizes(workload) == {
        "stem/kernel": (2 * 16 * 16, 9 * 3, 8, 1),
        "down/expand/kernel": (2 * 16 * 16, 8, 48, 1),
        "down/depthwise/kernel": (2 * 8 * 8, 9, 1, 48),
        "down/project/kernel": (2 * 8 * 8, 48, 12, 1),
        "same/expand/kernel": (2 * 8 * 8, 12, 72, 1),
        "same/depthwise/kernel": (2 * 8 * 8, 9, 1, 72),
        "same/project/kernel": (2 * 8 * 8, 72, 12, 1),
        "head/kernel": (2, 12, 10, 1),
    }
    inputs = {x.name: x.input_elements for x in workload.products if x.input_elements}
    assert inputs == {
        "stem/kernel": 2 * 32 * 32 * 3,
        "down/depthwise/kernel": 2 * 16 * 16,
        "same/depthwise/kernel": 2 * 8 * 8,
    }


def count_with_ones(workload, function, *shapes):
    """Without padding every result of a convolution of ones is the number of its products."""
    (product,) = workload.products
    assert product.macs == jnp.sum(function(*(jnp.ones(shape) for shape in shapes)))
    return product


CONVOLUTIONS = {
    "plain": ((2, 7, 9, 6), (3, 2, 6, 5), {}),
    "strided": ((2, 7, 9, 6), (3, 2, 6, 5), {"window_strides": (2, 3)}),
    "dilated": ((2, 7, 9, 6), (3, 2, 6, 5), {"rhs_dilation": (2, 3)}),
    "grouped": ((2, 7, 9, 6), (3, 2, 3, 8), {"feature_group_count": 2}),
    "depthwise": ((2, 7, 9, 6), (3, 2, 1, 12), {"feature_group_count": 6}),
    "batch groups": ((4, 7, 9, 6), (3, 2, 6, 8), {"batch_group_count": 2}),
    "transposed": ((2, 4, 5, 6), (3, 5, 6, 7), {"lhs_dilation": (2, 3)}),
    "transposed groups": (
        (2, 4, 5, 6),
        (3, 5, 3, 8),
        {"lhs_dilation": (2, 3), "feature_group_count": 2},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_against_brute_force(name):
    images, kernel, settings = CONVOLUTIONS[name]
    full = [(size - 1, size - 1) for size in kernel[:2]]

    def convolve(kernel, images):
        return lax.conv_general_dilated(
            images,
            kernel,
            **{"window_strides": (1, 1)} | settings,
            padding=full if "lhs_dilation" in settings else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    workload = read_workload(convolve, array(*kernel), array(*images))
    product = count_with_ones(workload, convolve, kernel, images)
    groups = settings.get("feature_group_count", 1) * settings.get("batch_group_count", 1)
    assert product.count == groups
    assert product.weights == math.prod(kernel)


def test_convolutions_over_time_and_space_and_in_another_order():
    def apply(params, sound, volume):
        sound = lax.conv_general_dilated(sound, params["sound"], (1,), "VALID")  # NCH, OIH
        volume = lax.conv_general_dilated(volume, params["volume"], (1, 1, 1), "VALID")
        return sound, volume

    params = {"sound": array(5, 3, 4), "volume": array(7, 2, 3, 3, 3)}
    workload = read_workload(apply, params, array(2, 3, 10), array(2, 2, 5, 6, 7))
    assert sizes(workload) == {
        "sound": (2 * 7, 4 * 3, 5, 1),
        "volume": (2 * 3 * 4 * 5, 27 * 2, 7, 1),
    }


def test_flax_transposed_convolution():
    workload = read_linen(nn.ConvTranspose(5, (4, 4), (2, 2)), array(2, 8, 8, 3))
    assert sizes(workload) == {"kernel": (2 * 8 * 8, 3, 16 * 5, 1)}
    # As many as at each of the 16 x 16 outputs for a quarter of the window.
    assert workload.macs == 2 * 16 * 16 * 4 * 3 * 5


def test_convolution_with_an_activation_as_the_kernel():
    def apply(params, kernel):
        return lax.conv_general_dilated(params["images"], kernel, (1, 1), "VALID")

    workload = read_workload(apply, {"images": array(1, 2, 5, 5)}, array(3, 2, 3, 3))
    assert sizes(workload) == {"conv_general_dilated": (9, 18, 3, 1)}
    assert feeding(workload) == {"conv_general_dilated": ()}


def test_convolution_with_strides_in_a_dilated_input_is_refused():
    def apply(kernel, images):
        no_padding = [(0, 0), (0, 0)]
        return lax.conv_general_dilated(images, kernel, (2, 2), no_padding, lhs_dilation=(2, 2))

    with pytest.raises(ValueError, match="conv_general_dilated"):
        read_workload(apply, array(3, 2, 3, 3), array(1, 2, 5, 5))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(32, name="up")(x)))
        return x, None


class Transformer(nn.Module):
    lifted: bool
    remat: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.lifted:
            split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(block, length=3, **split)(name="blocks")(x, None)[0]
        for i in range(3):
            x = block(name=f"blocks_{i}")(x)[0]
        return x


@pytest.mark.parametrize("remat", [False, True])
def test_transformer_scanned_and_rematerialized(remat):
    plain = read_linen(Transformer(lifted=False, remat=False), array(4, 5, 8))
    workload = read_linen(Transformer(lifted=True, remat=remat), array(4, 5, 8))
    assert by_sizes(workload) == by_sizes(plain)
    assert workload.operations == plain.operations
    weights = {
        f"blocks/{name}/kernel": (4 * 5, 8, n, 3)
        for name, n in {"attention/query": 8, "attention/key": 8, "attention/value": 8}.items()
    } | {
        "blocks/attention/out/kernel": (4 * 5, 8, 8, 3),
        "blocks/up/kernel": (4 * 5, 8, 32, 3),
        "blocks/down/kernel": (4 * 5, 32, 8, 3),
    }
    found = sizes(workload)
    assert {name: found.pop(name) for name in weights} == weights
    # Four images and two heads, in three blocks.
    assert list(found.values()) == [(5, 4, 5, 24), (5, 5, 4, 24)]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
        self.linear = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.norm(self.conv(x)).mean((1, 2)))


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["plain", "nnx.jit"])
def test_nnx(transform):
    graph, params, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, x):
        own = jax.tree.map(lambda x: x, rest)  # nnx.jit writes to what it is given
        return transform(lambda model, x: model(x))(nnx.merge(graph, params, own), x)

    workload = read_workload(apply, nnx.to_pure_dict(params), array(2, 6, 6, 3))
    assert sizes(workload) == {
        "conv/kernel": (2 * 36, 27, 4, 1),
        "linear/kernel": (2, 4, 10, 1),
    }


def test_equinox_whose_kernels_are_left_operands():
    model = eqx.nn.MLP(16, 8, 64, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, static, x):
        return jax.vmap(eqx.combine(params, static))(x)

    workload = read_workload(apply, params, static, array(5, 16))
    assert sizes(workload) == {
        "layers/0/weight": (5, 16, 64, 1),
        "layers/1/weight": (5, 64, 8, 1),
    }
    one = read_workload(lambda params, x: eqx.combine(params, static)(x), params, array(16))
    assert sizes(one)["layers/0/weight"] == (1, 16, 64, 1)


def test_kernels_with_heads():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, out_features=7)
    workload = read_linen(model, array(3, 7, 8))
    (scores, mixed) = [x for x in workload.products if not x.leaves]
    assert (scores.m, scores.k, scores.n, scores.count) == (7, 6, 7, 6)
    assert (mixed.m, mixed.k, mixed.n, mixed.count) == (7, 7, 6, 6)
    found = sizes(workload)
    assert [found[f"{name}/kernel"] for name in ("query", "key", "value", "out")] == [
        (21, 8, 12, 1), (21, 8, 12, 1), (21, 8, 12, 1), (21, 12, 7, 1),
    ]  # fmt: skip


def matmul(params, x):
    return x @ params["w"]


WEIGHT = {"w": array(6, 4)}


@pytest.mark.parametrize(
    ("swap", "expected"), [(False, (8, 6, 4, 1)), (True, (8, 6, 4, 1))], ids=["x @ w", "w.T @ x.T"]
)
def test_weights_are_the_right_operand_on_either_side(swap, expected):
    function = (lambda params, x: params["w"].T @ x.T) if swap else matmul
    assert sizes(read_workload(function, WEIGHT, array(8, 6))) == {"w": expected}


@pytest.mark.parametrize("stated", [(3, 8), (8, 3), (5, 5)])
def test_of_two_activations_the_one_with_more_rows_is_the_input(stated):
    rows, columns = stated

    def apply(params, x, y):
        return params["w"] * jnp.einsum("mk,nk->", x, y), x @ y.T

    workload = read_workload(apply, WEIGHT, array(rows, 4), array(columns, 4))
    assert {(x.m, x.n) for x in workload.products[-1:]} == {(max(stated), min(stated))}


def test_vectors_and_empty_operands():
    def apply(params, x, empty):
        return params["w"] @ x, x @ x, jnp.outer(x, x), empty @ params["w"]

    workload = read_workload(apply, {"w": array(4, 4)}, array(4), array(0, 4))
    assert [(x.m, x.k, x.n) for x in workload.products][:2] == [(1, 4, 4), (1, 4, 1)]
    assert all(x.macs for x in workload.products)


def test_batches_of_weights_count_as_many_products():
    def experts(params, x):
        return jnp.einsum("etk,ekn->etn", x, params["kernel"])

    workload = read_workload(experts, {"kernel": array(3, 6, 4)}, array(3, 5, 6))
    assert sizes(workload) == {"kernel": (5, 6, 4, 3)}


def test_vmap():
    workload = read_workload(jax.vmap(matmul, in_axes=(None, 0)), WEIGHT, array(3, 5, 6))
    assert sizes(workload) == {"w": (15, 6, 4, 1)}
    stacked = {"w": array(3, 6, 4)}
    workload = read_workload(jax.vmap(matmul), stacked, array(3, 5, 6))
    assert sizes(workload) == {"w": (5, 6, 4, 3)}


def test_what_weights_go_through_on_their_way():
    def apply(params, x):
        qkv = jnp.concatenate([params["q"], params["k"], params["v"]], axis=1)
        merged = params["base"].astype(x.dtype) + 0.5 * params["a"] @ params["b"]
        cut = jnp.reshape(params["flat"][:24], (4, 6)).T
        kept, x = lax.optimization_barrier((jnp.tanh(params["kept"]), x))
        return x @ qkv, x @ merged, x @ cut, x @ kept

    params = {name: array(6, 4) for name in ("q", "k", "v", "kept")}
    params |= {"base": array(6, 6, dtype="bfloat16"), "a": array(6, 2), "b": array(2, 6)}
    workload = read_workload(apply, params | {"flat": array(30)}, array(5, 6))
    assert sizes(workload) == {
        "a": (6, 2, 6, 1),
        "k": (5, 6, 12, 1),
        "base": (5, 6, 6, 1),
        "flat": (5, 6, 4, 1),
        "kept": (5, 6, 4, 1),
    }
    assert feeding(workload) == {
        "a": ("a", "b"),
        "k": ("k", "q", "v"),
        "base": ("a", "b", "base"),
        "flat": ("flat",),
        "kept": ("kept",),
    }
    assert not workload.operations  # all of it on weights alone


def test_tied_embeddings_and_a_weight_used_twice():
    def apply(params, tokens):
        x = params["embedding"][tokens]
        x = x @ params["w"] @ params["w"]
        return x @ params["embedding"].T

    params = {"embedding": array(100, 8), "w": array(8, 8), "bias": array(7)}
    workload = read_workload(apply, params, array(2, 5, dtype="int32"))
    assert sizes(workload) == {
        "w": (10, 8, 8, 1),
        "w (2)": (10, 8, 8, 1),
        "embedding": (10, 8, 100, 1),
    }
    assert feeding(workload)["w (2)"] == ("w",)
    assert workload.leaves == {"bias": 7, "embedding": 800, "w": 64}


def test_sums_over_a_mapped_axis():
    def apply(params, x):
        return jax.vmap(lambda x: x - lax.pmean(x @ params["w"], "batch"), axis_name="batch")(x)

    workload = read_workload(apply, {"w": array(4, 4)}, array(5, 4))
    assert sizes(workload) == {"w": (5, 4, 4, 1)}
    assert workload.operations == {"reduction": 20, "transcendental": 4, "elementwise": 20}


def test_constants():
    closed = jnp.ones((6, 4))
    table = np.arange(3, dtype=np.float32)

    def apply(params, x):
        angles = jnp.sin(jnp.outer(table, table))  # of constants alone: nothing to do in a call
        return closed.T @ x.T, params["scale"] * angles

    workload = read_workload(apply, {"scale": array()}, array(9, 6))
    assert sizes(workload) == {"dot_general": (9, 6, 4, 1)}
    assert feeding(workload) == {"dot_general": ()}


def test_operations():
    def apply(params, x):
        x = x @ params["w"] + jnp.tanh(params["bias"])  # 8 sums
        x = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))  # 8 reduced, 8 differences, 8 exp
        x = x / jnp.sum(x, axis=-1, keepdims=True)  # 8 reduced, 8 divisions
        y = jnp.cumsum(x, axis=0)  # 8 added up
        z = lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "VALID")  # 3 windows of 4
        w = jnp.zeros(5).at[jnp.array([0, 1])].add(x[0, :2])  # 2 added
        return jnp.where(x > 0.5, x, y), z, w, jnp.pad(x.T, 1)  # 8 compared, 8 chosen

    params = {"w": array(3, 4), "bias": array(4)}
    with jax.numpy_rank_promotion("allow"):
        workload = read_workload(apply, params, array(2, 3))
    assert workload.operations == {
        "elementwise": 8 + 8 + 8 + 8,
        "transcendental": 8 + 8,
        "reduction": 8 + 8 + 8 + 12 + 2,
    }


def test_cond_takes_the_branch_with_most_products_then_operations():
    branches = [
        lambda params, x: jnp.exp(jnp.exp(x[:, :4])),
        lambda params, x: x @ params["w"],
        lambda params, x: jnp.exp(x @ params["w"]),
    ]

    def apply(params, x, i):
        y = lax.switch(i, branches, params, x)
        chosen = lax.cond(i > 0, lambda p: p["w"], lambda p: 2 * p["w"], params)
        return y, x @ chosen

    workload = read_workload(apply, WEIGHT, array(5, 6), array(dtype="int32"))
    assert sizes(workload)["w"] == (5, 6, 4, 1)
    assert workload.operations["transcendental"] == 20
    # Which weights they are depends on an input.
    assert [x.leaves for x in workload.products] == [("w",), ()]
    assert (workload.products[1].m, workload.products[1].n) == (5, 4)


def test_platforms_take_the_default():
    def apply(params, x):
        return lax.platform_dependent(
            params, x, tpu=lambda p, x: x @ p["w"] @ p["w"].T @ p["w"], default=matmul
        )

    assert sizes(read_workload(apply, WEIGHT, array(5, 6))) == {"w": (5, 6, 4, 1)}


def test_while():
    def apply(params, x):
        return lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ params["w"], x)

    square, x = {"w": array(4, 4)}, array(5, 4)
    with pytest.raises(ValueError, match=r"while loop holds the products \['w'\].*while_rounds"):
        read_workload(apply, square, x)
    workload = read_workload(apply, square, x, while_rounds=7)
    assert sizes(workload) == {"w": (5, 4, 4, 7)}
    assert workload.operations == {"reduction": 7 * 20, "elementwise": 7}
    for rounds in (0, -1, True):
        with pytest.raises(ValueError, match="while_rounds"):
            read_workload(apply, square, x, while_rounds=rounds)


def test_while_without_products():
    def apply(params, x):
        return lax.while_loop(lambda x: x[0, 0] < 9, jnp.exp, x @ params["w"])

    expected = {None: 20, 3: 60}
    for rounds, number in expected.items():
        workload = read_workload(apply, WEIGHT, array(5, 6), while_rounds=rounds)
        assert sizes(workload) == {"w": (5, 6, 4, 1)}
        assert workload.operations["transcendental"] == number


def test_fori_loop_over_layers_and_with_weights_in_its_carry():
    def apply(params, x, y):
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["layers"][i]), x)
        y, _ = lax.fori_loop(0, 4, lambda i, c: (c[0] @ c[1], c[1]), (y, params["kept"]))
        return x, y

    params = {"layers": array(3, 4, 4), "kept": array(4, 4)}
    workload = read_workload(apply, params, array(5, 4), array(6, 4))
    assert sizes(workload) == {"layers": (5, 4, 4, 3), "kept": (6, 4, 4, 4)}
    assert feeding(workload) == {"layers": ("layers",), "kept": ("kept",)}
    assert workload.operations["transcendental"] == 3 * 20


def test_scan_whose_carry_starts_as_a_constant():
    def apply(params, xs):
        def step(carry, x):
            carry = jnp.tanh(-carry @ params["recurrent"] + x @ params["input"])
            return carry, carry

        return lax.scan(step, jnp.zeros(8), xs)[1] @ params["head"]

    params = {"recurrent": array(8, 8), "input": array(3, 8), "head": array(8, 2)}
    workload = read_workload(apply, params, array(10, 3))
    assert sizes(workload) == {
        "recurrent": (1, 8, 8, 10),
        "input": (1, 3, 8, 10),
        "head": (10, 8, 2, 1),
    }
    # The carry is zeros for one round alone: its sign is changed in all of them.
    assert workload.operations == {"elementwise": 80 + 80, "transcendental": 80}
    assert not read_workload(matmul, WEIGHT, array(5, 6)).operations
    nothing = read_workload(lambda p, x: (apply(p, x[:0]), x @ p["input"]), params, array(10, 3))
    assert sizes(nothing) == {"input": (10, 3, 8, 1)}


def test_lstm():
    workload = read_linen(nn.RNN(nn.OptimizedLSTMCell(6)), array(2, 9, 3))
    assert workload.macs == 9 * 2 * (3 + 6) * 4 * 6
    assert all(product.leaves for product in workload.products)


@jax.custom_vjp
def custom_gradient(x, w):
    return x @ w


custom_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

custom_batching = jax.custom_batching.custom_vmap(lambda x, w: x @ w)
custom_batching.def_vmap(lambda size, batched, x, w: (x @ w, True))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda x, w: jax.nn.relu(x @ w),
        custom_gradient,
        custom_batching,
        jax.jit(jax.jit(jnp.matmul)),
        jax.checkpoint(jnp.matmul),
        lax.composite(lambda x, w: x @ w, "mine.matmul"),
        lambda x, w: jnp.einsum("bk,kn->bn", x, w),
    ],
    ids=["custom_jvp", "custom_vjp", "custom_vmap", "jit", "checkpoint", "composite", "einsum"],
)
def test_calls_are_entered(wrapped):
    workload = read_workload(lambda params, x: wrapped(x, params["w"]), WEIGHT, array(5, 6))
    assert sizes(workload) == {"w": (5, 6, 4, 1)}
    assert feeding(workload) == {"w": ("w",)}


def test_gradients():
    def loss(params, x):
        return jnp.sum(jnp.square(x @ params["w"]))

    workload = read_workload(jax.grad(loss), WEIGHT, array(5, 6))
    # The derivative by the weights is a product of two activations.
    assert [(x.macs, x.leaves) for x in workload.products] == [(120, ("w",)), (120, ())]


def double(refs_in, refs_out):
    refs_out[...] = 2 * refs_in[...]


UNKNOWN = {
    "cholesky": jnp.linalg.cholesky,
    "fft": lambda x: jnp.fft.fft(x).real,
    "pallas_call": pl.pallas_call(double, out_shape=array(4, 4)),
    "pure_callback": lambda x: jax.pure_callback(np.exp, x, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_primitives_are_refused_or_vouched_for(name):
    def apply(params, x):
        return UNKNOWN[name](x @ params["w"]), jnp.linalg.qr(x)

    w, x = {"w": array(4, 4)}, array(4, 4)
    with pytest.raises(ValueError, match=rf"{name}\((float32|complex64)\[4,4\]\)") as error:
        read_workload(apply, w, x)
    for words in ("qr(", "Product(...)", "unknown_without_products"):
        assert words in str(error.value)
    vouched = (name, "qr")
    workload = read_workload(apply, w, x, unknown_without_products=vouched)
    assert sizes(workload) == {"w": (4, 4, 4, 1)}


def test_unknown_primitives_on_weights_and_on_constants():
    def apply(params, x):
        return x @ jnp.linalg.qr(jnp.ones((4, 4)))[0] @ params["w"]

    assert len(read_workload(apply, {"w": array(4, 4)}, array(5, 4)).products) == 2
    with pytest.raises(ValueError, match="fft"):
        read_workload(lambda p, x: x @ jnp.fft.fft(p["w"]).real, WEIGHT, array(5, 6))


def test_names_of_places():
    def apply(params, x):
        with jax.named_scope("attention"):
            scores = x @ x.T
        return scores @ x, x @ params["w"]

    assert list(sizes(read_workload(apply, WEIGHT, array(5, 6)))) == [
        "attention",
        "dot_general",
        "w",
    ]
    bare = read_workload(lambda w, x: x @ w, array(6, 4), array(5, 6))
    assert list(sizes(bare)) == ["params"]
    assert feeding(bare) == {"params": ("",)}


def test_names_stay_unique():
    def apply(params, x):
        return x @ params["w"], x @ params["w"], x @ params["w (2)"]

    workload = read_workload(apply, WEIGHT | {"w (2)": array(6, 4)}, array(5, 6))
    assert feeding(workload) == {"w": ("w",), "w (2)": ("w",), "w (2) (2)": ("w (2)",)}


def test_arguments_that_are_no_arrays_are_passed_on():
    def apply(params, batch, flag, *, mode, activation, mask=None):
        assert flag is True
        assert mode == "eval"
        assert mask is None
        return activation(batch["x"] @ params["w"])

    arrays = {"x": np.ones((5, 6), np.float32)}
    weights = {"w": jnp.ones((6, 4))}
    workload = read_workload(apply, weights, arrays, True, mode="eval", activation=jnp.exp)
    assert sizes(workload) == {"w": (5, 6, 4, 1)}
    assert workload.operations == {"transcendental": 20}


def test_huge_models_are_read_from_shapes():
    params = {"kernel": array(200, 20_000, 20_000)}
    apply = lambda params, x: lax.scan(lambda x, w: (x @ w, None), x, params["kernel"])[0]  # noqa: E731
    assert read_workload(apply, params, array(1, 20_000)).macs == 200 * 20_000**2


def test_bad_input():
    with pytest.raises(ValueError, match="tree of parameters has no leaf"):
        read_workload(matmul, {}, array(5, 6))
    for leaf in (3.0, jax.nn.relu, "kernel"):
        with pytest.raises(ValueError, match="leaf 'b' is a .*, not an array"):
            read_workload(matmul, {"w": array(6, 4), "b": leaf}, array(5, 6))
    with pytest.raises(ValueError, match="found no matrix product"):
        read_workload(lambda params, x: x * params["w"], WEIGHT, array(6, 4))
    with pytest.raises(ValueError, match=r"at most 2\^53"):
        read_workload(matmul, {"w": array(2**20, 2**20)}, array(2**20, 2**20))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_dot_general(data):
    batch, contracted, lhs, rhs = (
        data.draw(st.lists(st.integers(1, 5), max_size=2), label=label)
        for label in ("batch", "contracted", "lhs", "rhs")
    )
    roles = [f"b{i}" for i in range(len(batch))] + [f"k{i}" for i in range(len(contracted))]
    shared = dict(zip(roles, batch + contracted, strict=True))
    operands = []
    for free in (lhs, rhs):
        size = shared | {f"free{i}": n for i, n in enumerate(free)}
        axes = data.draw(st.permutations(list(size)))
        operands.append((tuple(size[axis] for axis in axes), axes))
    (lhs_shape, lhs_axes), (rhs_shape, rhs_axes) = operands
    numbers = tuple(
        tuple(
            [axes.index(role) for role in roles if role[0] == kind] for axes in (lhs_axes, rhs_axes)
        )
        for kind in "kb"
    )

    def apply(params, x):
        return lax.dot_general(x, params["w"], numbers)

    workload = read_workload(apply, {"w": array(*rhs_shape)}, array(*lhs_shape))
    m, k, n, count = (math.prod(x) for x in (lhs, contracted, rhs, batch))
    assert sizes(workload) == {"w": (m, k, n, count)}
    assert workload.macs == math.prod(batch + contracted + lhs + rhs)


def test_rows_of_an_embedding_table_are_counted_as_gathered():
    shapes = {"table": array(100, 16), "w": array(16, 4), "positions": array(8, 16)}

    def model(params, tokens):
        x = params["table"][tokens] + params["positions"]
        return x @ params["w"]

    workload = read_workload(model, shapes, array(2, 8, dtype="int32"))
    assert dict(workload.gathered) == {"table": 2 * 8 * 16}
    tied = read_workload(
        lambda params, tokens: params["table"][tokens] @ params["table"].T,
        {"table": array(100, 16)},
        array(2, 8, dtype="int32"),
    )
    assert dict(tied.gathered) == {}  # used in a product, too
    long = read_workload(model, shapes, array(64, 8, dtype="int32"))
    assert dict(long.gathered) == {"table": 1600}  # no more than there are
