import json
import random
import re
import time

import jax
import pytest

from ssvq_jax import PRESETS, Rule, SignSplit, load_recipe, make_plan
from ssvq_jax.models import create, param_shapes
from ssvq_jax.path_patterns import matches
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
        (lambda: recipe_from_json({"format": True, "rules": []}), "not a recipe: it needs"),
        (lambda: recipe_from_json({"format": 1.0, "rules": []}), "not a recipe: it needs"),
        (
            lambda: recipe_from_json({"format": 1, "rules": [], "rule": [], "x": 1}),
            r"the keys 'format' and 'rules' and no \['rule', 'x'\]",
        ),
        (
            lambda: Rule("((a{50}){50}){50}", None),
            "has 127,550 parts once its counts are",
        ),
        (lambda: Rule("a" * 5000, None), "has 5000 characters: give at most 4096"),
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


RULES = '"rules": [{"pattern": ".*", "quantizer": null}]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"format": 1, "format": 1, {RULES}}}', "the key 'format' is given twice"),
        (
            '{"format": 1, "rules": [{"pattern": "a", "pattern": "b", "quantizer": null}]}',
            "the key 'pattern' is given twice",
        ),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"format": true, {RULES}}}', "not a recipe"),
        (b"\xff\xfe{", "not text in UTF-8"),
    ],
)
def test_files_are_read_strictly(tmp_path, text, message):
    file = tmp_path / "recipe.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_recipe(str(file))


def test_files_may_have_a_byte_order_mark_and_any_letters(tmp_path):
    file = tmp_path / "recipe.json"
    text = f'{{"format": 1, {RULES}}}'.replace(".*", "层.*")
    file.write_text(text, encoding="utf-8-sig")
    (rule,) = load_recipe(str(file))
    assert rule.matches("层/weight")


def test_a_pattern_cannot_hang():
    rule = Rule("((([a-z]+)+)+/?)+!", None)
    begun = time.monotonic()
    assert not rule.matches("blocks/" + "abcdefghijklmnopqrstuvwxyz" * 3 + "/kernel")
    assert rule.matches("abc/d!")
    with pytest.raises(ValueError, match=r"\+b' takes more than 1 s to match 'aaa.*: write"):
        Rule("(a|aa)+b", None).matches("a" * 200)
    assert time.monotonic() - begun < 30


def test_presets_match_as_with_re():
    paths = [
        "blocks_0/attn/qkv/kernel", "blocks/3/mlp/fc1/kernel", "blocks/attn/qkv/kernel",
        "head/kernel", "patch_embed/bias", "layers_0/attn/q/kernel", "layers/mlp/up/kernel",
        "stem/conv/kernel", "stages_1/depthwise_conv/kernel", "embed/embedding", "norm/scale",
    ]  # fmt: skip
    for recipe in PRESETS.values():
        for rule in recipe:
            for path in paths:
                assert rule.matches(path) == (re.fullmatch(rule.pattern, path) is not None)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("block{i}/kernel", "blockXYZ/kernel"),
        ("block{i}/kernel", "block{i}/kernel"),
        ("(?:kernel){e}", "bias"),
        ("kernel{e<=1}", "kernals"),
        ("[[:alpha:]]+", "abc"),
        ("[]a]+", "]a"),
        ("x{,}", "xxx"),
        ("/".join(["[a-z]{1,20}"] * 4), "a/bc/def/g"),
        (r"\d{4}/" * 7, "1234/" * 7),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_patterns_mean_what_they_do_in_re(pattern, path):
    assert matches(pattern, path) == (re.fullmatch(pattern, path) is not None)


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_random_patterns_mean_what_they_do_in_re():
    draw, compared = random.Random(0), 0
    parts = ["a", "b", "/", ".", "{", "}", "[", "]", "(", ")", "{2}", "{1,2}", "{,2}", "{,}", "{i}"]
    parts += ["*", "+", "?", "|", "^", "$", r"\d", r"\{", "[ab]", "[[a]", "[:a:]", "(?:", "(?=a"]
    parts += ["(?!b", "-", ":", "1", ",", "&&"]
    while compared < 1000:
        pattern = "".join(draw.choices(parts, k=draw.randint(1, 6)))
        try:
            usual = re.compile(pattern)
        except re.error:
            continue
        path = "".join(draw.choices("ab/{}1i,[]:-&", k=draw.randint(0, 4)))
        assert matches(pattern, path) == (usual.fullmatch(path) is not None), (pattern, path)
        compared += 1
