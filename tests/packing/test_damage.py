"""Files that are no packed files, or damaged ones: named, with what is lost."""

import collections
import json
import os
import zlib

import numpy as np
import pytest
from forging import put_together, refused, take_apart
from packed_models import pack, same, weight
from random_models import randomly_packed
from safetensors.numpy import save_file

import ssvq_jax
from ssvq_jax import PackedFileError, SignSplit, load, save


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"1234567", "7 bytes are no safetensors file"),
        (b"This is a text.", "a header of .* in a file of 15: it is cut off, or no safetensors"),
        ((2**63).to_bytes(8, "little"), r"a header of 9,223,372,036,854,775,808 bytes in a file"),
        ((4).to_bytes(8, "little") + b"true", "the header is not that of a safetensors file"),
        ((4).to_bytes(8, "little") + b"\xff\xff{}", "the header is damaged"),
        ((999).to_bytes(8, "little") + b"[" * 999, "the header is damaged"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "the header is damaged"),
        ((2).to_bytes(8, "little") + b"{}", "holds no packed model: .* `ssvq compress --weights`"),
        (
            (23).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}'[:23],
            "the header is damaged",
        ),
        (
            (24).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}',
            "the header is not that of a safetensors file",
        ),
    ],
)
def test_what_is_no_packed_file(content, message, tmp_path):
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", message)


def test_plain_weights_are_named(tmp_path):
    save_file({"w": np.ones(3)}, tmp_path / "x")
    refused(tmp_path / "x", "is a safetensors file, but holds no packed model: .*--weights")


def test_a_folder_a_pipe_and_nothing_are_named(tmp_path):
    refused(tmp_path, "is a folder: give a .safetensors file")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no regular file")


