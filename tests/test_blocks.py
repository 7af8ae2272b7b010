import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax.blocks import block_layout


def test_dense_kernel_by_hand():
    layout = block_layout((2, 4), dim=2)
    blocks = layout.split(jnp.arange(8.0).reshape(2, 4))
    assert blocks.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_axis_zero_runs_along_the_inputs():
    layout = block_layout((4, 2), dim=2, axis=0)
    blocks = layout.split(jnp.arange(8.0).reshape(4, 2))
    assert blocks.tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_padding_is_marked_counted_and_dropped():
    layout = block_layout((2, 3), dim=2, pad=True)
    weight = jnp.arange(1.0, 7.0).reshape(2, 3)
    blocks = layout.split(weight)
    assert blocks.tolist() == [[1, 2], [3, 0], [4, 5], [6, 0]]
    assert layout.count == 4
    assert np.array_equal(layout.real(), blocks != 0)
    assert np.array_equal(layout.join(blocks), weight)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((3, 3, 8, 16), -1),  # convolution, HWIO
        ((3, 3, 8, 16), 2),
        ((3, 3, 1, 16), -1),  # depthwise convolution
        ((24, 3, 8), -1),  # attention: [in, heads, head_dim]
        ((3, 8, 24), 1),
        ((50, 16), -1),  # embedding
        ((16,), 0),
    ],
)
def test_layouts_of_flax_weights_round_trip(shape, axis):
    weight = jnp.arange(float(np.prod(shape))).reshape(shape)
    layout = block_layout(shape, dim=8, axis=axis)
    blocks = layout.split(weight)
    assert blocks.shape == (layout.count, 8)
    assert np.array_equal(layout.join(blocks), weight)
    # A sub-vector is consecutive along its axis and constant in all other indices.
    steps = np.diff(np.asarray(blocks), axis=1)
    assert np.all(steps == np.prod(shape[axis % len(shape) + 1 :]))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_join_inverts_split(shape, dim, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    layout = block_layout(tuple(shape), dim, axis, pad=True)
    weight = jnp.arange(float(np.prod(shape))).reshape(shape)
    assert np.array_equal(layout.join(layout.split(weight)), weight)


def test_dimension_that_does_not_divide_names_the_leaf_and_the_ways_out():
    with pytest.raises(
        ValueError,
        match=r"leaf 'head/kernel' .*dim=8 does not divide axis 1 of length 10.*pad=True",
    ):
        block_layout((64, 10), dim=8, path="head/kernel")


@pytest.mark.parametrize("axis", [2, -3])
def test_missing_axis_is_named(axis):
    with pytest.raises(ValueError, match=f"leaf 'w' .* has no axis {axis}"):
        block_layout((4, 4), dim=2, axis=axis, path="w")


def test_empty_weight_is_named():
    with pytest.raises(ValueError, match="leaf 'w' .* is empty"):
        block_layout((0, 4), dim=2, path="w")
