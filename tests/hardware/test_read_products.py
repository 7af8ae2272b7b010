"""Matrix products by hand: their sizes, their weights and their names; other operations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from reading import WEIGHT, array, feeding, matmul, sizes

from ssvq_jax.hardware.reader import read_workload

pytestmark = pytest.mark.usefixtures("users_promotion")


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
