import json

import jax
import pytest

from ssvq_jax import PRESETS, Rule, SignSplit, load_recipe, make_plan
from ssvq_jax.models import create, param_shapes
from ssvq_jax.recipe import as_recipe, recipe_from_json, recipe_to_json


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_round_trip_through_a_file(name, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe_to_json(PRESETS[name])))
    assert load_recipe(str(file)) == PRESETS[name]


def test_every_field_of_a_rule_round_trips():
    recipe = (
        Rule("a", SignSplit(4, 8), stacked=2),
        Rule("b", SignSplit(4, 8), share="s", optional=True),
        Rule("c", None),
    )
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


def test_patterns_match_whole_paths():
    assert Rule("a/kernel", None).matches("a/kernel")
    assert not Rule("kernel", None).matches("a/kernel")
    assert not Rule("a/kern", None).matches("a/kernel")


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("(", None), r"rule '\(' is not a regular expression"),
        (lambda: Rule("a", None, stacked=-1), "stacked=-1: it must be a whole number, at least 0"),
        (lambda: Rule("a", SignSplit(), stacked=1, share="s"), "share='s' needs .* stacked=0"),
        (lambda: Rule("a", None, share="s"), "share='s' needs a quantizer"),
        (lambda: as_recipe([("a", None, 1)]), "is no rule: give"),
        (lambda: load_recipe("ssvq-99x"), "neither a file nor a preset: choose one of .*ssvq-21x"),
        (lambda: Rule("a", None, stacked=1), "rule 'a': stacked=1 needs a quantizer"),
        (lambda: Rule(3, None), "rule 3: the pattern must be a string"),
        (lambda: as_recipe("ssvq-21x"), r"'s' is no rule: .* load_recipe"),
        (lambda: recipe_from_json({"format": 1, "rules": 3}), "not a recipe"),
        (
            lambda: recipe_from_json(
                {
                    "format": 1,
                    "rules": [{"pattern": "a", "quantizer": {"method": "vector", "dim": 0}}],
                }
            ),
            "rule .*'pattern': 'a'.*: dim=0",
        ),
        (lambda: recipe_from_json({"rules": []}), "not a recipe: it needs"),
        (
            lambda: recipe_from_json({"format": 1, "rules": [{"pattern": "a"}]}),
            "it needs a pattern and a quantizer",
        ),
    ],
)
def test_bad_recipes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_recipe_file_is_named(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"recipe file '.*broken.json'"):
        load_recipe(str(file))


def test_presets_tell_lists_of_blocks_from_stacked_blocks():
    def bits(tree, name):
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), tree, is_leaf=is_shape)
        return make_plan(shapes, load_recipe(name)).bits().main.bits_per_weight

    def is_shape(node):
        return isinstance(node, tuple)

    listed = {"blocks": [{"fc": {"kernel": (192, 576)}}, {"fc": {"kernel": (192, 576)}}]}
    stacked = {"blocks": {"fc": {"kernel": (2, 192, 576)}}}
    assert bits(listed, "ssvq-21x") == bits(stacked, "ssvq-21x-scanned") < 1.52
    for tree, name in ((stacked, "ssvq-21x"), (listed, "ssvq-21x-scanned")):
        with pytest.raises(ValueError, match="match no leaf"):
            bits(tree, name)


def test_presets_take_a_language_model_s_layers_and_no_stage_of_swin():
    leaves = {
        "layers_0/attn/q/kernel": (16, 16),
        "layers_0/mlp/down/kernel": (16, 16),
        "layers_0/attn_norm/scale": (16,),
        "embed/embedding": (24, 16),
        "lm_head/kernel": (16, 24),
    }
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaves.items()}
    rows = {row.name: row for row in make_plan(shapes, load_recipe("uniform-2bit")).bits().rows}
    assert {name: row.settings for name, row in rows.items()} == {
        "layers_0/attn/q/kernel": "2 bit a channel",
        "layers_0/mlp/down/kernel": "2 bit a channel",
        "layers_0/attn_norm/scale": "",
        "embed/embedding": "8 bit a channel",
        "lm_head/kernel": "8 bit a channel",
    }
    assert rows["embed/embedding"].bits["step"] == 24 * 16  # a step a token
    plan = make_plan(param_shapes(create("swin_tiny")), load_recipe("ssvq-21x"))
    assert any("/downsample/" in leaf.path for leaf in plan.leaves)
    assert {path for path in plan.compressed if "/blocks_" not in path} == {
        "patch_embed/kernel",
        "head/kernel",
    }
