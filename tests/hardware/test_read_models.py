"""Workloads of whole models, counted by hand: Flax linen and NNX, Equinox, bare functions."""

import collections
import csv
import functools
import pathlib

import equinox as eqx
import flax.linen as nn
import jax
import pytest
from flax import nnx
from jax import lax
from reading import array, deit_tiny, feeding, read_linen, sizes

from ssvq_jax.hardware.reader import read_workload
from ssvq_jax.hardware.workload import Workload

pytestmark = pytest.mark.usefixtures("users_promotion")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "scalesim_deit_tiny.csv"


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


def test_lstm():
    workload = read_linen(nn.RNN(nn.OptimizedLSTMCell(6)), array(2, 9, 3))
    assert workload.macs == 9 * 2 * (3 + 6) * 4 * 6
    assert all(product.leaves for product in workload.products)


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


def test_huge_models_are_read_from_shapes():
    params = {"kernel": array(200, 20_000, 20_000)}
    apply = lambda params, x: lax.scan(lambda x, w: (x @ w, None), x, params["kernel"])[0]  # noqa: E731
    assert read_workload(apply, params, array(1, 20_000)).macs == 200 * 20_000**2
