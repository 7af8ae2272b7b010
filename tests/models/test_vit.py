import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax.models import REGISTRY, ViT, ViTConfig, create, param_shapes
from ssvq_jax.tree import leaves_by_path

SMALL = ViTConfig(image_size=8, channels=2, patch_size=4, width=12, depth=2, heads=3, classes=5)


@pytest.mark.parametrize(
    ("name", "count"),
    # DeiT's published sizes: 5.7, 22.1 and 86.6 million
    [("deit_tiny", 5_717_416), ("deit_small", 22_050_664), ("deit_base", 86_567_656)],
)
def test_parameter_counts(name, count):
    shapes = param_shapes(create(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_leaf_paths():
    paths = set(leaves_by_path(param_shapes(create("deit_tiny"))))
    assert {
        "patch_embed/kernel",
        "cls_token",
        "pos_embed",
        "blocks_0/norm1/scale",
        "blocks_11/attn/qkv/kernel",
        "blocks_11/attn/proj/bias",
        "blocks_3/mlp/fc1/kernel",
        "norm/bias",
        "head/kernel",
    } <= paths
    assert len(paths) == 4 + 12 * 12 + 4


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def test_forward_equals_the_equations():
    model = ViT(SMALL)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    random = np.random.default_rng(2)
    noise = lambda x: np.asarray(x) + 0.1 * random.normal(size=x.shape).astype("float32")  # noqa: E731
    params = jax.tree.map(noise, params)
    p = jax.tree.map(np.float64, params)
    # Patches: row by row, each flattened as height, width, channel.
    x = np.float64(images).reshape(3, 2, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 4, 32)
    x = x @ p["patch_embed"]["kernel"].reshape(32, 12) + p["patch_embed"]["bias"]
    x = np.concatenate([np.broadcast_to(p["cls_token"], (3, 1, 12)), x], axis=1) + p["pos_embed"]
    for i in range(2):
        block = p[f"blocks_{i}"]
        q, k, v = np.split(dense(norm(x, block["norm1"]), block["attn"]["qkv"]), 3, axis=-1)
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            scores = q[..., part] @ k[..., part].transpose(0, 2, 1) / 2.0  # sqrt(4)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            heads.append(weights @ v[..., part])
        x = x + dense(np.concatenate(heads, -1), block["attn"]["proj"])
        hidden = dense(norm(x, block["norm2"]), block["mlp"]["fc1"])
        hidden = hidden * np.float64(jax.scipy.stats.norm.cdf(hidden))  # exact GELU
        x = x + dense(hidden, block["mlp"]["fc2"])
    logits = dense(norm(x, p["norm"])[:, 0], p["head"])
    found = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(found, logits, atol=1e-4)


def test_bfloat16_activations_keep_float32_parameters_and_logits():
    model = ViT(SMALL, dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
    with jax.numpy_dtype_promotion("standard"):
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]
        logits = jax.jit(model.apply)({"params": params}, images)
        exact = jax.jit(ViT(SMALL).apply)({"params": params}, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.05)


def test_classes_can_be_chosen():
    assert create("deit_tiny", num_classes=7).config.classes == 7
    assert "deit_digits" in REGISTRY


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create("deit"), "model 'deit' is unknown: choose one of .*nearest: deit_"),
        (lambda: ViTConfig(patch_size=15), "patch_size=15 does not divide image_size=224"),
        (lambda: ViTConfig(heads=5), "heads=5 does not divide width=192"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stem_halves_the_image_before_it_is_cut_into_patches():
    sizes = {"image_size": 16, "width": 8, "depth": 1, "heads": 2, "classes": 3}
    model = ViT(ViTConfig(patch_size=8, stem=(4, 6), **sizes))
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), "float32")
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    params = variables["params"]
    assert logits.shape == (2, 3)
    assert params["stem_0"]["kernel"].shape == (3, 3, 3, 4)
    assert params["stem_1"]["kernel"].shape == (3, 3, 4, 6)
    assert params["patch_embed"]["kernel"].shape == (2, 2, 6, 8)  # of 4 x 4 features
    assert params["pos_embed"].shape == (1, 1 + 4, 8)
    with pytest.raises(ValueError, match="patch_size=4 is not 3 times even"):
        ViTConfig(patch_size=4, stem=(4, 4, 4), **sizes)
