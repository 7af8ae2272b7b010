"""Loading a packed model: the tree it was, leaf by leaf, on the devices it is wanted on."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ssvq_jax import tree
from ssvq_jax.bits import BitsTable
from ssvq_jax.entries import Entry, SharedEntry
from ssvq_jax.packing.errors import PackedFileError
from ssvq_jax.packing.stored import Stored
from ssvq_jax.packing.structure import Structure, in_structure_of, rebuild
from ssvq_jax.plan import Packed, Plan
from ssvq_jax.quantizers.base import in_range
from ssvq_jax.quantizers.streams import decode_streams
from ssvq_jax.tree import LeafSpec, PyTree


class PackedFile:
    """A packed model in an open file. Made by `load`; usable in a ``with`` statement.

    Reading one leaf reads and checks the bytes of this leaf alone, and everything that is read
    is checked first: checksums, codes within their codebooks, scales finite.

    Attributes:
        path: the file.
        plan: what is compressed how.
        model: what the model is, as it was given to `save`.
        metrics: figures that were measured with it, as they were given to `save`.
        file_bytes: size of the file.
        header_bytes: what comes before the weights.
    """

    def __init__(self, path: Path, like: PyTree, sharding: Any) -> None:
        self.path = path
        self._stored = Stored(path)
        container, header = self._stored.container, self._stored.header
        self.plan: Plan = header.plan
        self._specs = {leaf.path: leaf for leaf in self.plan.leaves}
        if like is not None:  # refused before anything is read
            try:
                self.check_fits(like)
            except ValueError:
                self.close()
                raise
        self.model = dict(header.model)
        self.metrics = dict(header.metrics)
        self.file_bytes = container.file_bytes
        self.header_bytes = container.header_bytes
        self._like = like
        self._sharding = sharding
        self._owners = {x.path: entry for entry in self.plan.entries for x in entry.leaves}

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PackedFile({str(self.path)!r}, {self.file_bytes:,} bytes)"

    def close(self) -> None:
        """Closes the file."""
        self._stored.container.close()

    def decode(self) -> PyTree:
        """Decodes the parameter tree, one leaf after the other.

        Returns:
            The tree, with the user's structure, shapes and dtypes, in the sharding given to `load`.

        Raises:
            PackedFileError: naming the leaf that is damaged.
            ValueError: if the structure can only be given back with ``like=``.
        """
        self._tree(dict.fromkeys(self._specs))  # what cannot be given back is said before the work
        leaves = dict(self.leaves())
        return self._tree({path: leaves[path] for path in self._specs})

    def leaves(self) -> Iterator[tuple[str, Array]]:
        """Decodes all leaves by leaf path, compressed ones first; leaves of one share together.

        Raises:
            PackedFileError: naming the leaf that is damaged.
        """
        shardings = self._shardings()
        for entry in self.plan.entries:
            yield from self._decoded(entry, shardings).items()
        dense = {path: self._cast(path) for path in self._specs if path not in self._owners}
        yield from _put(dense, shardings).items()  # at once: most are small

    def leaf(self, path: str) -> Float[Array, "..."]:
        """Decodes one leaf; one that shares a codebook with others is decoded with them.

        Raises:
            PackedFileError: if it is damaged.
            ValueError: if there is none of this path.
        """
        if path not in self._specs:
            some = ", ".join(list(self._specs)[:5])
            raise ValueError(f"{self.path} has no leaf '{path}'; it has {some}, ...")
        entry, shardings = self._owners.get(path), self._shardings()
        if entry is None:
            return _put({path: self._cast(path)}, shardings)[path]
        return self._decoded(entry, shardings)[path]

    def read(self) -> Packed:
        """Reads everything as it is stored, on the host.

        Raises:
            PackedFileError: naming the leaf that is damaged.
            ValueError: if the structure can only be given back with ``like=``.
        """
        streams = {entry.name: self.streams(entry.name) for entry in self.plan.entries}
        leaves = {path: None if path in self._owners else self.dense(path) for path in self._specs}
        return Packed(self.plan, self._tree(leaves), streams)

    def streams(self, name: str) -> dict[str, np.ndarray]:
        """Reads what is stored of an entry: see `Packed.streams`.

        Raises:
            PackedFileError: if it is damaged.
            ValueError: if there is no entry of this name.
        """
        names = [entry.name for entry in self.plan.entries]
        if name not in names:
            raise ValueError(f"{self.path} has no entry '{name}'; it has {names[:5]}")
        return self._stored.streams(name)

    def dense(self, path: str) -> np.ndarray:
        """Reads a dense leaf in the dtype that it is stored in.

        Raises:
            PackedFileError: if it is damaged.
            ValueError: if there is no dense leaf of this path.
        """
        if path not in self._specs or path in self._owners:
            raise ValueError(f"{self.path} has no dense leaf '{path}'")
        return self._stored.dense(self._specs[path])

    def state(self) -> PyTree:
        """Reads the model's other collections, as they were given to `save`; None without any.

        Raises:
            PackedFileError: if they are damaged.
        """
        return self._rebuild(self._stored.header.state_structure, self._stored.state())

    def verify(self) -> None:
        """Reads everything and keeps nothing.

        Raises:
            PackedFileError: naming the first leaf that is damaged.
        """
        self._stored.verify()

    def bits(self) -> BitsTable:
        """Counts the bits that the file holds of every leaf, the header aside."""
        rows = []
        for row in self.plan.bits().rows:
            bits: dict[str, int] = {}
            for segment in self._stored.layout.segments[row.name]:
                field = segment.dtype if segment.stream is None else segment.stream.field
                bits[field] = 8 * segment.size
            rows.append(dataclasses.replace(row, bits=bits))
        return BitsTable(tuple(rows))

    def plain_bytes(self) -> int:
        """Bytes that the weights would take without entropy coding, the header aside."""
        coded = self._stored.header.coded
        return self.bits().stored_bytes + sum(
            stream.bytes - coded[entry.name][stream.field]
            for entry in self.plan.entries
            for stream in entry.storage.streams
            if stream.field in coded.get(entry.name, {})
        )

    def check_fits(self, params: PyTree) -> None:
        """Compares the leaves with those of a model.

        Args:
            params: the model's parameters, or their shapes.

        Raises:
            ValueError: naming a leaf that is missing or of another shape.
        """
        in_structure_of(params, self._specs)
        for path, leaf in tree.leaves_by_path(params).items():
            if tuple(np.shape(leaf)) != self._specs[path].shape:
                raise ValueError(
                    f"{self.path}: leaf '{path}' is {list(self._specs[path].shape)} "
                    f"there and {list(np.shape(leaf))} in the model"
                )

    def coded(self, name: str) -> dict[str, int]:
        """Bytes of the entropy-coded fields of an entry."""
        return dict(self._stored.header.coded.get(name, {}))

    def _cast(self, path: str) -> np.ndarray:
        """A dense leaf in its own dtype."""
        return in_range(self.dense(path), self._specs[path].dtype)

    def _decoded(self, entry: Entry, shardings: dict[str, Any]) -> dict[str, Array]:
        """The leaves of an entry, where they are to be."""
        streams = self.streams(entry.name)
        if not shardings:
            return entry.decode(streams)
        if isinstance(entry, SharedEntry):
            return _put(entry.decode(streams), shardings)
        decode = _decode_onto(entry.quantizer, entry.nameless, shardings[entry.name])
        return entry.scatter(decode(streams))

    def _shardings(self) -> dict[str, Any]:
        """Sharding by leaf path."""
        if self._sharding is None:
            return {}
        if isinstance(self._sharding, jax.sharding.Sharding):
            found = dict.fromkeys(self._specs, self._sharding)
        else:
            found = tree.leaves_by_path(self._sharding)
        different = sorted(set(found) ^ set(self._specs))
        if different:
            where = "the file" if different[0] in self._specs else "sharding="
            raise ValueError(
                f"leaf '{different[0]}' is only in {where}: give load() one sharding, or a tree of "
                "them with the leaves of the model"
            )
        for path, sharding in found.items():
            shape = self._specs[path].shape
            try:
                sharding.shard_shape(shape)
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"leaf '{path}' of shape {shape} cannot lie in {sharding}: {error}"
                ) from error
        return found

    def _tree(self, leaves: dict[str, Any]) -> PyTree:
        if self._like is not None:
            return in_structure_of(self._like, leaves)
        return self._rebuild(self._stored.header.structure, leaves)

    def _rebuild(self, structure: Structure, leaves: dict[str, Any]) -> PyTree:
        if isinstance(structure, dict) and "other" in structure:
            raise ValueError(
                f"{self.path}: the tree has nodes of type {structure['other']}: give "
                "load(..., like=params), a tree of arrays or shapes of this model"
            )
        try:
            return rebuild(structure, leaves)
        except (ValueError, TypeError) as error:
            raise PackedFileError(f"{self.path}: {error}") from error


def load(path: str | Path, *, like: PyTree = None, sharding: Any = None) -> PackedFile:
    """Opens a packed model. Its header is read and checked now, weights when they are asked for.

    Args:
        path: a file that `save` wrote.
        like: a tree of the model's structure (arrays or shapes), for trees that have other nodes
            than dictionaries, lists and tuples.
        sharding: a ``jax.sharding.Sharding`` for all leaves, or a tree of them: where leaves are
            decoded to. By default to the default device.

    Returns:
        The open file; ``.decode()`` gives the parameter tree.

    Raises:
        PackedFileError: if it is no packed model, or damaged.
        ValueError: if ``like`` is not a tree of this model.
        OSError: if there is no such file, or it cannot be opened.

    Example:
        >>> import tempfile
        >>> from ssvq_jax import Uniform, make_plan, save
        >>> params = {"kernel": jax.numpy.ones((8, 8)), "bias": jax.numpy.zeros(8)}
        >>> plan = make_plan(params, [("kernel", Uniform(bits=4)), ("bias", None)])
        >>> packed = plan.finalize(plan.init(jax.random.key(0), params))
        >>> folder = tempfile.TemporaryDirectory()
        >>> save(folder.name + "/model.safetensors", packed, metrics={"accuracy": 0.5})
        >>> with load(folder.name + "/model.safetensors") as file:
        ...     print(file.metrics, file.leaf("kernel").shape, sorted(file.decode()))
        {'accuracy': 0.5} (8, 8) ['bias', 'kernel']
        >>> folder.cleanup()
    """
    return PackedFile(Path(path), like, sharding)


def _put(leaves: dict[str, Any], shardings: dict[str, Any]) -> dict[str, Array]:
    """Places leaves by leaf path."""
    where = {path: shardings[path] for path in leaves} if shardings else None
    return jax.device_put(leaves, where)


@functools.lru_cache(maxsize=256)
def _decode_onto(quantizer: Any, spec: LeafSpec, sharding: Any) -> Any:
    """Decodes where the parts of the weight are to be: no device holds more than its own."""
    decode = functools.partial(decode_streams, quantizer, spec=spec)
    return jax.jit(decode, out_shardings=sharding)
