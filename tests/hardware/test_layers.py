import dataclasses

import jax
import numpy as np
import pytest
from reading import deit_tiny, deit_tiny_shapes

import ssvq_jax as ssvq
from ssvq_jax import Rule, SignSplit, Uniform, Vector, make_plan
from ssvq_jax.hardware import Accelerator, Product, Workload, cost, with_bits, with_plan
from ssvq_jax.quantizers import Storage, Stream
from ssvq_jax.recipe import PRESETS

COLUMNS = ("weight_bytes", "coded_bytes", "table_bytes", "lookups", "largest_table_bytes")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float32")


def columns(layers, i=0):
    return [float(layers.columns[name][i]) for name in COLUMNS]


def stored_bytes(layers):
    found = layers.columns["coded_bytes"] + layers.columns["table_bytes"]
    return float(np.sum(layers.repeats * found) + layers.other_weight_bytes)


@pytest.mark.parametrize("recipe", sorted(PRESETS))
def test_all_bytes_are_those_of_the_plan(recipe):
    """Every weight of DeiT-tiny is fetched once: no second bookkeeping, no leaf left out."""
    scan = recipe.endswith("-scanned")
    workload = deit_tiny(scan)
    plan = make_plan(deit_tiny_shapes(scan), PRESETS[recipe])
    layers = with_plan(workload, plan)
    assert stored_bytes(layers) == pytest.approx(plan.bits().stored_bytes, rel=1e-12)
    half = plan.bits("float16")
    assert stored_bytes(with_plan(workload, plan, half)) == pytest.approx(half.stored_bytes)


def test_int8_of_deit_tiny_is_a_byte_a_weight():
    assert stored_bytes(with_bits(deit_tiny(), 8, other_bits=8)) == 5_717_416


def test_formats_by_hand():
    plan = make_plan(
        {"a": shape(16, 16), "b": shape(16, 16), "c": shape(16, 16), "d": shape(16, 16)},
        [
            ("a", SignSplit(codewords=4, dim=8)),
            ("b", Vector(codewords=8, dim=4, codebook_dtype="float16")),
            ("c", Uniform(bits=4)),
            ("d", None),
        ],
    )
    products = tuple(Product(x, 8, 16, 16, leaves=(x,)) for x in "abcd")
    layers = with_plan(Workload(products), plan)
    assert columns(layers, 0) == [32 * 2 / 8 + 32, 32 * 2 / 8 + 32, 4 * 8 + 2, 32, 32]
    assert columns(layers, 1) == [64 * 3 / 8, 64 * 3 / 8, 8 * 4 * 2, 64, 64]
    assert columns(layers, 2) == [128, 128, 16 * 2, 0, 32]
    assert columns(layers, 3) == [1024, 1024, 0, 0, 0]


def test_a_product_takes_its_share_of_a_leaf():
    stacked = make_plan({"w": shape(4, 16, 16)}, [Rule("w", SignSplit(4, 8), stacked=1)])
    loop = Product("experts", 8, 16, 16, count=4, leaves=("w",))
    whole = columns(with_plan(Workload((loop,)), stacked))
    assert whole[0] == 4 * (32 * 2 / 8 + 32)
    assert whole[2] == 4 * (32 + 2)
    assert whole[4] == 32
    one = columns(with_plan(Workload((dataclasses.replace(loop, count=1),)), stacked))
    assert one[:4] == [x / 4 for x in whole[:4]]
    layers = with_plan(Workload((dataclasses.replace(loop, count=1, rounds=4),)), stacked)
    assert columns(layers)[:4] == [x / 4 for x in whole[:4]]
    assert layers.repeats.tolist() == [4]
    # Two leaves side by side; one of them for two products.
    plan = make_plan({"q": shape(16, 16), "k": shape(16, 16)}, [(".*", Vector(8, 4))])
    both = Product("qk", 8, 16, 32, leaves=("q", "k"))
    twice = (both, Product("q again", 8, 16, 16, leaves=("q",)))
    layers = with_plan(Workload(twice), plan)
    assert layers.columns["weight_bytes"].tolist() == [48, 24]
    assert layers.columns["lookups"].tolist() == [128, 64]


def test_a_shared_codebook_is_divided_by_sizes():
    leaves = {"a": shape(16, 16), "b": shape(16, 48)}
    plan = make_plan(leaves, [Rule(".*", Vector(8, 4), share="codebook")])
    products = tuple(Product(x, 8, *leaves[x].shape, leaves=(x,)) for x in "ab")
    layers = with_plan(Workload(products), plan)
    assert layers.columns["table_bytes"].tolist() == [34 / 4, 34 * 3 / 4]
    assert layers.columns["lookups"].tolist() == [64, 192]
    assert layers.columns["largest_table_bytes"].tolist() == [32, 32]


