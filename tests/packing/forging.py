"""Packed files taken apart and put together again, with every checksum right if wished."""

import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from ssvq_jax.packing import PackedFile, PackedFileError, load
from ssvq_jax.packing.header import header_from_text
from ssvq_jax.packing.segments import DTYPES, STATE, Layout, make_layout

HEADER, CHECKSUM = "ssvq_jax", "ssvq_jax_crc32"
_MOST_BYTES = 1 << 20  # tensors of a forged plan that are really written


def take_apart(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """The safetensors header, the packed model's header, and the tensors' bytes."""
    size = int.from_bytes(raw[:8], "little")
    outer = json.loads(raw[8 : 8 + size])
    texts = outer.pop("__metadata__")
    tensors = {}
    for name, found in outer.items():
        begin, end = found["data_offsets"]
        tensors[name] = raw[8 + size + begin : 8 + size + end]
    return outer, json.loads(texts[HEADER]), tensors


def put_together(
    outer: dict[str, Any], text: str, tensors: dict[str, bytes], checksum: str | None = None
) -> bytes:
    """A safetensors file with tensors one after the other, as ``outer`` describes them."""
    texts = {HEADER: text, CHECKSUM: checksum or crc32(text)}
    head = json.dumps({"__metadata__": texts, **outer}).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(tensors.values())


def describe(tensors: dict[str, bytes], dtypes: dict[str, str]) -> dict[str, Any]:
    """A safetensors header's part on tensors that lie one after the other."""
    outer, begin = {}, 0
    for name, content in tensors.items():
        end = begin + len(content)
        count = len(content) // jnp.dtype(dtypes[name]).itemsize
        outer[name] = {
            "dtype": DTYPES[dtypes[name]], "shape": [count], "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    return outer


def forge(raw: bytes, header: dict[str, Any], tensors: dict[str, bytes]) -> bytes:
    """The file with another header and other bytes: sizes, offsets and checksums are all right.

    Where the header is one that no plan can be read from, or claims more than a mebibyte, there are
    no right sizes, and the tensors stay as they are given.
    """
    outer = take_apart(raw)[0]
    try:
        layout = layout_of(header)
    except PackedFileError:
        return put_together(outer, json.dumps(header), tensors)
    dtypes = {name: dtype for name, (dtype, _) in layout.tensors.items()}
    sizes = {n: count * jnp.dtype(dtypes[n]).itemsize for n, (_, count) in layout.tensors.items()}
    if sum(sizes.values()) > _MOST_BYTES:
        return put_together(outer, json.dumps(header), tensors)
    fitted = {name: tensors.get(name, b"")[:n].ljust(n, b"\0") for name, n in sizes.items()}
    _renew_checksums(header, layout, fitted)
    return put_together(describe(fitted, dtypes), json.dumps(header), fitted)


def changed(file: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Writes the file with a changed header, all checksums and sizes renewed."""
    raw = file.read_bytes()
    _, header, tensors = take_apart(raw)
    change(header)
    file.write_bytes(forge(raw, header, tensors))


def refused(
    file: pathlib.Path, message: str, read: Callable[[PackedFile], Any] = lambda file: None
) -> None:
    """Opens and reads a file that must be refused."""
    with pytest.raises(PackedFileError, match=message) as caught, load(file) as opened:
        read(opened)
    assert str(caught.value).startswith(str(file))


def layout_of(header: dict[str, Any]) -> Layout:
    """Where everything lies in a file of this header."""
    parsed = header_from_text(json.dumps(header))
    try:
        return make_layout(parsed.plan, parsed.stored, parsed.coded, parsed.state)
    except ValueError as error:
        raise PackedFileError(str(error)) from error


def crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def _renew_checksums(header: dict[str, Any], layout: Layout, tensors: dict[str, bytes]) -> None:
    leaves = {row[0]: row for row in header["leaves"]}
    states = {STATE + row[0]: row for row in header["state"]}
    for owner, segments in layout.segments.items():
        sums = zlib.crc32(owner.encode(errors="surrogatepass"))
        for segment in segments:
            content = tensors[segment.tensor][segment.start : segment.start + segment.size]
            sums = zlib.crc32(content, sums)
        if owner in leaves:
            leaves[owner][5] = sums
        elif owner in states:
            states[owner][3] = sums
        else:
            header["shares"][owner] = sums
