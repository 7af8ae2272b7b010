"""ViT and DeiT against transformers' and timm's, and what their importer refuses."""

import dataclasses
from functools import partial

import chex
import jax
import numpy as np
import pytest
from references import (
    WITHOUT_TORCH,
    bfloat16_error,
    gradients,
    images_for,
    outputs_of,
    randomised,
    reference,
    run,
    shapes_of,
    tensors_of,
    worst_error,
)

from ssvq_jax.models.import_deit import import_deit
from ssvq_jax.models.vit import ViT, ViTConfig
from ssvq_jax.models.weights import load_tensors

transformers = pytest.importorskip("transformers", reason=WITHOUT_TORCH)

SMALL = ViTConfig(image_size=32, patch_size=8, width=24, depth=3, heads=3, classes=7)
DISTILLED = dataclasses.replace(SMALL, distilled=True)
SIZES = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 3, "intermediate_size": 96, "num_labels": 7, "layer_norm_eps": 1e-6,
}  # fmt: skip
IMAGES = images_for(2, 32, 32)


def vit():
    return randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)))


def teacher():
    config = transformers.DeiTConfig(**SIZES)
    return randomised(transformers.DeiTForImageClassificationWithTeacher(config))


def one_head():
    return randomised(transformers.DeiTForImageClassification(transformers.DeiTConfig(**SIZES)))


@pytest.mark.parametrize(
    ("make", "config"), [(vit, SMALL), (teacher, DISTILLED), (one_head, DISTILLED)]
)
@pytest.mark.parametrize("scan", [False, True])
def test_transformers(make, config, scan):
    theirs, ours = make(), ViT(config, scan=scan)
    variables = import_deit(tensors_of(theirs), shapes_of(ours, IMAGES), source="random")
    expected, _ = outputs_of(theirs, IMAGES)
    found, _ = run(ours, variables, IMAGES)
    assert worst_error(found, expected) <= 1e-4


def test_features_and_both_heads():
    theirs, ours = teacher(), ViT(DISTILLED)
    variables = import_deit(tensors_of(theirs), shapes_of(ours, IMAGES), source="random")
    heads = [theirs.cls_classifier, theirs.distillation_classifier]
    _, expected = outputs_of(theirs, IMAGES, *theirs.deit.layers, *heads)
    _, state = run(ours, variables, IMAGES)
    names = ["block_0", "block_1", "block_2", "class_logits", "distillation_logits"]
    for name, features in zip(names, expected, strict=True):
        assert worst_error(state["intermediates"][name][0], features) <= 1e-4


def test_names_in_files(tmp_path):
    theirs = teacher()
    theirs.save_pretrained(tmp_path)
    tensors = load_tensors(tmp_path / "model.safetensors")
    assert "deit.encoder.layer.2.attention.attention.query.weight" in tensors
    shapes = shapes_of(ViT(DISTILLED), IMAGES)
    from_file = import_deit(tensors, shapes, source="model.safetensors")
    in_memory = import_deit(tensors_of(theirs), shapes, source="random")
    chex.assert_trees_all_equal(from_file, in_memory)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_recomputed_blocks_give_the_same_gradients(scan):
    variables = jax.jit(ViT(SMALL, scan=scan).init)(jax.random.key(0), IMAGES)
    kept, again = (
        gradients(ViT(SMALL, scan=scan, remat=remat), variables, IMAGES) for remat in (False, True)
    )
    chex.assert_trees_all_close(kept, again, atol=1e-5)


def test_bfloat16_activations():
    assert bfloat16_error(partial(ViT, DISTILLED), IMAGES) <= 0.05


def test_a_new_head():
    ours = ViT(dataclasses.replace(SMALL, classes=3))
    variables = jax.jit(ours.init)(jax.random.key(0), IMAGES)
    found = import_deit(tensors_of(vit()), variables, source="random", keep=["head/.*"])
    assert found["params"]["head"]["kernel"] is variables["params"]["head"]["kernel"]


def lacking(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking("vit.layernorm.bias"), "no tensor fills: params/norm/bias"),
        (
            lacking("vit.layers.1.attention.k_proj.bias"),
            r"lacks \['vit.layers.1.attention.k_proj.bias'\]",
        ),
        (lambda x: x | {"vit.pooler.weight": np.ones(2)}, "no place for: vit.pooler.weight"),
        (
            lambda x: x | {"vit.layers.7.mlp.fc1.bias": np.ones(96)},
            "no place for: vit.layers.7.mlp.fc1.bias",
        ),
        (
            lambda x: x | {"classifier.bias": np.ones(5)},
            r"classifier.bias \[5\] for leaf 'params/head/bias' \[7\]",
        ),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_weights_that_do_not_fit_are_named(change, message, scan):
    shapes = shapes_of(ViT(SMALL, scan=scan), IMAGES)
    with pytest.raises(ValueError, match=message):
        import_deit(change(tensors_of(vit())), shapes, source="changed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "distilled", "count"),
    [
        ("deit_tiny_patch16_224", False, 5_717_416),
        ("deit_tiny_distilled_patch16_224", True, 5_910_800),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_timm(name, distilled, count, scan):
    theirs = randomised(reference("timm").create_model(name))
    assert sum(x.numel() for x in theirs.parameters()) == count
    images = images_for(2, 224, 224)
    ours = ViT(ViTConfig(distilled=distilled), scan=scan)
    shapes = shapes_of(ours, images)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    variables = import_deit(tensors_of(theirs), shapes, source=name)
    expected, features = outputs_of(theirs, images, theirs.blocks[11])
    found, state = run(ours, variables, images)
    assert worst_error(found, expected) <= 1e-4
    if not scan:
        assert worst_error(state["intermediates"]["block_11"][0], features[0]) <= 1e-4
