"""Edits of a packed file's header, and of its bytes, as plain data that hypothesis can shrink."""

import contextlib
import json
import re

from forging import forge, put_together, take_apart
from hypothesis import strategies as st

EVIL = [
    "(a+)+$", "(.*)*x", "(?i)[\x01-\uffff]", "a{99999999999}", "(" * 999, "(?P<a>x)" * 2, "[",
]  # fmt: skip
numbers = st.one_of(
    st.integers(-2, 20),
    st.sampled_from(
        [2**k + d for k in (8, 16, 24, 31, 32, 33, 40, 53, 63, 64) for d in (-1, 0, 1)]
    ),
    st.sampled_from([10**18, 10**30, 10**4000, -(2**63)]),
)
words = st.sampled_from([
    "", "/", "a/b", "blocks/0/kernel", "pairs", "codes", "signs", "levels", "codebook", "step",
    "float32", "float64", "bfloat16", "float16", "int8", "bool", "float8_e4m3fn", "nested", "dict",
    "list", "tuple", "other", "sign_split", "vector", "uniform", "\ud800", "\0", "x" * 5000,
])  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(), words, st.sampled_from(EVIL),
    st.text(max_size=5),
)  # fmt: skip
values = st.one_of(
    st.recursive(
        scalars,
        lambda x: (
            st.lists(x, max_size=4) | st.dictionaries(words | st.text(max_size=3), x, max_size=3)
        ),
        max_leaves=8,
    ),
    st.sampled_from([f"@{kind} {n}" for kind in ("list", "dict") for n in (5, 150, 900, 3000)]),
)
steps = st.lists(st.integers(0, 30), min_size=1, max_size=6)
fields = st.sampled_from([
    "codewords", "dim", "axis", "pad", "codebook_dtype", "channel_scale", "channel_axis",
    "iterations", "alpha", "learn_signs", "latent_dtype", "bits", "per_channel", "method", "none",
])  # fmt: skip
shapes = (
    st.lists(numbers | st.integers(0, 40), max_size=5) | st.just([1] * 70) | st.just([0, 2**62])
)
parts = st.recursive(
    st.integers(-1, 12) | st.none(),
    lambda x: st.one_of(
        st.lists(x, max_size=4).map(lambda items: {"list": items}),
        st.lists(x, max_size=4).map(lambda items: {"tuple": items}),
        st.lists(st.tuples(st.sampled_from(["a", "b", 0, 1, True]), x).map(list), max_size=4).map(
            lambda items: {"dict": items}
        ),
    ),
    max_leaves=12,
)
structures = st.sampled_from(["structure", "state_structure"])
rules = st.integers(0, 5)
settings_of_rules = st.sampled_from(["stacked", "share", "optional", "pattern"])
coded_fields = st.tuples(words, st.sampled_from(["codes", "signs", "levels", "step"]))
places = st.tuples(st.integers(0, 12), st.integers(0, 999))
# The largest finite numbers, the smallest, infinity, and no number in 16 bits.
floats = st.sampled_from([b"\x7f\x7f", b"\x7f\xff", b"\1\0", b"\x80\x7f", b"\xc0\x7f", b"\0\x7c"])
contents_of_tensors = st.binary(min_size=1, max_size=40) | floats.map(lambda number: number * 500)
edits = st.one_of(
    st.tuples(st.just("put"), steps, values),
    st.tuples(st.just("remove"), steps, st.none()),
    st.tuples(st.just("repeat"), steps, st.none()),
    st.tuples(st.just("copy"), steps, steps),
    st.tuples(st.just("swap rows"), st.integers(0, 12), st.integers(0, 12)),
    st.tuples(st.just("shape"), st.integers(0, 12), shapes),
    st.tuples(st.just("quantizer"), st.tuples(rules, fields), values | scalars),
    st.tuples(st.just("rule"), st.tuples(rules, settings_of_rules), values | scalars),
    st.tuples(st.just("structure"), structures, parts | values),
    st.tuples(st.just("coded"), coded_fields, numbers),
    st.tuples(st.just("bytes"), places, contents_of_tensors),
)


def edit(header, tensors, kind, where, value):
    """Carries out an edit, as far as its place exists."""
    rows, rules = header.get("leaves"), header.get("recipe")
    match kind:
        case "put" | "remove" | "repeat" | "copy":
            node, key = walk(header, where)
            if key is None:
                return
            if kind == "copy":
                source, name = walk(header, value)
                value = None if name is None else json.loads(json.dumps(source[name]))
            if kind == "remove":
                del node[key]
            elif kind == "repeat" and isinstance(node, list):
                node.insert(key, node[key])
            else:
                node[key] = value
        case "swap rows":
            i, j = where % len(rows), value % len(rows)
            rows[i], rows[j] = rows[j], rows[i]
        case "shape":
            rows[where % len(rows)][1] = value
        case "quantizer":
            quantizer = rules["rules"][where[0]]["quantizer"]
            quantizer[where[1]] = value
        case "rule":
            rules["rules"][where[0]][where[1]] = value
        case "structure":
            header[where] = value
        case "coded":
            header["coded"].setdefault(where[0], {})[where[1]] = value
        case "bytes":
            name = list(tensors)[where[0] % len(tensors)]
            old, start = tensors[name], where[1] % max(1, len(tensors[name]))
            tensors[name] = (old[:start] + value + old[start + len(value) :])[: len(old)]


def walk(node, path):
    """Goes down as far as the steps and the header lead."""
    parent, key = None, None
    for step in path:
        if not isinstance(node, dict | list) or not node:
            break
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, keys[step % len(keys)]
        node = node[key]
    return parent, key


def forged(raw, changes):
    """A file with these edits and right checksums."""
    _, header, tensors = take_apart(raw)
    for change in changes:
        with contextlib.suppress(LookupError, TypeError, AttributeError, ZeroDivisionError):
            edit(header, tensors, *change)  # an earlier edit may have taken its place away
    text = json.dumps(header)
    if '"@' in text:
        text = re.sub(r'"@(\w+) (\d+)"', lambda found: deep(found[1], int(found[2])), text)
        return put_together(take_apart(raw)[0], text, tensors)
    try:
        return forge(raw, header, tensors)
    except RecursionError:
        return put_together(take_apart(raw)[0], text, tensors)


def deep(kind, times):
    """JSON so deep that `json` could not write it."""
    begin, end = {"list": ("[", "]"), "dict": ('{"dict":[["a",', "]]}")}[kind]
    return begin * times + ("0" if kind == "dict" else "") + end * times
