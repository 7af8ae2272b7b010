"""Rotations are orthogonal, mix all coordinates, and have the same bits however they are run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.rotation import Rotation, paley

SIZES = [1, 2, 64, 12, 20, 28, 36, 192, 576, 100, 92, 7]


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 76, 368])
def test_paley_matrices_are_hadamard(order):
    matrix = paley(order)
    assert np.array_equal(np.abs(matrix), np.ones((order, order)))
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 92, 52])
def test_orders_without_a_construction_are_named(order):
    with pytest.raises(ValueError, match=f"order={order}"):
        paley(order)


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal_and_inverse(size):
    rotation = Rotation(size, seed=3)
    identity = jnp.eye(size)
    matrix = np.float64(rotation.apply(identity))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(rotation.inverse(identity), matrix.T, atol=1e-6)
    if rotation.exact:
        np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(size), rtol=1e-6)


def test_sizes_of_the_models_are_exact():
    sizes = [64, 96, 128, 192, 320, 384, 576, 768, 960, 1152, 1280, 1536, 2048, 3072]
    assert all(Rotation(size).exact for size in sizes)
    assert not Rotation(100).exact  # 100 = 99 + 1 = 2 (49 + 1), and 49 is no prime


@pytest.mark.parametrize("size", [64, 36, 92])
def test_same_bits_however_it_is_run(size):
    rotation = Rotation(size, seed=1)
    x = jax.random.normal(jax.random.key(0), (3, 5, size))
    for function in (rotation.apply, rotation.inverse):
        with jax.disable_jit():
            plain = function(x)
        assert np.array_equal(plain, function(x))
        assert np.array_equal(plain, jax.jit(lambda x, f=function: f(2.0 * x) / 2.0)(x))
        assert np.array_equal(plain, jax.jit(jax.vmap(function))(x))
        assert np.array_equal(plain[1, 2], function(x[1, 2]))


def test_signs_depend_on_the_seed_alone():
    one = Rotation(16, seed=0).apply(jnp.eye(16))
    assert np.array_equal(one, Rotation(16, seed=0).apply(jnp.eye(16)))
    assert not np.array_equal(one, Rotation(16, seed=1).apply(jnp.eye(16)))
    # Bits of SHAKE-256("0"), most significant first: files of today must decode for ever.
    assert np.sign(one[:, 0]).tolist()[:8] == [1, -1, -1, -1, -1, -1, -1, 1]


def test_a_product_with_rotated_inputs_is_the_product():
    rotation = Rotation(192, seed=5)
    x = jax.random.normal(jax.random.key(0), (7, 192))
    weight = jax.random.normal(jax.random.key(1), (192, 30))
    rotated = rotation.apply(x) @ rotation.apply(weight.T).T
    np.testing.assert_allclose(rotated, x @ weight, atol=1e-4)


def test_no_factor_is_larger_than_256():
    assert Rotation(4 * 63).exact  # of order 252: 251 is a prime
    assert not Rotation(11_008).exact  # 2^8 * 43: 5503 is one, too
