"""What a packed file stores, by name of leaf or entry: every byte is checked before it counts."""

import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ssvq_jax.bitstream import pack_bits
from ssvq_jax.packing import entropy
from ssvq_jax.packing.container import Container
from ssvq_jax.packing.errors import PackedFileError
from ssvq_jax.packing.header import (
    CHECKSUM,
    HEADER,
    Header,
    header_from_text,
    start_checksum,
)
from ssvq_jax.packing.segments import STATE, Segment, make_layout
from ssvq_jax.quantizers.streams import check_streams, stream_shape
from ssvq_jax.tree import LeafSpec


class Stored:
    """The content of an open packed file.

    Args:
        path: the file.

    Attributes:
        container: the file.
        header: what it says of itself.
        layout: where everything lies.

    Raises:
        PackedFileError: if it is no packed model, or its header is damaged.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.container = Container(path)
        try:
            self.header = _open_header(self.container)
            header = self.header
            self.layout = make_layout(header.plan, header.stored, header.coded, header.state)
            self._starts = self.container.check(self.layout)
        except BaseException:
            self.container.close()
            raise
        self._entries = {entry.name: entry for entry in header.plan.entries}

    def streams(self, name: str) -> dict[str, np.ndarray]:
        """Reads what is stored of an entry: see `Packed.streams`.

        Raises:
            PackedFileError: if it is damaged.
        """
        entry = self._entries[name]
        streams = {}
        for segment, content in self._contents(name):
            stream = segment.stream
            assert stream is not None  # of an entry, as the layout has it
            if stream.field in self.header.coded.get(name, {}):
                content = self._uncode(segment, content)
            array = np.frombuffer(content, np.uint8 if stream.values else jnp.dtype(stream.dtype))
            streams[stream.field] = array.reshape(stream_shape(stream, entry.spec))
        try:
            check_streams(entry.quantizer, streams, entry.nameless)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None
        return streams

    def dense(self, leaf: LeafSpec) -> np.ndarray:
        """Reads a dense leaf in the dtype that it is stored in."""
        return self._whole(leaf.path, leaf)

    def state(self) -> dict[str, np.ndarray]:
        """Reads the arrays of the model's other collections, by their paths."""
        return {leaf.path: self._whole(STATE + leaf.path, leaf) for leaf in self.header.state}

    def verify(self) -> None:
        """Reads everything and keeps nothing.

        Raises:
            PackedFileError: naming the first leaf that is damaged.
        """
        for owner in self.layout.segments:
            if owner in self._entries:
                self.streams(owner)
            else:
                self._contents(owner)

    def _whole(self, owner: str, leaf: LeafSpec) -> np.ndarray:
        ((segment, content),) = self._contents(owner)
        return np.frombuffer(content, jnp.dtype(segment.dtype)).reshape(leaf.shape)

    def _contents(self, owner: str) -> list[tuple[Segment, bytes]]:
        """Bytes of all segments of an owner, checked."""
        sums = start_checksum(owner)
        contents = []
        for segment in self.layout.segments[owner]:
            start = self._starts[segment.tensor] + segment.start
            what = f"tensor '{segment.tensor}' of '{owner}'"
            contents.append((segment, self.container.read(start, segment.size, what)))
            sums = zlib.crc32(contents[-1][1], sums)
        if sums != self.header.checksums[owner]:
            tensors = " or ".join(f"'{segment.tensor}'" for segment, _ in contents)
            raise self._damaged(owner, f"its checksum does not fit tensor {tensors}")
        return contents

    def _uncode(self, segment: Segment, content: bytes) -> bytes:
        stream = segment.stream
        assert stream is not None  # coded fields are checked with the header
        assert stream.values is not None
        try:
            numbers = entropy.decode(content, stream.values, stream.count)
        except ValueError as error:
            raise self._damaged(segment.owner, f"its {stream.field}: {error}") from error
        return pack_bits(numbers.reshape(stream.slices, -1), stream.width).tobytes()

    def _damaged(self, owner: str, reason: str) -> PackedFileError:
        return PackedFileError(f"{self.container.path}: '{owner}' is damaged: {reason}")


def is_packed(path: str | Path) -> bool:
    """Whether a file says of itself that it is a packed model; it may be damaged all the same."""
    try:
        container = Container(Path(path))
    except (PackedFileError, OSError):
        return False
    container.close()
    return HEADER in container.metadata or CHECKSUM in container.metadata


def _open_header(container: Container) -> Header:
    text = container.metadata.get(HEADER)
    if text is None:
        raise PackedFileError(
            f"{container.path} is a safetensors file, but holds no packed model: plain weights "
            "can be compressed with `ssvq compress --weights`"
        )
    if f"{zlib.crc32(text.encode()):08x}" != container.metadata.get(CHECKSUM):
        raise PackedFileError(f"{container.path}: the header is damaged: its checksum differs")
    try:
        return header_from_text(text)
    except PackedFileError as error:
        raise PackedFileError(f"{container.path}: {error}") from error
