"""Blocks against PyTorch's functions, for what no network of transformers has."""

import jax
import jax.numpy as jnp
import mobile_parity as parity
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from ssvq_jax.models.inverted_residual import (
    PYTORCH,
    TENSORFLOW,
    BlockSpec,
    InvertedResidual,
    Stage,
    make_divisible,
    scaled_blocks,
)


def theirs(x, weights, spec, numerics):
    """The block in PyTorch, from the Flax variables."""

    def conv_norm(x, name, activate, groups=1):
        p, stats = weights["params"][name], weights["batch_stats"][name]["bn"]
        kernel = torch_of(p["conv"]["kernel"].transpose(3, 2, 0, 1))
        if name == "depthwise":
            if numerics.padding == "same":
                x = pad_same(x, spec.kernel, spec.stride)
                x = F.conv2d(x, kernel, stride=spec.stride, groups=groups)
            else:
                x = F.conv2d(x, kernel, None, spec.stride, spec.kernel // 2, groups=groups)
        else:
            x = F.conv2d(x, kernel)
        x = F.batch_norm(
            x,
            *map(torch_of, (stats["mean"], stats["var"], p["bn"]["scale"], p["bn"]["bias"])),
            eps=numerics.epsilon,
        )
        return (
            {"relu": F.relu, "relu6": F.relu6, "hard_swish": F.hardswish}[activate](x)
            if activate
            else x
        )

    y = conv_norm(x, "expand", spec.activation) if spec.expands else x
    y = conv_norm(y, "depthwise", spec.activation, groups=spec.hidden)
    if spec.squeeze:
        se = jax.tree.map(torch_of, weights["params"]["se"])
        hidden = F.relu(y.mean((2, 3)) @ se["reduce"]["kernel"] + se["reduce"]["bias"])
        gate = F.hardsigmoid(hidden @ se["expand"]["kernel"] + se["expand"]["bias"])
        y = y * gate[:, :, None, None]
    y = conv_norm(y, "project", None)
    return x + y if x.shape == y.shape else y


def pad_same(x, kernel, stride):
    """TensorFlow's rule: outputs are inputs over stride, rounded up."""
    needed = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
    (top, left) = (n // 2 for n in needed)
    return F.pad(x, (left, needed[1] - left, top, needed[0] - top))


def torch_of(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize(
    "spec",
    [
        BlockSpec(8, 8, 16),
        BlockSpec(8, 48, 8, kernel=5),
        BlockSpec(8, 24, 16, kernel=5, stride=2),
        BlockSpec(8, 24, 8, kernel=5, squeeze=16, activation="hard_swish"),
        BlockSpec(8, 24, 16, stride=2, squeeze=8, activation="relu"),
    ],
)
@pytest.mark.parametrize("numerics", [PYTORCH, TENSORFLOW])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_block_equals_pytorch(spec, numerics, size):
    block = InvertedResidual(spec, numerics)
    x = np.random.default_rng(2).normal(size=(2, *size, 8)).astype("float32")
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, False), x)
    draw = np.random.default_rng(3)
    weights = jax.tree.map(lambda leaf: draw.uniform(0.2, 1, leaf.shape).astype("float32"), shapes)
    signs = jax.tree.map(lambda leaf: draw.choice([-1, 1], leaf.shape), shapes["params"])
    weights["params"] = jax.tree.map(lambda x, s: x * s.astype("float32"), weights["params"], signs)
    ours = jax.jit(lambda weights, x: block.apply(weights, x, False))(weights, x)
    assert parity.error(ours, theirs(parity.nchw(x), weights, spec, numerics)) < 1e-5


def test_only_the_first_block_of_a_stage_strides():
    (blocks,) = scaled_blocks([Stage(6, 24, 3, 2, kernel=5)], 16, 0.5)
    assert blocks == (
        BlockSpec(16, 96, 16, kernel=5, stride=2),
        BlockSpec(16, 96, 16, kernel=5),
        BlockSpec(16, 96, 16, kernel=5),
    )


def test_channels_are_multiples_of_eight_and_lose_at_most_a_tenth():
    for channels in np.arange(1, 400) / 3:
        rounded = make_divisible(channels)
        assert rounded % 8 == 0
        assert 0.9 * channels <= rounded <= max(8, channels + 8)


def test_bfloat16_keeps_its_dtype():
    block = InvertedResidual(BlockSpec(8, 16, 8, squeeze=8), TENSORFLOW, jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
    y, _ = block.init_with_output(jax.random.key(0), x, True)
    assert y.dtype == jnp.bfloat16
