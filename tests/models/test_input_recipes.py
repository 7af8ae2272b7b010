"""Recipes of inputs are the references', and so are the pixels of photographs, to rounding."""

import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from ssvq_jax.cli.evaluate_images import judge_images
from ssvq_jax.cli.weights import Weights
from ssvq_jax.data import CenterCrop, ImageData, normalization_preset
from ssvq_jax.models import REGISTRY, LoadedModel

CLOSE = 1e-6  # of pixels between -2.2 and 2.7

TIMM = {
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224.fb_in1k",
    "deit_small_distilled": "deit_small_distilled_patch16_224.fb_in1k",
    "deit_base_distilled": "deit_base_distilled_patch16_224.fb_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "convnext_tiny": "convnext_tiny.fb_in1k",
    "resnet18": "resnet18.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "mobilenetv2_035": "mobilenetv2_035.untrained",
    "mobilenetv2_050": "mobilenetv2_050.lamb_in1k",
    "mobilenetv2_075": "mobilenetv2_075.untrained",
    "mobilenetv2_100": "mobilenetv2_100.ra_in1k",
    "mobilenetv2_140": "mobilenetv2_140.ra_in1k",
    "mobilenetv3_large_100": "mobilenetv3_large_100.ra_in1k",
    **{f"efficientnet_lite{i}": f"tf_efficientnet_lite{i}.in1k" for i in range(5)},
}
TORCHVISION = {
    "resnet18": "ResNet18_Weights",
    "resnet50": "ResNet50_Weights",
    "torchvision_mobilenetv3_large_100": "MobileNet_V3_Large_Weights",
}
# By argument of transformers' processor. Those of DeepLab are what Google's checkpoints were
# converted with: 32 pixels more than the crop.
MOBILENET_PROCESSORS = {
    "tf_mobilenetv2_100": {},
    "tf_mobilenetv2_140": {},
    "deeplabv3_mobilenetv2": {"crop_size": 513, "size": {"shortest_edge": 545}},
    "deeplabv3_mobilenetv2_os8": {"crop_size": 513, "size": {"shortest_edge": 545}},
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATIONS = {
    "imagenet": IMAGENET,
    "half": ((0.5,) * 3, (0.5,) * 3),
    "lite": ((127 / 255,) * 3, (128 / 255,) * 3),
}
RECIPES = {
    name: (found.config.image_size, found.inputs)
    for name, found in REGISTRY.items()
    if found.inputs is not None
}
# One model for each way to prepare images.
DISTINCT = sorted({way: name for name, way in RECIPES.items()}.values())

# Height, width, mode and format of photographs.
PHOTOGRAPHS = [
    (375, 500, "RGB", "jpg"),
    (500, 333, "RGB", "jpg"),
    (333, 501, "L", "jpg"),
    (1203, 900, "RGB", "jpg"),
    (97, 61, "RGB", "png"),  # smaller than every crop
    (224, 224, "RGB", "png"),
    (301, 301, "CMYK", "jpg"),
    (257, 1023, "RGB", "jpg"),
    (640, 427, "RGB", "jpg"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Files of photographs, each in the folder of a class of its own."""
    folder = tmp_path_factory.mktemp("photographs")
    sources = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    files = []
    for i, (height, width, mode, suffix) in enumerate(PHOTOGRAPHS):
        file = folder / "test" / str(i) / f"photograph.{suffix}"
        file.parent.mkdir(parents=True)
        sources[i % 2].resize((width, height)).convert(mode).save(file)
        files.append(file)
    return files


def evaluated(name, files):
    """Pixels that `ImageData` evaluates a model by, in the order of the files."""
    size, recipe = RECIPES[name]
    data = ImageData(
        str(files[0].parents[2]),
        image_size=size,
        normalization=recipe.normalization,
        **recipe.resizing,
    )
    (batch,) = data.evaluate("test", len(files))
    assert batch["mask"].all()
    return batch["image"][np.argsort(batch["label"])]


def error(ours, theirs):
    """Largest difference; where images are NCHW they are turned."""
    theirs = np.asarray(theirs)
    if theirs.shape[-1] != 3:
        theirs = np.moveaxis(theirs, -3, -1)
    assert ours.shape == theirs.shape
    return np.max(np.abs(ours - theirs))


def by_torchvisions_rules(picture, name):
    """Resizes, crops and normalises as torchvision documents it, with the sides that timm asks."""
    size, recipe = RECIPES[name]
    (width, height), short = picture.size, math.floor(size / recipe.crop_share)
    sides = (short, int(short * height / width))
    if width > height:
        sides = (int(short * width / height), short)
    picture = picture.resize(sides, Image.Resampling[recipe.interpolation.upper()])
    left, top = (round((side - size) / 2.0) for side in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size))) / 255
    mean, std = NORMALIZATIONS[recipe.normalization]
    return (pixels - mean) / std


@pytest.mark.parametrize("name", DISTINCT)
def test_pixels_follow_torchvisions_rules(name, photographs):
    expected = [
        by_torchvisions_rules(Image.open(file).convert("RGB"), name) for file in photographs
    ]
    assert error(evaluated(name, photographs), np.stack(expected)) < CLOSE


class Recorder(nn.Module):
    """A classifier that shows its images."""

    record: object

    @nn.compact
    def __call__(self, images):
        jax.debug.callback(self.record, images)
        return jnp.zeros((len(images), 1000))


@pytest.mark.parametrize("name", DISTINCT)
def test_folders_of_images_are_prepared_alike(name, photographs):
    seen, (size, _) = [], RECIPES[name]
    model = LoadedModel(name, Recorder(lambda images: seen.append(np.array(images))))
    weights = Weights({}, {}, None, None, {})
    folder = photographs[0].parents[1]
    result, rows = judge_images(model, weights, folder, None, (size, size, 3), "auto")
    jax.effects_barrier()
    assert result["images"] == len(photographs)
    (images,) = seen  # one batch, filled up
    order = np.argsort([row["label"] for row in rows])
    np.testing.assert_array_equal(images[order], evaluated(name, photographs))


@pytest.fixture(scope="module")
def references():
    """Imports torchvision or timm, or skips."""
    return importlib.import_module("references").reference


def test_every_model_of_images_is_compared():
    compared = {*TIMM, *TORCHVISION, *MOBILENET_PROCESSORS, "deeplabv3plus_mobilenetv2"}
    assert compared == set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_recipes_are_timms(name, references):
    timm = references("timm")
    theirs = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(TIMM[name]).to_dict()
    )
    size, ours = RECIPES[name]
    assert theirs["input_size"] == (3, size, size)
    assert (theirs["crop_pct"], theirs["crop_mode"]) == (ours.crop_share, "center")
    assert theirs["interpolation"] == ours.interpolation
    if name.startswith("efficientnet_lite"):
        # The published weights' own is kept; timm's is off by a 128th at most.
        assert ours.normalization == "lite"
        assert (theirs["mean"], theirs["std"]) == NORMALIZATIONS["half"]
    else:
        assert (theirs["mean"], theirs["std"]) == NORMALIZATIONS[ours.normalization]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_recipes_are_torchvisions(name, references):
    models = references("torchvision").models
    theirs = getattr(models, TORCHVISION[name]).IMAGENET1K_V1.transforms()
    size, ours = RECIPES[name]
    assert theirs.crop_size == [size]
    assert theirs.resize_size == [math.floor(size / ours.crop_share)]
    assert theirs.interpolation.value == ours.interpolation
    assert (tuple(theirs.mean), tuple(theirs.std)) == NORMALIZATIONS[ours.normalization]


@pytest.mark.slow
def test_the_backbone_of_segmentation_models_is_torchvisions(references):
    weights = references("torchvision").models.MobileNet_V2_Weights.IMAGENET1K_V1
    theirs, (_, ours) = weights.transforms(), RECIPES["deeplabv3plus_mobilenetv2"]
    assert (tuple(theirs.mean), tuple(theirs.std)) == NORMALIZATIONS[ours.normalization]


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_pixels_are_timms(name, references, photographs):
    timm = references("timm")
    size, recipe = RECIPES[name]
    mean, std = NORMALIZATIONS[recipe.normalization]
    transform = timm.data.create_transform(
        size,
        crop_pct=recipe.crop_share,
        interpolation=recipe.interpolation,
        mean=mean,
        std=std,
    )
    expected = np.stack([transform(Image.open(file).convert("RGB")) for file in photographs])
    assert error(evaluated(name, photographs), expected) < CLOSE


@pytest.fixture(scope="module")
def processor(references):
    """Makes transformers' processors that need no torchvision."""
    transformers = references("transformers")
    return lambda kind, **options: getattr(transformers, f"{kind}ImageProcessorPil")(**options)


def seen_by_both(ours, theirs, picture, name):
    """Cuts off what only one shows: transformers rounds margins down, timm to the nearest."""
    size, recipe = RECIPES[name]
    short = math.floor(size / recipe.crop_share)
    margins = [int(short * side / min(picture.size)) - size for side in picture.size]
    right, down = (round(margin / 2) - margin // 2 for margin in margins)  # 0 or 1
    return ours[: size - down, : size - right], theirs[down:, right:]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        *((name, "MobileNetV2", options) for name, options in MOBILENET_PROCESSORS.items()),
        (
            "convnext_tiny",  # as facebook/convnext-tiny-224 has it
            "ConvNext",
            {"size": {"shortest_edge": 224}, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
        ),
    ],
)
def test_pixels_are_transformers(name, kind, options, processor, photographs):
    ours = evaluated(name, photographs)
    convert = processor(kind, **options)
    for file, image in zip(photographs, ours, strict=True):
        picture = Image.open(file).convert("RGB")
        (theirs,) = convert(picture, return_tensors="np")["pixel_values"]
        parts = seen_by_both(image, np.moveaxis(theirs, 0, -1), picture, name)
        assert error(*parts) < CLOSE


@pytest.mark.parametrize(
    ("kind", "share", "interpolation"), [("ViT", 1.0, "bilinear"), ("DeiT", 0.875, "bicubic")]
)
def test_squares_are_transformers(kind, share, interpolation, processor, photographs):
    # These processors squash other images to squares, which timm does not.
    crop, normalize = CenterCrop(224, share, interpolation), normalization_preset("half", 3)
    for file in photographs:
        picture = Image.open(file).convert("RGB")
        if picture.width == picture.height:
            theirs = processor(kind)(picture, return_tensors="np")["pixel_values"]
            ours = normalize(np.float32(crop(np.asarray(picture))[None]) / np.float32(255))
            assert error(ours, theirs) < CLOSE
