"""ConvNeXt against transformers', timm's and torchvision's, and what its importer refuses."""

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

from ssvq_jax.models.convnext import CONFIGS, ConvNeXt, ConvNeXtConfig
from ssvq_jax.models.import_convnext import import_convnext

transformers = pytest.importorskip("transformers", reason=WITHOUT_TORCH)

SMALL = ConvNeXtConfig(image_size=64, widths=(8, 12, 16), depths=(2, 1, 3), classes=7)


def transformers_convnext():
    sizes = transformers.ConvNextConfig(
        hidden_sizes=[8, 12, 16], depths=[2, 1, 3], num_stages=3, num_labels=7, layer_norm_eps=1e-6
    )
    return randomised(transformers.ConvNextForImageClassification(sizes))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 61)])
def test_transformers(height, width, scan):
    theirs, ours = transformers_convnext(), ConvNeXt(SMALL, scan=scan)
    images = images_for(2, height, width)
    shapes = shapes_of(ours, images)
    variables = import_convnext(tensors_of(theirs), shapes, SMALL, source="random")
    expected, features = outputs_of(theirs, images, *theirs.convnext.encoder.stages)
    found, state = run(ours, variables, images)
    assert worst_error(found, expected) <= 1e-4
    for i, stage in enumerate(features):
        assert worst_error(state["intermediates"][f"stage_{i}"][0], stage) <= 1e-4


TINY = ConvNeXtConfig(image_size=32, widths=(8, 12), depths=(1, 2), classes=7)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_recomputed_blocks_give_the_same_gradients(scan):
    images = images_for(2, 32, 32)
    variables = jax.jit(ConvNeXt(TINY, scan=scan).init)(jax.random.key(0), images)
    kept, again = (
        gradients(ConvNeXt(TINY, scan=scan, remat=remat), variables, images)
        for remat in (False, True)
    )
    chex.assert_trees_all_close(kept, again, atol=1e-5)


def test_bfloat16_activations():
    assert bfloat16_error(partial(ConvNeXt, TINY), images_for(2, 32, 32)) <= 0.05


def test_parameter_count():
    shapes = shapes_of(ConvNeXt(CONFIGS["convnext_tiny"]), images_for(1, 224, 224))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 28_589_128


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"classes": 0}, "classes=0"),
        ({"depths": (3, 0, 3, 3)}, r"depths=\(3, 0, 3, 3\)"),
        ({"depths": (3, 3)}, r"depths=\(3, 3\) are of 2 stages, widths=.* of 4"),
    ],
)
def test_bad_settings_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXtConfig(**sizes)


NAME = "convnext.encoder.stages.2.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {name: y for name, y in x.items() if name != f"{NAME}.dwconv.weight"},
            "no tensor fills: params/stages_2/blocks_1/conv_dw/kernel",
        ),
        (lambda x: x | {"fc2.bias": np.ones(7)}, "no place for: fc2.bias"),
        (
            lambda x: x | {f"{NAME}.layer_scale_parameter": np.ones(9)},
            rf"{NAME}.layer_scale_parameter \[9\] for leaf 'params/stages_2/blocks_1/gamma' \[16\]",
        ),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_weights_that_do_not_fit_are_named(change, message, scan):
    shapes = shapes_of(ConvNeXt(SMALL, scan=scan), images_for(1, 64, 64))
    with pytest.raises(ValueError, match=message):
        import_convnext(change(tensors_of(transformers_convnext())), shapes, SMALL, source="x")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torchvision"])
@pytest.mark.parametrize("scan", [False, True])
def test_timm_and_torchvision(package, scan):
    if package == "timm":
        theirs = randomised(reference("timm").create_model("convnext_tiny"))
        stages = list(theirs.stages)
    else:
        theirs = randomised(reference("torchvision").models.convnext_tiny())
        stages = [theirs.features[i] for i in (1, 3, 5, 7)]
    config = CONFIGS["convnext_tiny"]
    ours = ConvNeXt(config, scan=scan)
    for height, width in ((224, 224), (139, 97)):
        images = images_for(2, height, width)
        shapes = shapes_of(ours, images)
        variables = import_convnext(tensors_of(theirs), shapes, config, source=package)
        expected, features = outputs_of(theirs, images, *stages)
        found, state = run(ours, variables, images)
        assert worst_error(found, expected) <= 1e-4
        for i, stage in enumerate(features):
            assert worst_error(state["intermediates"][f"stage_{i}"][0], stage) <= 1e-4
