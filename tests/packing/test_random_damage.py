"""Packed files with random damage: the very same model, or an error; never anything else.

The checksums find it; forged files, whose checksums are right, are in `test_random_forgeries.py`.
"""

import collections
import json
import re

import jax
import numpy as np
import pytest

from ssvq_jax import PackedFileError, load

pytestmark = pytest.mark.usefixtures("as_installed")  # checked annotations would refuse some first


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
