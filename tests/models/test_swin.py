"""Swin against transformers', timm's and torchvision's, and what its importer refuses."""

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

from ssvq_jax.models.import_swin import import_swin
from ssvq_jax.models.swin import CONFIGS, Swin, SwinConfig
from ssvq_jax.models.swin_windows import same_region
from ssvq_jax.models.weights import load_tensors

transformers = pytest.importorskip("transformers", reason=WITHOUT_TORCH)

SMALL = SwinConfig(
    image_size=48, width=12, depths=(2, 3, 2), heads=(2, 3, 4), window=3, classes=7
)  # fmt: skip
IMAGES = images_for(2, 48, 48)


def transformers_swin():
    sizes = transformers.SwinConfig(
        image_size=48, embed_dim=12, depths=[2, 3, 2], num_heads=[2, 3, 4], window_size=3,
        num_labels=7,
    )  # fmt: skip
    return randomised(transformers.SwinForImageClassification(sizes))


# 48: windows cover all planes, and the last is one window; the others are filled up to patches,
# windows, or pairs.
@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 64), (75, 70), (52, 92)])
def test_transformers(height, width):
    theirs, ours = transformers_swin(), Swin(SMALL)
    images = images_for(2, height, width)
    shapes = shapes_of(ours, images)
    variables = import_swin(tensors_of(theirs), shapes, SMALL, source="random")
    ends = [stage.blocks[-1] for stage in theirs.swin.encoder.layers]
    expected, features = outputs_of(theirs, images, *ends)
    found, state = run(ours, variables, images)
    assert worst_error(found, expected) <= 1e-4
    for i, stage in enumerate(features):
        ours_i = state["intermediates"][f"stage_{i}"][0]
        assert worst_error(ours_i.reshape(stage.shape), stage) <= 1e-4


def test_names_in_files(tmp_path):
    theirs = transformers_swin()
    theirs.save_pretrained(tmp_path)
    tensors = load_tensors(tmp_path / "model.safetensors")
    assert "swin.encoder.layers.1.blocks.2.attention.self.query.weight" in tensors
    shapes = shapes_of(Swin(SMALL), IMAGES)
    from_file = import_swin(tensors, shapes, SMALL, source="model.safetensors")
    in_memory = import_swin(tensors_of(theirs), shapes, SMALL, source="random")
    chex.assert_trees_all_equal(from_file, in_memory)


def test_what_was_rolled_round_is_not_seen():
    # A row of two windows of 2x2, rolled by one column: A B C D becomes B C D A.
    plain = np.ones((4, 4), bool)
    parted = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]], bool)
    np.testing.assert_array_equal(same_region(1, 2, 2, (0, 1)), [plain, parted])


TINY = SwinConfig(width=12, depths=(2,), heads=(2,), window=3, classes=7)


def test_recomputed_blocks_give_the_same_gradients():
    images = images_for(2, 24, 24)
    variables = jax.jit(Swin(TINY).init)(jax.random.key(0), images)
    kept, again = (gradients(Swin(TINY, remat=remat), variables, images) for remat in (False, True))
    chex.assert_trees_all_close(kept, again, atol=1e-5)


def test_bfloat16_activations():
    assert bfloat16_error(partial(Swin, TINY), images_for(2, 24, 24)) <= 0.05


def test_parameter_count():
    shapes = shapes_of(Swin(CONFIGS["swin_tiny"]), images_for(1, 224, 224))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 28_288_354


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"classes": 0}, "classes=0"),
        ({"depths": (2, 0, 2, 2)}, r"depths=\(2, 0, 2, 2\)"),
        ({"depths": (2, 2)}, r"depths=\(2, 2\) are of 2 stages, heads=.* of 4"),
        ({"heads": (3, 5, 12, 24)}, "5 does not divide width=192 of stage 1"),
        ({"window": 0}, "window=0"),
    ],
)
def test_bad_settings_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        SwinConfig(**sizes)


NAME = "swin.encoder.layers.1.blocks.2.attention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {name: y for name, y in x.items() if name != f"{NAME}.o_proj.weight"},
            "no tensor fills: params/layers_1/blocks_2/attn/proj/kernel",
        ),
        (
            lambda x: {name: y for name, y in x.items() if name != f"{NAME}.q_proj.bias"},
            rf"lacks \['{NAME}.q_proj.bias'\]",
        ),
        (lambda x: x | {"fc2.bias": np.ones(7)}, "no place for: fc2.bias"),
        (
            lambda x: {
                name: np.ones((49, 3)) if "table" in name and NAME in name else y
                for name, y in x.items()
            },
            r"table \[49, 3\] for leaf 'params/layers_1/blocks_2/attn/relative_.* \[25, 3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    shapes = shapes_of(Swin(SMALL), IMAGES)
    with pytest.raises(ValueError, match=message):
        import_swin(change(tensors_of(transformers_swin())), shapes, SMALL, source="x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "sizes"),
    # 156: 39 tokens are filled up to 42, 20 to 21, 10 to 14, and 5 to one window. timm would shift
    # before it fills up; it and torchvision drop what is over in the patches.
    [("timm", [(224, 224)]), ("torchvision", [(224, 224), (156, 156), (96, 200)])],
)
def test_timm_and_torchvision(package, sizes):
    if package == "timm":
        theirs = randomised(reference("timm").create_model("swin_tiny_patch4_window7_224"))
        stages = list(theirs.layers)
    else:
        theirs = randomised(reference("torchvision").models.swin_t())
        stages = [theirs.features[i] for i in (1, 3, 5, 7)]
    config = CONFIGS["swin_tiny"]
    ours = Swin(config)
    for height, width in sizes:
        images = images_for(1, height, width)
        shapes = shapes_of(ours, images)
        variables = import_swin(tensors_of(theirs), shapes, config, source=package)
        expected, features = outputs_of(theirs, images, *stages)
        found, state = run(ours, variables, images)
        assert worst_error(found, expected) <= 1e-4
        for i, stage in enumerate(features):
            ours_i = state["intermediates"][f"stage_{i}"][0]
            # Here the planes are channels last already, which outputs_of does not know.
            stage = np.moveaxis(stage, 3, 1)
            assert worst_error(ours_i, stage) <= 1e-4
