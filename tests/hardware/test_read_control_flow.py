"""Branches, loops and calls: what is in them counts as often as it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from reading import WEIGHT, array, feeding, matmul, sizes

from ssvq_jax.hardware.reader import read_workload

pytestmark = pytest.mark.usefixtures("users_promotion")


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
