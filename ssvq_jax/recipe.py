"""Recipes: ordered rules from leaf paths to quantizers, as records and as JSON."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssvq_jax import quantizers
from ssvq_jax.json_files import read_json
from ssvq_jax.path_patterns import compile_pattern, matches
from ssvq_jax.quantizers import (
    ChannelRelaxed,
    Masked,
    MaskedSignSplit,
    Pyramid,
    Quantizer,
    SignSplit,
    Uniform,
    Vector,
)
from ssvq_jax.quantizers.base import check_flag, check_integer
from ssvq_jax.quantizers.codebook import CodebookQuantizer
from ssvq_jax.quantizers.pyramid_vector import pulses_for

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the leaves whose whole path matches a pattern.

    Attributes:
        pattern: regular expression, matched against the whole leaf path as by ``re.fullmatch``; the
            first rule that matches a leaf wins.
        quantizer: method for these leaves, or None to keep them dense.
        stacked: leading axes that stack independent weights (layers under ``nn.scan``); every
            slice gets its own codebook.
        share: name of a codebook that all leaves of rules with this name use together.
        optional: the rule may match nothing.
    """

    pattern: str
    quantizer: Quantizer | None
    stacked: int = 0
    share: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"rule {self.pattern!r}: the pattern must be a string")
        try:
            compile_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"rule {error}") from None
        if not isinstance(self.quantizer, Quantizer | None):
            raise ValueError(
                f"rule '{self.pattern}' has {self.quantizer!r} for a quantizer: give a record like "
                "SignSplit(codewords=16, dim=8), or None to keep leaves dense"
            )
        check_integer("stacked", self.stacked, least=0)
        check_flag("optional", self.optional)
        if not isinstance(self.share, str | None):
            raise ValueError(f"rule '{self.pattern}': share={self.share!r} must be a name or None")
        if self.share is not None and (self.stacked or self.quantizer is None):
            raise ValueError(
                f"rule '{self.pattern}': share='{self.share}' needs a quantizer and stacked=0 (one "
                "codebook for all leaves and all their slices)"
            )
        if self.stacked and self.quantizer is None:
            raise ValueError(f"rule '{self.pattern}': stacked={self.stacked} needs a quantizer")

    def matches(self, path: str) -> bool:
        """Whether the rule covers a leaf path."""
        return matches(self.pattern, path)


Recipe = tuple[Rule, ...]


