"""ResNet against transformers', timm's and torchvision's, and what its importer refuses."""

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

from ssvq_jax.models.import_resnet import import_resnet
from ssvq_jax.models.resnet import CONFIGS, ResNet, ResNetConfig

torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
transformers = pytest.importorskip("transformers", reason=WITHOUT_TORCH)

BASIC = ResNetConfig(image_size=64, width=8, depths=(2, 1, 2), classes=7)
BOTTLENECK = ResNetConfig(image_size=64, width=8, depths=(1, 2), bottleneck=True, classes=7)
SMALL = ResNetConfig(image_size=32, width=8, depths=(1, 2), classes=7, small=True)


def transformers_resnet(config):
    expansion = 4 if config.bottleneck else 1
    sizes = transformers.ResNetConfig(
        embedding_size=config.width, depths=list(config.depths), num_labels=config.classes,
        hidden_sizes=[config.width * 2**i * expansion for i in range(len(config.depths))],
        layer_type="bottleneck" if config.bottleneck else "basic",
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(sizes)
    if config.small:
        stem = model.resnet.embedder
        stem.embedder.convolution = torch.nn.Conv2d(3, config.width, 3, 2, 1, bias=False)
        stem.pooler = torch.nn.Identity()
    return randomised(model)


@pytest.mark.parametrize("config", [BASIC, BOTTLENECK, SMALL])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 61)])
@pytest.mark.parametrize("train", [False, True])
def test_transformers(config, height, width, train):
    theirs, ours = transformers_resnet(config), ResNet(config)
    images = images_for(4, height, width)
    variables = import_resnet(tensors_of(theirs), shapes_of(ours, images), config, source="random")
    stages = theirs.resnet.encoder.stages
    expected, features = outputs_of(theirs.train(train), images, *stages)
    found, state = run(ours, variables, images, train=train)
    assert worst_error(found, expected) <= 1e-4
    for i, stage in enumerate(features):
        assert worst_error(state["intermediates"][f"stage_{i}"][0], stage) <= 1e-4


def test_running_statistics():
    theirs, ours = transformers_resnet(BASIC), ResNet(BASIC)
    images = images_for(4, 64, 64)
    variables = import_resnet(tensors_of(theirs), shapes_of(ours, images), BASIC, source="random")
    before = variables["batch_stats"]["bn1"]
    outputs_of(theirs.train(), images)
    expected = theirs.resnet.embedder.embedder.normalization
    _, state = run(ours, variables, images, train=True)
    found = state["batch_stats"]["bn1"]
    np.testing.assert_allclose(found["mean"], expected.running_mean.numpy(), atol=1e-5)
    # Flax takes the biased variance of the n values, PyTorch the unbiased.
    n = 4 * 32 * 32
    unbiased = 0.9 * before["var"] + (found["var"] - 0.9 * before["var"]) * n / (n - 1)
    np.testing.assert_allclose(unbiased, expected.running_var.numpy(), rtol=1e-5)


TINY = ResNetConfig(image_size=32, width=8, depths=(1, 1), classes=7)


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_recomputed_blocks_give_the_same_gradients(train):
    images = images_for(2, 32, 32)
    variables = jax.jit(ResNet(TINY).init)(jax.random.key(0), images)
    kept, again = (
        gradients(ResNet(TINY, remat=remat), variables, images, train=train)
        for remat in (False, True)
    )
    chex.assert_trees_all_close(kept, again, atol=1e-5)


def test_bfloat16_activations():
    assert bfloat16_error(partial(ResNet, TINY), images_for(2, 32, 32)) <= 0.05


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_parameter_counts(name, count):
    shapes = shapes_of(ResNet(CONFIGS[name]), images_for(1, 224, 224))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize(
    ("sizes", "message"), [({"classes": 0}, "classes=0"), ({"depths": (2, 0)}, r"depths=\(2, 0\)")]
)
def test_bad_settings_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**sizes)


NAME = "resnet.encoder.stages.1.layers.0.layer.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {name: y for name, y in x.items() if name != f"{NAME}.convolution.weight"},
            "no tensor fills: params/layer2_0/conv1/kernel",
        ),
        (lambda x: x | {"fc2.bias": np.ones(7)}, "no place for: fc2.bias"),
        (
            lambda x: x | {f"{NAME}.normalization.running_var": np.ones(9)},
            rf"{NAME}.normalization.running_var \[9\] for leaf 'batch_stats/layer2_0/bn1/var' \[16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    shapes = shapes_of(ResNet(BASIC), images_for(1, 64, 64))
    with pytest.raises(ValueError, match=message):
        import_resnet(change(tensors_of(transformers_resnet(BASIC))), shapes, BASIC, source="x")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_timm_and_torchvision(name, package):
    make = getattr(reference(package), "create_model", None) or reference(package).models.get_model
    theirs, ours = randomised(make(name)), ResNet(CONFIGS[name])
    stages = [getattr(theirs, f"layer{i}") for i in range(1, 5)]
    for height, width in ((224, 224), (139, 97)):
        images = images_for(2, height, width)
        shapes = shapes_of(ours, images)
        variables = import_resnet(tensors_of(theirs), shapes, CONFIGS[name], source=name)
        expected, features = outputs_of(theirs, images, *stages)
        found, state = run(ours, variables, images)
        assert worst_error(found, expected) <= 1e-4
        for i, stage in enumerate(features):
            assert worst_error(state["intermediates"][f"stage_{i}"][0], stage) <= 1e-4
