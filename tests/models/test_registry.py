import jax
import numpy as np
import pytest

from ssvq_jax import load_recipe, make_plan
from ssvq_jax.data import normalization_preset
from ssvq_jax.models import (
    REGISTRY,
    create,
    import_weights,
    input_shapes,
    load_model,
    param_shapes,
    variable_shapes,
)
from ssvq_jax.models.variables import paths_of

# Of the papers and of timm, torchvision and transformers.
COUNTS = {
    "deit_tiny": 5_717_416,
    "deit_tiny_distilled": 5_910_800,
    "swin_tiny": 28_288_354,
    "convnext_tiny": 28_589_128,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenetv2_100": 3_504_872,
    "mobilenetv3_large_100": 5_483_032,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite4": 13_006_568,
    "smollm2_135m": 134_515_008,
    "llama3_2_1b": 1_235_814_400,
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameter_counts(name):
    shapes = param_shapes(create(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_every_recipe_of_inputs_is_one_that_data_knows():
    for name, found in REGISTRY.items():
        if found.inputs is not None:
            channels = found.config.channels
            assert normalization_preset(found.inputs.normalization, channels), name
            assert 0.8 < found.inputs.crop_share <= 1
        else:
            assert found.task == "language" or name in (
                "deit_cifar",
                "vit_cifar",
                "resnet20_cifar",
                "deit_digits",
            )


def test_classes_and_options():
    assert create("resnet18", num_classes=7).config.classes == 7
    assert create("convnext_tiny", scan=True, remat=True).scan
    assert input_shapes(create("efficientnet_lite2"), 3).shape == (3, 260, 260, 3)
    assert input_shapes(create("smollm2_135m")).dtype == np.int32
    assert "batch_stats" in variable_shapes(create("mobilenetv2_035"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create("resnet"), "model 'resnet' is unknown: choose one of .*nearest: resnet"),
        (lambda: create("nothing at all"), "model 'nothing at all' is unknown: choose one of"),
        (lambda: create("resnet18", scan=True), "scan: model 'resnet18' has none"),
        (lambda: create("efficientnet_lite0", remat=True), "remat: model 'efficientnet_lite0' has"),
        (lambda: create("smollm2_135m", num_classes=3), "model 'smollm2_135m' predicts tokens"),
        (
            lambda: load_model("smollm2_135m"),
            "'smollm2_135m' is for language, and this needs",
        ),
        (lambda: load_model("deeplabv3_mobilenetv2"), "is for segmentation"),
    ],
)
def test_bad_names_and_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def timm_names(shapes):
    """A state dict of ResNet-18 in torchvision's names, from our own shapes."""
    tensors = {}
    for path, leaf in paths_of(shapes).items():
        collection, *_, last = path.split("/")
        name = path.removeprefix(f"{collection}/").rsplit("/", 1)[0]
        name = name.replace("_", ".", 1) if "layer" in name else name
        name = name.replace("/downsample_conv", ".downsample.0").replace(
            "/downsample_bn", ".downsample.1"
        )
        name = name.replace("/", ".").replace("head", "fc")
        kind = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(leaf.shape))
        tensor = np.full(leaf.shape, len(tensors) + 1, np.float32)
        tensors[f"{name}.{kind.get(last, last)}"] = tensor.transpose(axes) if axes else tensor
    return tensors


def test_a_new_head_keeps_its_own_values_and_takes_all_others():
    tensors = timm_names(variable_shapes(create("resnet18")))
    model = create("resnet18", num_classes=3)
    with pytest.raises(ValueError, match=r"fc.weight \[1000, 512\] for leaf 'params/head/kernel'"):
        import_weights("resnet18", tensors, variable_shapes(model), source="file")
    own = jax.tree.map(lambda x: np.full(x.shape, -1, x.dtype), variable_shapes(model))
    found = import_weights("resnet18", tensors, own, source="file", new_head=True)
    assert np.all(found["params"]["head"]["kernel"] == -1)
    assert np.all(found["params"]["conv1"]["kernel"] > 0)
    assert np.all(found["batch_stats"]["bn1"]["mean"] > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("layer1.0.conv1.weight"), "leaves that no tensor fills: params/layer1_0"),
        (lambda x: x.update(extra=np.zeros(3)), "tensors that the model has no place for: extra"),
        (
            lambda x: x.update({"conv1.weight": np.zeros((64, 3, 3, 3), np.float32)}),
            r"tensors of other shapes: conv1.weight \[64, 3, 3, 3\] for leaf 'params/conv1/kernel'",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors = timm_names(variable_shapes(create("resnet18")))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        import_weights("resnet18", tensors, variable_shapes(create("resnet18")), source="file")


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_100", "efficientnet_lite0", "convnext_tiny"]
)
def test_convolutional_recipes_bind(name):
    shapes = param_shapes(create(name))
    bits = make_plan(shapes, load_recipe("ssvq-21x-conv")).bits()
    assert 1.5 < bits.main.bits_per_weight < 1.65
    depthwise = [
        row for row in bits.rows if "depthwise" in row.name and row.name.endswith("kernel")
    ]
    assert all(row.method == "uniform" for row in depthwise)