def as_recipe(rules: Iterable[Rule | tuple[str, Quantizer | None]]) -> Recipe:
    """Reads rules, or ``(pattern, quantizer)`` pairs that are short for them.

    Raises:
        ValueError: if an item is neither.
    """
    recipe = []
    for rule in rules:
        if isinstance(rule, Rule):
            recipe.append(rule)
        elif isinstance(rule, tuple) and len(rule) == 2:
            recipe.append(Rule(*rule))
        else:
            raise ValueError(
                f"{rule!r} is no rule: give Rule(...) or (pattern, quantizer); the rules of a "
                "preset or file are load_recipe(name)"
            )
    return tuple(recipe)


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Writes a recipe as plain data.

    Example:
        >>> recipe_to_json((Rule(".*", None),))
        {'format': 1, 'rules': [{'pattern': '.*', 'quantizer': None}]}
    """
    rules = []
    for rule in recipe:
        data: dict[str, Any] = {"pattern": rule.pattern, "quantizer": None}
        if rule.quantizer is not None:
            data["quantizer"] = quantizers.to_json(rule.quantizer)
        for field in dataclasses.fields(Rule)[2:]:
            if getattr(rule, field.name) != field.default:
                data[field.name] = getattr(rule, field.name)
        rules.append(data)
    return {"format": FORMAT, "rules": rules}


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """Reads a recipe from plain data.

    Raises:
        ValueError: if the data are not a recipe of this format, naming what is wrong.
    """
    rules = data.get("rules") if isinstance(data, Mapping) else None
    version = data.get("format") if isinstance(data, Mapping) else None
    if not isinstance(rules, list) or type(version) is not int or version != FORMAT:
        raise ValueError(f'not a recipe: it needs {{"format": {FORMAT}, "rules": [...]}}')
    unknown = sorted(set(data) - {"format", "rules"})
    if unknown:
        raise ValueError(
            f"a recipe has the keys 'format' and 'rules' and no {unknown}: delete them, or move "
            "them into a rule"
        )
    known = {field.name for field in dataclasses.fields(Rule)}
    recipe = []
    for entry in rules:
        if not isinstance(entry, Mapping) or not {"pattern", "quantizer"} <= set(entry) <= known:
            raise ValueError(
                f"rule {entry}: it needs a pattern and a quantizer, of {sorted(known)}"
            )
        fields = dict(entry)
        try:
            if fields["quantizer"] is not None:
                fields["quantizer"] = quantizers.from_json(fields["quantizer"])
            recipe.append(Rule(**fields))
        except ValueError as error:
            raise ValueError(f"rule {entry}: {error}") from None
    return tuple(recipe)


def _transformer(
    quantizer: Quantizer, *, scanned: bool = False, share: str | None = None
) -> Recipe:
    """Every kernel of the blocks or layers; embeddings and heads int8; the rest dense.

    Layers are a language model's, with attention and MLP right below: Swin has `layers_0/blocks_0`,
    and what else is in them (`layers_0/downsample`) stays dense.
    """
    inside = r"(attn|mlp)/.*kernel"
    blocks = (
        rf"(.*/)?(blocks/(?!\d+/).*kernel|layers/{inside})"
        if scanned
        else rf"(.*/)?(blocks[_/]\d+/.*kernel|layers[_/]\d+/{inside})"
    )
    ends = r"(.*/)?(patch_embed|head|head_dist|lm_head)/kernel"
    return (
        Rule(ends, Uniform(bits=8), optional=True),
        Rule(blocks, quantizer, stacked=int(scanned), share=share),
        # A step a token; where the embedding is the output kernel, too, a step an output.
        Rule(r"(.*/)?embed/embedding", Uniform(bits=8, channel_axis=0), optional=True),
        Rule(r".*", None, optional=True),
    )


def _convolutional(quantizer: Quantizer) -> Recipe:
    """Every kernel but those of ends and depthwise convolutions, which are int8; the rest dense.

    MVQ leaves depthwise convolutions alone, as its paper does.
    """
    depthwise = None if isinstance(quantizer, Masked) else Uniform(bits=8)
    if isinstance(quantizer, CodebookQuantizer | Pyramid):
        quantizer = dataclasses.replace(quantizer, pad=True)  # any number of channels
    ends = r"(.*/)?(stem|patch_embed|head|classifier)(/.*)?/kernel"
    return (
        Rule(ends, Uniform(bits=8), optional=True),
        Rule(r".*depthwise.*/kernel", depthwise, optional=True),
        Rule(r".*/kernel", quantizer),
        Rule(r".*", None, optional=True),
    )


_METHODS: dict[str, Quantizer] = {
    # The paper's 21x: 4 + 8 bits for 8 weights; VQ at the same 1.5 bits: 6 bits for 4 weights.
    "ssvq-21x": SignSplit(codewords=16, dim=8),
    "ssvq-fixed-21x": SignSplit(codewords=16, dim=8, learn_signs=False),
    "vq-21x": Vector(codewords=64, dim=4),
    # Of 8 weights, 3 are kept: 6 bits for the choice and 6 for the code. With signs, 2: 5, 5 and 2.
    "mvq-21x": Masked(codewords=64, dim=8, keep=3, group=8),
    "ssvq-masked-21x": MaskedSignSplit(codewords=32, dim=8, keep=2, group=8),
    # 1.25 bits: 2 + 8 bits for 8 weights, 5 bits for 4.
    "ssvq-26x": SignSplit(codewords=4, dim=8),
    "ssvq-fixed-26x": SignSplit(codewords=4, dim=8, learn_signs=False),
    "vq-26x": Vector(codewords=32, dim=4),
    "mvq-26x": Masked(codewords=32, dim=8, keep=2, group=8),
    "ssvq-masked-26x": MaskedSignSplit(codewords=8, dim=8, keep=2, group=8),
    # 1 bit: 8 bits for 8 weights; CRVQ codes 2 % of the input channels with 4 bits a weight.
    "vq-1bit": Vector(codewords=256, dim=8),
    "crvq-1bit": ChannelRelaxed(codewords=256, dim=8, critical=0.02, extended=3),
    **{f"uniform-{bits}bit": Uniform(bits=bits) for bits in (2, 3, 4, 8)},
    # Without the scales of rows.
    **{
        f"pvq-{bits}bit": Pyramid(dim=16, pulses=pulses_for(bits, 16, 3), amplitude_bits=3)
        for bits in (2, 3, 4)
    },
}

# Transformers whose blocks are `blocks_0`, `blocks_1`, … or `blocks/0`, `blocks/1`, …, and language
# models whose layers are `layers_0`, …; "-scanned" for those stacked in `blocks` or `layers` by a
# scan; "-shared" with one codebook for all blocks, for models so small that a codebook a kernel
# costs more than its codes; "-conv" for convolutional networks of the registry. CRVQ is for
# matrices, each with its own critical channels.
PRESETS: dict[str, Recipe] = {
    **{name: _transformer(quantizer) for name, quantizer in _METHODS.items()},
    **{f"{name}-scanned": _transformer(q, scanned=True) for name, q in _METHODS.items()},
    **{
        f"{name}-conv": _convolutional(quantizer)
        for name, quantizer in _METHODS.items()
        if not isinstance(quantizer, ChannelRelaxed)
    },
    **{
        f"{name}-shared": _transformer(quantizer, share="blocks_codebook")
        for name, quantizer in _METHODS.items()
        if isinstance(quantizer, CodebookQuantizer) and quantizer.separable
    },
}


def load_recipe(name_or_file: str) -> Recipe:
    """Finds a recipe by preset name, or reads it from a JSON file.

    Args:
        name_or_file: a key of `PRESETS`, or a path.

    Returns:
        The rules.

    Raises:
        ValueError: if it is neither a preset nor a readable recipe.

    Example:
        >>> load_recipe("ssvq-21x")[1].quantizer.codewords
        16
    """
    if name_or_file in PRESETS:
        return PRESETS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(
            f"recipe '{name_or_file}' is neither a file nor a preset: choose one of "
            f"{sorted(PRESETS)} or give a JSON file"
        )
    try:
        return recipe_from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"recipe file '{name_or_file}': {error}") from None
