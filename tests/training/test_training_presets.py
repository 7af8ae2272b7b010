"""Training recipes are what the page says, and name what exists."""

import re
from pathlib import Path

import pytest

from ssvq_jax.data import augmentation_preset
from ssvq_jax.training.presets import TRAINING_PRESETS, training_preset

PAGE = Path(__file__).parents[2] / "docs/training.md"


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_a_recipe(name):
    preset = training_preset(name)
    preset.optimizer.check()
    preset.objective.check(None)
    assert preset.optimizer.freeze is None
    (row,) = re.findall(rf"^\| `{name}`(?: \(default\))? \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    rule, rate, decay, images, labels, average = (cell.strip() for cell in row.split("|"))
    optimizer = preset.optimizer
    assert rule.startswith({"adamw": "AdamW", "sgd": "SGD"}[optimizer.rule])
    assert float(rate.split(",")[0]) == optimizer.dense
    assert float(decay) == optimizer.weight_decay
    assert float(average or 0) == preset.average_decay
    assert ("smoothed, 0.1" in labels) == (preset.objective.label_smoothing == 0.1)
    augment = augmentation_preset(preset.augment)
    assert ("random crops" in images) == (augment.crop_scale is not None)
    assert ("Mixup" in images) == (augment.mix is not None)
    assert (images == "as they are") == (not augment.augment)


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="preset='adam': choose one of adamw"):
        training_preset("adam")
