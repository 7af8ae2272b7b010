"""Packed files with random damage: the very same model, or an error; never anything else.

Two kinds: raw damage, which the checksums find, and forged headers and contents under right
checksums, which the reader's own checks must stand.
"""

import collections
import contextlib
import itertools
import json
import re
import signal
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forging import forge, put_together, take_apart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssvq_jax import (
    Packed,
    PackedFileError,
    Rule,
    SignSplit,
    Uniform,
    Vector,
    load,
    make_plan,
    save,
)
from ssvq_jax.quantizers.streams import pack_fields
from ssvq_jax.tree import leaves_by_path

pytestmark = pytest.mark.usefixtures("as_installed")  # checked annotations would refuse some first


def random_model(seed, skew, dense_dtype=None):
    """A model of all methods with random codes: no clustering, which would take most of the time.

    The higher the skew, the more does entropy coding gain.
    """
    rng = np.random.default_rng(seed)

    def dense(*shape, dtype="float32"):
        return rng.normal(size=shape).astype(np.float32).astype(dense_dtype or dtype)

    params = {
        "blocks": {
            0: {"kernel": np.zeros((8, 32), np.float32), "bias": dense(5)},
            1: {"kernel": np.zeros((8, 32), np.float32), "bias": dense(3, dtype="bfloat16")},
        },
        "pair": [np.zeros((4, 8), np.float32), np.zeros((16, 2), np.float32), None],
        "stack": np.zeros((3, 10, 12), np.float32),
        "head/kernel": np.zeros((16, 60), np.float32),
        "empty": dense(0, 4),
        "scale": dense(),
    }
    rules = [
        (r"blocks/0/kernel", SignSplit(codewords=16, dim=8)),
        (r"blocks/1/kernel", SignSplit(4, 4, codebook_dtype="float32", channel_scale=True)),
        Rule(r"pair/\d", Vector(codewords=5, dim=2, codebook_dtype="float16"), share="pairs"),
        Rule("stack", Vector(codewords=6, dim=5, pad=True), stacked=1),
        ("head/kernel", Uniform(bits=3)),
        (".*", None),
    ]
    plan = make_plan(params, rules)
    streams = {}
    for entry in plan.entries:
        lead = entry.spec.shape[: entry.spec.stacked]
        fields = {}
        for stream in entry.storage.streams:
            shape = (*lead, *stream.shape)
            if stream.values is not None:
                found = (stream.values * rng.random(shape) ** skew).astype(stream.dtype)
            elif stream.dtype == "int8":
                found = rng.integers(-127, 128, shape).astype(np.int8)
            else:
                found = (0.5 + rng.random(shape)).astype(jnp.dtype(stream.dtype))
            fields[stream.field] = found
        streams[entry.name] = pack_fields(entry.quantizer, fields, entry.spec)
    holed = jax.tree_util.tree_map_with_path(
        lambda path, x: None if jax.tree_util.keystr(path, simple=True, separator="/")
        in plan.compressed else x, params,
    )  # fmt: skip
    return Packed(plan, holed, streams)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Bytes of four files, by name."""
    folder, files = tmp_path_factory.mktemp("fuzz"), {}
    for seed, (name, codec, skew, dtype) in enumerate([
        ("plain", "plain", 1, None), ("coded", "entropy", 12, None),
        ("half", "plain", 1, "float16"), ("some coded", "entropy", 5, "bfloat16"),
    ]):  # fmt: skip
        state = {"batch_stats": {"mean": np.arange(4.0)}, "steps": [np.int32(seed)]}
        save(
            folder / name, random_model(seed, skew, dtype), codec=codec, state=state,
            model={"name": name}, metrics={"top1": seed / 8, "history": [1, 2, 3]},
        )  # fmt: skip
        files[name] = (folder / name).read_bytes()
        with load(folder / name) as opened:
            assert bool(opened._stored.header.coded) == (codec == "entropy")
    return files


def contents(opened):
    """Everything a file gives, in a form in which equal means the same bits."""

    def bits(tree):
        leaves, structure = jax.tree.flatten(tree)
        arrays = map(np.asarray, leaves)
        return structure, [(x.shape, x.dtype, x.tobytes()) for x in arrays]

    opened.verify()
    described = json.dumps([opened.model, opened.metrics])
    trees = (opened.read(), opened.state(), opened.decode())
    return opened.plan, described, opened.bits(), *map(bits, trees)


# Raw damage. Each takes a generator, the bytes, where the tensors begin, and another file's bytes.


def somewhere(rng, raw, begin):
    """A position: in the header as often as behind it, although that is shorter."""
    return int(rng.integers(0, begin) if rng.random() < 0.5 else rng.integers(begin, len(raw)))


def chunk(rng, raw, begin):
    start = somewhere(rng, raw, begin)
    return start, min(len(raw), start + int(rng.choice([1, 2, 4, 8, 31, 64, 300])))


def flip_bits(rng, raw, begin, other):
    damaged = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        damaged[somewhere(rng, raw, begin)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def overwrite(rng, raw, begin, other):
    start, end = chunk(rng, raw, begin)
    values = [
        rng.bytes(end - start),
        bytes(end - start),
        b"\xff" * (end - start),
        b"9" * (end - start),
    ]
    return raw[:start] + values[rng.integers(4)] + raw[end:]


def truncate(rng, raw, begin, other):
    return raw[: somewhere(rng, raw, begin)]


def extend(rng, raw, begin, other):
    return raw + [b"\0", rng.bytes(7), raw][rng.integers(3)]


def swap_chunks(rng, raw, begin, other):
    starts = [somewhere(rng, raw, begin), somewhere(rng, raw, begin)]
    first, second = sorted(starts)
    size = min(int(rng.choice([1, 4, 16, 100])), second - first, len(raw) - second)
    one, two = raw[first : first + size], raw[second : second + size]
    return raw[:first] + two + raw[first + size : second] + one + raw[second + size :]


def duplicate_chunk(rng, raw, begin, other):
    start, end = chunk(rng, raw, begin)
    return raw[:end] + raw[start:end] + raw[end:]


def remove_chunk(rng, raw, begin, other):
    start, end = chunk(rng, raw, begin)
    return raw[:start] + raw[end:]


def splice(rng, raw, begin, other):
    position = somewhere(rng, raw, begin)
    return raw[:position] + other[position:]


def change_an_integer(rng, raw, begin, other):
    """One number of the header, with its size set right."""
    numbers = list(re.finditer(rb"\d+", raw[8:begin]))
    found = numbers[rng.integers(len(numbers))]
    value = int(found[0])
    values = [value + 1, max(value - 1, 0), value * 8, 0, 2**63, 10**18, int(rng.integers(2**32))]
    head = raw[8:begin]
    head = head[: found.start()] + b"%d" % values[rng.integers(7)] + head[found.end() :]
    return len(head).to_bytes(8, "little") + head + raw[begin:]


def change_the_outer_header(rng, raw, begin, other):
    """What safetensors itself says of the tensors, which no checksum covers."""
    head = json.loads(raw[8:begin])
    names = [name for name in head if name != "__metadata__"]
    one, two = rng.choice(names, 2, replace=False)
    match rng.integers(6):
        case 0:
            head[one], head[two] = head[two], head[one]
        case 1:
            head[one]["dtype"] = str(rng.choice(["U8", "I8", "F16", "BF16", "F32", "F64", "I64"]))
        case 2:
            head[one]["shape"] = [1, *head[one]["shape"]]
        case 3:
            head[one]["data_offsets"] = head[two]["data_offsets"]
        case 4:
            head[one + "x"] = head.pop(one)
        case 5:
            del head[one]
    return join(head, raw[begin:])


def write_the_header_otherwise(rng, raw, begin, other):
    """The control: other spaces and another order say the same."""
    head = json.loads(raw[8:begin])
    names = rng.permutation(list(head)).tolist()
    shuffled = {name: head[name] for name in names}
    return join(shuffled, raw[begin:], indent=int(rng.integers(3)))


def join(head, tensors, **options):
    text = json.dumps(head, **options).encode()
    return len(text).to_bytes(8, "little") + text + tensors


DAMAGES = [
    flip_bits, overwrite, truncate, extend, swap_chunks, duplicate_chunk, remove_chunk, splice,
    change_an_integer, change_the_outer_header, write_the_header_otherwise,
]  # fmt: skip
REASONS = [
    "are no safetensors file", "a header of .* bytes in a file of", "the header is damaged",
    "bytes instead of", "its plan and its tensors differ", "the plan makes it",
    "its checksum does not fit", "does not follow the others",
    "not that of a safetensors file", "holds no packed model",
]  # fmt: skip


def attack(files, path, seed, count):
    """Damages files at random; outcomes by kind of damage, and reasons of refusal."""
    rng = np.random.default_rng(seed)
    right = {}
    for name, raw in files.items():
        path.write_bytes(raw)
        with load(path) as opened:
            right[name] = contents(opened)
    outcomes, reasons = collections.Counter(), collections.Counter()
    names = list(files)
    for number in range(count):
        damage = DAMAGES[number % len(DAMAGES)]
        name, other = rng.choice(names, 2, replace=False)
        raw = files[name]
        begin = 8 + int.from_bytes(raw[:8], "little")
        damaged = damage(rng, raw, begin, files[other])
        path.write_bytes(damaged)
        where = f"seed {seed}, number {number}: {damage.__name__} of '{name}'"
        try:
            with load(path) as opened:
                found = contents(opened)
        except PackedFileError as error:
            outcomes[damage.__name__, "refused"] += 1
            patterns = (x for x in REASONS if re.search(f"^{path}.*{x}", str(error), re.DOTALL))
            reasons[next(patterns, str(error))] += 1
        except BaseException as error:
            raise AssertionError(where) from error
        else:
            # A splice behind the last difference is the whole other file.
            assert found == right[name] or damaged == files[other], where
            outcomes[damage.__name__, "same bytes" if damaged == raw else "same model"] += 1
    return outcomes, reasons


def check_attack(outcomes, reasons):
    for damage in DAMAGES[:-1]:
        assert outcomes[damage.__name__, "refused"] > 0
    control = write_the_header_otherwise.__name__
    assert {outcome for name, outcome in outcomes if name == control} == {"same model"}
    unrefused = {name for name, outcome in outcomes if outcome == "same model"}
    # The other files may end alike, and a tensor may be given the type that it has.
    assert unrefused <= {control, "splice", "change_the_outer_header"}
    assert set(reasons) <= set(REASONS)
    assert set(REASONS[1:7]) <= set(reasons)


def test_raw_damage(files, tmp_path):
    check_attack(*attack(files, tmp_path / "x", seed=0, count=2000))


@pytest.mark.slow
def test_much_raw_damage(files, tmp_path):
    outcomes, reasons = attack(files, tmp_path / "x", seed=1, count=100_000)
    for (damage, outcome), count in sorted(outcomes.items()):
        print(f"{damage:30} {outcome:12} {count:7,}")
    for reason, count in reasons.most_common():
        print(f"{count:7,} {reason}")
    check_attack(outcomes, reasons)


# Forged files: edits of the header, and of bytes, as plain data that hypothesis can shrink.

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


@contextlib.contextmanager
def limits(size):
    """Five seconds of processor time, and memory in proportion to the file's size.

    Beside that, what Python and JAX keep of a compilation, which no file can make larger.
    """

    def stop(number, frame):
        raise AssertionError("it takes more than 5 s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 5)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert peak < 16 * 2**20 + 200 * size


def outcome(path, raw):
    """Reads all of a file in every way; what is loaded must be finite and of the plan's shapes."""
    path.write_bytes(raw)
    found, messages = collections.Counter(), []
    with limits(len(raw)):
        try:
            with load(path) as opened:
                assert hash(opened.plan) == hash(opened.plan)
                for read in (opened.verify, opened.read, opened.state, opened.bits, opened.decode):
                    try:
                        result = read()
                    except PackedFileError as error:
                        messages.append(str(error))
                        found["refused when read"] += 1
                    except ValueError as error:
                        if "give load(..., like=" not in str(error):
                            raise
                        found["needs like="] += 1
                    else:
                        if read == opened.decode:
                            check_decoded(opened.plan, leaves_by_path(result))
                        found["loaded"] += 1
        except PackedFileError as error:
            messages.append(str(error))
            found["refused"] += 1
    assert all(message.startswith(str(path)) for message in messages)
    return found


