import jax.numpy as jnp
import mobile_parity as parity
import numpy as np
import pytest
import torch.nn.functional as F  # noqa: N812
from references import randomised, reference, tensors_of

from ssvq_jax.models.deeplab import CONFIGS, DeepLab, DeepLabConfig, resize_bilinear
from ssvq_jax.models.import_deeplab import import_deeplab
from ssvq_jax.models.inverted_residual import PYTORCH

SMALL = DeepLabConfig(width=0.35, classes=5)
PLUS = DeepLabConfig(width=0.35, classes=5, head="v3plus", features=16, backbone_numerics=PYTORCH)
CLOSE = 1e-4  # relative to the largest value


def transformers_reference(config):
    transformers = reference("transformers")
    sizes = transformers.MobileNetV2Config(
        depth_multiplier=config.width,
        num_labels=config.classes,
        output_stride=config.output_stride,
        classifier_dropout_prob=0.0,
    )
    return randomised(transformers.MobileNetV2ForSemanticSegmentation(sizes))


@pytest.mark.parametrize(
    ("output_stride", "size", "train"),
    [
        pytest.param(16, (64, 64), False, marks=pytest.mark.slow),
        (16, (65, 49), True),
        pytest.param(8, (65, 49), False, marks=pytest.mark.slow),
    ],
)
def test_v3_equals_transformers(output_stride, size, train):
    config = DeepLabConfig(width=0.35, classes=5, output_stride=output_stride)
    theirs, model = transformers_reference(config), DeepLab(config)
    variables = parity.imported(import_deeplab, theirs, model)
    images = parity.images_of(*size, batch=4 if train else 2)
    expected = parity.run_torch(theirs, images, train, output_hidden_states=True)
    logits, features = parity.forward(model, variables, images, train)
    assert parity.error(features["coarse"][0], expected.logits) < CLOSE
    last = features["backbone"]["stage_6"][0]
    assert parity.error(last, expected.hidden_states[-1]) < CLOSE
    # As transformers itself does for its loss.
    enlarged = F.interpolate(expected.logits, size=size, mode="bilinear", align_corners=False)
    assert parity.error(logits, enlarged) < CLOSE


@pytest.mark.slow
def test_named_v3_equals_transformers():
    config = CONFIGS["deeplabv3_mobilenetv2_os8"]
    theirs, model = transformers_reference(config), DeepLab(config)
    variables = parity.imported(import_deeplab, theirs, model)
    images = parity.images_of(257, 257, batch=1)
    _, features = parity.forward(model, variables, images)
    expected = parity.run_torch(theirs, images)
    assert parity.error(features["coarse"][0], expected.logits) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output_stride", "size", "train"),
    [(16, (192, 128), False), (16, (192, 128), True), (8, (128, 192), False)],
)
def test_v3plus_equals_segmentation_models(output_stride, size, train):
    smp = reference("segmentation_models_pytorch")
    theirs = smp.DeepLabV3Plus(
        "mobilenet_v2",
        encoder_weights=None,
        encoder_output_stride=output_stride,
        decoder_aspp_dropout=0.0,
        classes=21,
    )
    theirs = randomised(theirs)
    config = DeepLabConfig(head="v3plus", output_stride=output_stride, backbone_numerics=PYTORCH)
    variables = parity.imported(import_deeplab, theirs, model := DeepLab(config))
    images = parity.images_of(*size, batch=4 if train else 2)
    logits, _ = parity.forward(model, variables, images, train)
    assert parity.error(logits, parity.run_torch(theirs, images, train)) < CLOSE


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("old", [(1, 1), (1, 4), (3, 5)])
@pytest.mark.parametrize("new", [(4, 4), (9, 31)])
def test_resize_equals_pytorch(align_corners, old, new):
    x = np.random.default_rng(0).normal(size=(2, *old, 3)).astype("float32")
    expected = F.interpolate(parity.nchw(x), size=new, mode="bilinear", align_corners=align_corners)
    assert parity.error(resize_bilinear(jnp.asarray(x), *new, align_corners), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # transformers' less its backbone's last convolution, which its head does not read
        ("deeplabv3_mobilenetv2", 2_525_717 - 412_160),
        ("deeplabv3plus_mobilenetv2", 4_383_653),
    ],
)
def test_parameter_counts(name, parameters):
    assert parity.count(parity.shapes_of(DeepLab(CONFIGS[name]))) == parameters


@pytest.mark.parametrize("config", [SMALL, PLUS])
def test_bfloat16_is_finite_for_all_pixels(config):
    model = DeepLab(config, dtype=jnp.bfloat16)
    logits, _ = parity.forward(model, parity.drawn(model), parity.images_of(33, 47))
    assert logits.dtype == jnp.float32
    assert logits.shape == (2, 33, 47, 5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "bad", [{"classes": 0}, {"width": 0.0}, {"head": "v4"}, {"output_stride": 32}]
)
@pytest.mark.usefixtures("as_installed")
def test_bad_sizes(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}='?{value}"):
        DeepLabConfig(**bad)


def test_importer_names_what_does_not_fit():
    shapes = parity.shapes_of(DeepLab(SMALL))
    tensors = tensors_of(transformers_reference(SMALL))
    run = lambda tensors: import_deeplab(tensors, shapes, SMALL, source="x.pth")  # noqa: E731
    name = "segmentation_head.conv_pool.convolution.weight"
    with pytest.raises(ValueError, match="no tensor fills.*head/pool/conv/kernel"):
        run({key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"no place for: decoder\.extra"):
        run(tensors | {"decoder.extra": np.zeros(3)})
    with pytest.raises(ValueError, match=f"other shapes: {name}"):
        run(tensors | {name: tensors[name][1:]})
