import jax
import jax.numpy as jnp
import mobile_parity as parity
import numpy as np
import pytest
from references import randomised, reference, tensors_of

from ssvq_jax.models.import_mobilenet import import_mobilenet_v2
from ssvq_jax.models.inverted_residual import PYTORCH, TENSORFLOW
from ssvq_jax.models.mobilenet import CONFIGS, MobileNetV2, MobileNetV2Config

SMALL = MobileNetV2Config(width=0.35, classes=7)
CLOSE = 1e-4  # relative to the largest value


def transformers_reference(config):
    transformers = reference("transformers")
    tf = config.numerics.padding == "same"
    sizes = transformers.MobileNetV2Config(
        depth_multiplier=config.width,
        num_labels=config.classes,
        output_stride=config.output_stride,
        tf_padding=tf,
        layer_norm_eps=config.numerics.epsilon,
        classifier_dropout_prob=0.0,
    )
    return randomised(transformers.MobileNetV2ForImageClassification(sizes))


@pytest.mark.parametrize(
    ("numerics", "output_stride", "size", "train"),
    [
        pytest.param(TENSORFLOW, 32, (64, 64), False, marks=pytest.mark.slow),
        (TENSORFLOW, 32, (65, 47), True),
        pytest.param(TENSORFLOW, 32, (97, 96), True, marks=pytest.mark.slow),
        pytest.param(PYTORCH, 32, (65, 47), False, marks=pytest.mark.slow),
        pytest.param(TENSORFLOW, 32, (65, 47), False, marks=pytest.mark.slow),
        (PYTORCH, 8, (33, 64), False),
        pytest.param(PYTORCH, 8, (49, 64), False, marks=pytest.mark.slow),
        pytest.param(TENSORFLOW, 16, (33, 33), False, marks=pytest.mark.slow),
    ],
)
def test_equals_transformers(numerics, output_stride, size, train):
    config = MobileNetV2Config(
        width=0.35, classes=7, numerics=numerics, output_stride=output_stride
    )
    theirs, model = transformers_reference(config), MobileNetV2(config)
    variables = parity.imported(import_mobilenet_v2, theirs, model)
    images = parity.images_of(*size, batch=4 if train else 2)
    expected = parity.run_torch(theirs, images, train, output_hidden_states=True)
    logits, features = parity.forward(model, variables, images, train)
    assert parity.error(logits, expected.logits) < CLOSE
    # Theirs begin after the first stage, which is part of their stem.
    ends = np.cumsum([len(blocks) for blocks in config.stages])[1:] - 2
    for i, end in enumerate(ends, 1):
        assert parity.error(features[f"stage_{i}"][0], expected.hidden_states[end]) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv2_035", "mobilenetv2_140"])
@pytest.mark.parametrize("train", [False, True])
def test_equals_timm(name, train):
    timm = reference("timm")
    theirs, model = randomised(timm.create_model(name)), MobileNetV2(CONFIGS[name])
    variables = parity.imported(import_mobilenet_v2, theirs, model)
    images = parity.images_of(*((224, 224) if name == "mobilenetv2_100" else (161, 129)))
    logits, _ = parity.forward(model, variables, images, train)
    assert parity.error(logits, parity.run_torch(theirs, images, train)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("width", [1.0, 1.4])
def test_equals_torchvision(width):
    torchvision = reference("torchvision")
    theirs = randomised(torchvision.models.MobileNetV2(width_mult=width, dropout=0.0))
    model = MobileNetV2(MobileNetV2Config(width=width))
    variables = parity.imported(import_mobilenet_v2, theirs, model)
    for size in (128, 128), (161, 129):
        images = parity.images_of(*size)
        logits, _ = parity.forward(model, variables, images)
        assert parity.error(logits, parity.run_torch(theirs, images)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mobilenetv2_035", 1_677_128),
        ("mobilenetv2_050", 1_968_680),
        ("mobilenetv2_075", 2_636_424),
        ("mobilenetv2_100", 3_504_872),
        ("mobilenetv2_140", 6_108_776),
        ("tf_mobilenetv2_100", 3_504_872 + 1281),
    ],
)
def test_parameter_counts(name, parameters):
    assert parity.count(parity.shapes_of(MobileNetV2(CONFIGS[name]))) == parameters


def test_bfloat16_is_finite_and_ends_in_float32():
    model = MobileNetV2(SMALL, dtype=jnp.bfloat16)
    images = parity.images_of(33, 32)
    logits, _ = parity.forward(model, parity.drawn(model), images)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(parity.shapes_of(model))}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"classes": 0}, "classes=0"),
        ({"width": -1.0}, "width=-1.0"),
        ({"output_stride": 4}, "output_stride=4"),
    ],
)
def test_bad_sizes(bad, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2Config(**bad)


def test_importer_names_what_does_not_fit():
    model = MobileNetV2(SMALL)
    shapes = parity.shapes_of(model)
    tensors = tensors_of(transformers_reference(SMALL))
    run = lambda tensors: import_mobilenet_v2(tensors, shapes, SMALL, source="x.pth")  # noqa: E731
    name = "mobilenet_v2.layer.3.conv_3x3.convolution.weight"
    with pytest.raises(ValueError, match="no tensor fills.*blocks_2_1/depthwise/conv/kernel"):
        run({key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"no place for: extra\.weight"):
        run(tensors | {"extra.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=rf"other shapes: {name}"):
        run(tensors | {name: tensors[name][1:]})


def test_importer_keeps_a_new_head():
    model = MobileNetV2(SMALL)
    other = MobileNetV2Config(width=0.35, classes=11)
    fresh = jax.tree.map(lambda leaf: np.full(leaf.shape, 2, leaf.dtype), parity.shapes_of(model))
    tensors = tensors_of(transformers_reference(other))
    found = import_mobilenet_v2(tensors, fresh, SMALL, source="x.pth", keep=["classifier/.*"])
    assert (found["params"]["classifier"]["kernel"] == 2).all()
    np.testing.assert_array_equal(
        found["batch_stats"]["stem"]["bn"]["var"],
        tensors["mobilenet_v2.conv_stem.first_conv.normalization.running_var"],
    )