def check_decoded(plan, decoded):
    assert set(decoded) == {leaf.path for leaf in plan.leaves}
    for leaf in plan.leaves:
        assert (decoded[leaf.path].shape, decoded[leaf.path].dtype) == (leaf.shape, leaf.dtype)
        if leaf.path in plan.compressed:
            assert np.isfinite(np.asarray(decoded[leaf.path], np.float32)).all()


def run_forgeries(files, path, examples, derandomize):
    seen = collections.Counter()

    @settings(
        max_examples=examples, database=None, deadline=None, derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(sorted(files)), st.lists(edits, min_size=1, max_size=4))
    def run(name, changes):
        found = outcome(path, forged(files[name], changes))
        seen.update(found)
        seen.update({(change[0], kind) for change, kind in itertools.product(changes, found)})

    run()
    return seen


def check_forgeries(seen):
    # Every kind of edit is refused, and some are let pass: those that change what is valid.
    for kind in ("put", "remove", "repeat", "copy", "shape", "quantizer", "rule", "structure"):
        assert seen[kind, "refused"] + seen[kind, "refused when read"] > 0
    for kind in ("put", "swap rows", "quantizer", "bytes"):
        assert seen[kind, "loaded"] > 0
    for kind in ("refused", "refused when read", "loaded"):
        assert seen[kind] > 0


def test_forged_files(files, tmp_path):
    check_forgeries(run_forgeries(files, tmp_path / "x", 600, derandomize=True))


@pytest.mark.slow
def test_many_forged_files(files, tmp_path):
    seen = run_forgeries(files, tmp_path / "x", 5000, derandomize=False)
    for kind, count in sorted(seen.items(), key=str):
        print(f"{count:7,} {kind}")
    check_forgeries(seen)


def test_a_file_that_is_not_forged_loads(files, tmp_path):
    """What the forging itself does to a file is nothing."""
    for raw in files.values():
        assert set(outcome(tmp_path / "x", forged(raw, []))) == {"loaded"}
        assert set(outcome(tmp_path / "x", raw)) == {"loaded"}


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_are_not_matched(pattern, files, tmp_path):
    change = ("rule", (4, "pattern"), pattern)
    found = outcome(tmp_path / "x", forged(files["plain"], [change]))
    compiles = pattern in EVIL[:3]
    assert set(found) == ({"loaded"} if compiles else {"refused"})
