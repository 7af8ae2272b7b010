import jax.numpy as jnp
import mobile_parity as parity
import numpy as np
import pytest
from references import randomised, reference, torch

from ssvq_jax.models.import_mobilenet import import_mobilenet_v3
from ssvq_jax.models.inverted_residual import BlockSpec
from ssvq_jax.models.mobilenet_v3 import CONFIGS, MobileNetV3, MobileNetV3Config

TORCHVISION = CONFIGS["torchvision_mobilenetv3_large_100"].numerics
SMALL = MobileNetV3Config(width=0.25, classes=7)
CLOSE = 1e-4  # relative to the largest value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "train"), [((224, 224), False), ((161, 129), False), ((161, 160), True)]
)
def test_equals_timm(size, train):
    timm = reference("timm")
    theirs = randomised(timm.create_model("mobilenetv3_large_100"))
    model = MobileNetV3(CONFIGS["mobilenetv3_large_100"])
    variables = parity.imported(import_mobilenet_v3, theirs, model)
    images = parity.images_of(*size)
    logits, features = parity.forward(model, variables, images, train)
    assert parity.error(logits, parity.run_torch(theirs, images, train)) < CLOSE
    if train:
        return
    with torch.no_grad():
        x = theirs.bn1(theirs.conv_stem(parity.nchw(images)))
        for i, stage in enumerate(theirs.blocks[:-1]):
            x = stage(x)
            assert parity.error(features[f"stage_{i}"][0], x) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("train", [False, True])
def test_equals_torchvision(width, train):
    torchvision = reference("torchvision")
    make = torchvision.models.mobilenet_v3_large
    theirs = randomised(make(width_mult=width, dropout=0.0))
    model = MobileNetV3(MobileNetV3Config(width=width, numerics=TORCHVISION))
    variables = parity.imported(import_mobilenet_v3, theirs, model)
    images = parity.images_of(161, 128)
    logits, _ = parity.forward(model, variables, images, train)
    assert parity.error(logits, parity.run_torch(theirs, images, train)) < CLOSE


def test_parameter_count():
    assert parity.count(parity.shapes_of(MobileNetV3(MobileNetV3Config()))) == 5_483_032


def test_blocks_are_of_the_papers_table():
    stages = MobileNetV3Config().stages
    assert [len(blocks) for blocks in stages] == [1, 2, 3, 4, 2, 3]
    assert stages[0] == (BlockSpec(16, 16, 16, activation="relu"),)
    assert stages[2][0] == BlockSpec(24, 72, 40, 5, 2, squeeze=24, activation="relu")
    assert stages[5][2] == BlockSpec(160, 960, 160, 5, squeeze=240, activation="hard_swish")


def test_bfloat16_is_finite_and_ends_in_float32():
    model = MobileNetV3(SMALL, dtype=jnp.bfloat16)
    logits, _ = parity.forward(model, parity.drawn(model), parity.images_of(33, 32))
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("bad", [{"classes": 0}, {"width": 0.0}])
def test_bad_sizes(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        MobileNetV3Config(**bad)


def test_importer_names_what_does_not_fit():
    shapes = parity.shapes_of(MobileNetV3(SMALL))
    with pytest.raises(ValueError, match=r"no place for: conv_stem\.bias; leaves.*blocks_0_0"):
        import_mobilenet_v3({"conv_stem.bias": np.zeros(16)}, shapes, SMALL, source="x.pth")
    stem = {"conv_stem.weight": np.zeros((16, 4, 3, 3))}
    with pytest.raises(ValueError, match=r"other shapes: conv_stem\.weight"):
        import_mobilenet_v3(stem, shapes, SMALL, source="x.pth")