def test_a_file_that_is_cut_off_or_continued(file):
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for size in (header - 1, header // 2, 9):
        file.write_bytes(raw[:size])
        refused(file, "a header of .* bytes in a file of .*: it is cut off")
    for content in (raw[:-1], raw[:header], raw + b"\0", raw + raw):
        file.write_bytes(content)
        refused(
            file, f"{len(content):,} bytes instead of {len(raw):,}: it is cut off, or has something"
        )


def test_every_changed_byte_of_the_header_is_noticed(packed, file):
    raw = bytearray(file.read_bytes())
    size = 8 + int.from_bytes(raw[:8], "little")
    kept, messages = [], []
    for position in range(size):
        raw[position] ^= 1
        file.write_bytes(raw)
        raw[position] ^= 1
        try:
            with load(file) as opened:
                assert same(opened.read(), packed)  # a space is as good as another
                kept.append(position)
        except PackedFileError as error:
            messages.append(str(error))
    assert kept == []
    assert all(message.startswith(str(file)) for message in messages)


def owners(opened):
    """A function an owner of bytes that reads what it owns."""
    dense = [leaf.path for leaf in opened.plan.leaves if leaf.path not in opened.plan.compressed]
    entries = {e.name: lambda e=e: opened.streams(e.name) for e in opened.plan.entries}
    return entries | {path: lambda path=path: opened.dense(path) for path in dense}


def test_every_byte_belongs_to_one_owner_that_alone_is_lost_with_it(packed, file):
    raw = bytearray(file.read_bytes())
    with load(file) as opened:
        begin, right = opened.header_bytes, {n: read() for n, read in owners(opened).items()}
    lost = collections.Counter()
    for position in range(begin, len(raw)):
        raw[position] ^= 1 << position % 8
        file.write_bytes(raw)
        raw[position] ^= 1 << position % 8
        with load(file) as opened:  # the header is right
            damaged = []
            for name, read in owners(opened).items():
                try:
                    assert same(read(), right[name])
                except PackedFileError as error:
                    damaged.append((name, str(error)))
            ((name, message),) = damaged
            assert message.startswith(f"{file}: '{name}' is damaged: its checksum does not fit")
            lost[name] += 1
            with pytest.raises(PackedFileError, match=f"'{name}' is damaged"):
                opened.verify()
    assert lost == {row.name: row.stored_bytes for row in packed.bits().rows} | {
        "pairs": sum(x.nbytes for x in packed.streams["pairs"].values())
    }


def test_the_damaged_leaf_is_named_with_its_tensor_and_the_others_load(packed, file):
    outer, header, tensors = take_apart(file.read_bytes())
    codes = bytearray(tensors["codes"])
    codes[-1] ^= 1  # the shared codes come last
    text = json.dumps(header)
    file.write_bytes(put_together(outer, text, tensors | {"codes": bytes(codes)}))
    with load(file) as opened:
        for path in ("pair/a", "pair/b"):
            with pytest.raises(PackedFileError, match="'pairs' is damaged: .* tensor 'codes' or"):
                opened.leaf(path)
        for whole in (opened.decode, opened.read, opened.verify):
            with pytest.raises(PackedFileError, match="'pairs' is damaged"):
                whole()
        for path in ("head", "stack", "blocks/0/kernel", "norm"):
            expected = ssvq_jax.tree.leaves_by_path(packed.decode())[path]
            assert same(opened.leaf(path), expected)


def test_swapped_tensors_are_named(file):
    outer, header, tensors = take_apart(file.read_bytes())
    # As the safetensors header has them: another name on the same bytes.
    ours, theirs = "codebook.int8", "signs"
    swapped = outer | {ours: outer[theirs], theirs: outer[ours]}
    file.write_bytes(put_together(swapped, json.dumps(header), tensors))
    refused(file, f"tensor '({ours}|{theirs})' is .*, and the plan makes it ")


def test_swapped_tensors_of_one_size_and_dtype_are_named(tmp_path):
    params = {"w": weight(0, (16, 16))}  # 2 bits for two weights, as many as their signs take
    rng = np.random.default_rng(0)
    save(tmp_path / "x", randomly_packed(params, [("w", SignSplit(4, 2))], rng))
    outer, header, tensors = take_apart((tmp_path / "x").read_bytes())
    assert len(tensors["codes"]) == len(tensors["signs"])
    swapped = outer | {"codes": outer["signs"], "signs": outer["codes"]}
    (tmp_path / "x").write_bytes(put_together(swapped, json.dumps(header), tensors))
    message = "'w' is damaged: its checksum does not fit tensor 'codes' or .*'signs'"
    refused(tmp_path / "x", message, lambda opened: opened.leaf("w"))


def test_swapped_leaves_of_one_shape_are_named(tmp_path):
    params = {"a": weight(), "b": weight(1)}
    save(tmp_path / "x", pack(params, [(".*", None)]))
    outer, header, tensors = take_apart((tmp_path / "x").read_bytes())
    whole = tensors["dense.float32"]
    half = len(whole) // 2
    (tmp_path / "x").write_bytes(
        put_together(outer, json.dumps(header), {"dense.float32": whole[half:] + whole[:half]})
    )
    refused(tmp_path / "x", "'a' is damaged: its checksum", lambda opened: opened.leaf("a"))
    rows = header["leaves"]
    rows[0][5], rows[1][5] = rows[1][5], rows[0][5]  # a checksum is of the name, too
    (tmp_path / "x").write_bytes(
        put_together(outer, json.dumps(header), {"dense.float32": whole[half:] + whole[:half]})
    )
    refused(tmp_path / "x", "'b' is damaged: its checksum", lambda opened: opened.leaf("b"))


def test_the_name_of_a_leaf_is_in_its_checksum(file):
    """A header of our own, renamed with right sums of the contents alone: not the leaf."""
    raw = file.read_bytes()
    outer, header, tensors = take_apart(raw)
    row = next(row for row in header["leaves"] if row[0] == "norm")
    row[5] = zlib.crc32(tensors["dense.bfloat16"])
    file.write_bytes(put_together(outer, json.dumps(header), tensors))
    refused(file, "'norm' is damaged: its checksum", lambda opened: opened.leaf("norm"))