def test_entropy_coded_bytes_are_those_of_the_file(tmp_path):
    """And each coded number is a look-up, as it comes from DRAM."""
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    plan = make_plan(params, [("w", Uniform(bits=6))])
    packed = plan.finalize(plan.init(jax.random.key(1), params))
    workload = Workload((Product("w", 8, 64, 64, leaves=("w",)),))
    ssvq.save(tmp_path / "plain.safetensors", packed)
    ssvq.save(tmp_path / "coded.safetensors", packed, codec="entropy")
    with ssvq.load(tmp_path / "plain.safetensors") as file:
        plain = with_plan(workload, file.plan, file.bits())
    with ssvq.load(tmp_path / "coded.safetensors") as file:
        coded = with_plan(workload, file.plan, file.bits())
        stored = file.bits().stored_bytes
    assert columns(plain) == columns(with_plan(workload, plan))
    assert coded.columns["coded_bytes"][0] + coded.columns["table_bytes"][0] == stored
    assert coded.columns["coded_bytes"] < plain.columns["coded_bytes"]
    assert coded.columns["weight_bytes"] == plain.columns["weight_bytes"]
    assert coded.columns["coded_numbers"].tolist() == [4096]
    a = Accelerator("any", 8, 8, lookups_per_cycle=2, weights="streamed")
    assert cost(coded, a).layers.decode_cycles.tolist() == [2048]
    assert cost(plain, a).layers.decode_cycles.tolist() == [0]
    # Decoding takes energy, and the buffer takes what it holds: the numbers as they are.
    assert cost(plain, a).layers.decode_pj.tolist() == [0]
    assert cost(coded, a).layers.decode_pj > 0
    assert cost(coded, a).layers.sram_pj == cost(plain, a).layers.sram_pj
    # As often as they come from DRAM.
    again = dataclasses.replace(a, dataflow="is", columns=2, weight_sram_bytes=100)
    assert cost(coded, again).layers.decode_cycles.tolist() == [4 * 2048]
    assert cost(coded, again).layers.weight_dram_bytes == 4 * coded.columns["coded_bytes"] + 128
    resident = dataclasses.replace(a, weights="resident")
    assert cost(coded, resident).layers.decode_cycles.tolist() == [0]


class Described(Vector):
    """A method that exists as its storage alone: formats that the project does not have yet."""

    def slice_storage(self, spec):
        groups = spec.size // 16
        return Storage(
            (
                # Of 16 weights 4 stay: the mask's index, and a codeword for those that do.
                Stream("mask", (groups,), "uint16", values=1820),
                Stream("codes", (groups,), "uint8", values=256, lookups=1),
                # Of a pyramid's point, a coordinate a step; no table.
                Stream("index", (groups,), "uint64", values=2**40, lookups=16),
                Stream("codebook", (256, 4), "int8"),
            )
        )


def test_any_storage_is_a_format():
    plan = make_plan({"w": shape(64, 64)}, [("w", Described())])
    layers = with_plan(Workload((Product("w", 8, 64, 64, leaves=("w",)),)), plan)
    assert columns(layers) == [256 * (11 + 8 + 40) / 8] * 2 + [1024, 256 * 17, 1024]


def test_of_an_embedding_table_only_the_rows_that_are_looked_up_move():
    products = (Product("fc", 8, 16, 16, leaves=("w",)),)
    leaves = {"w": 256, "table": 1000, "bias": 16}
    workload = Workload(products, leaves=leaves, gathered={"table": 40})
    shapes = {"w": shape(16, 16), "table": shape(100, 10), "bias": shape(16)}
    plan = make_plan(shapes, [("w", Vector(8, 4)), ("table", Uniform(bits=4)), (".*", None)])
    layers = with_plan(workload, plan)
    assert float(layers.other_weight_bytes) == 40 / 2 + 10 * 2 + 16 * 4
    # To stay on chip the whole table must fit.
    codes, codebook = 64 * 3 / 8, 8 * 4 + 2
    assert float(layers.all_weight_bytes) == codes + codebook + 1000 / 2 + 10 * 2 + 16 * 4
    assert float(with_bits(workload, 8, other_bits=8).other_weight_bytes) == 40 + 16


@pytest.mark.usefixtures("as_installed")
def test_what_is_refused():
    plan = make_plan({"w": shape(16, 16)}, [("w", Vector(8, 4))])
    product = Product("fc", 8, 16, 16, leaves=("w",))
    other = Workload((product,), leaves={"w": 256, "v": 4})
    with pytest.raises(ValueError, match="the plan has no leaf 'v', which the model has"):
        with_plan(other, plan)
    with pytest.raises(ValueError, match="the plan has the leaf 'w', which the model has not"):
        with_plan(Workload((dataclasses.replace(product, leaves=()),), leaves={"v": 4}), plan)
    with pytest.raises(ValueError, match="leaf 'w' has 512 weights in the model and 256 in the"):
        with_plan(Workload((product,), leaves={"w": 512}), plan)
    fed = Workload((dataclasses.replace(product, leaves=("u",)),))
    with pytest.raises(ValueError, match="product 'fc' is fed by leaf 'u', which the plan does"):
        with_plan(fed, plan)
    table = make_plan({"v": shape(16, 16)}, [("v", Vector(8, 4))]).bits()
    with pytest.raises(ValueError, match=r"the table of bits lacks \['w'\]"):
        with_plan(Workload((product,)), plan, table)
    with pytest.raises(ValueError, match="the workload has no product"):
        with_bits(Workload(()), 8)
    with pytest.raises(ValueError, match="bits=0: give more than 0"):
        with_bits(Workload((product,)), 0)


@pytest.mark.parametrize(
    ("rounds", "pairs"),
    [
        ([1], []),
        ([3], [(0, 0, 2)]),
        ([1, 1, 1], [(0, 1, 1), (1, 2, 1)]),
        ([1, 4, 4, 1], [(0, 1, 1), (1, 2, 4), (2, 1, 3), (2, 3, 1)]),
        ([2, 2, 5], [(0, 1, 2), (1, 0, 1), (1, 2, 1), (2, 2, 4)]),
    ],
)
def test_neighbours_of_loops(rounds, pairs):
    products = tuple(Product(f"{i}", 2, 2, 2, rounds=often) for i, often in enumerate(rounds))
    layers = with_bits(Workload(products), 8)
    assert [tuple(pair) for pair in layers.pairs.tolist()] == pairs
    assert layers.pairs[:, 2].sum() == sum(rounds) - 1
