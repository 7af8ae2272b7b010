"""The quantizer protocol: frozen records with pure functions on one weight.

A method subclasses `Quantizer` and writes the five functions whose names begin with ``slice_``, for
one unstacked weight. The public functions of the base class lift them over stacked leaves, so a
method never sees a stacked axis. Every function is jit-able with the record and the spec static.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from ssvq_jax.bitstream import bytes_of
from ssvq_jax.quantizers.calibration import Calibration
from ssvq_jax.tree import LeafSpec

Fields = Mapping[str, Any]
ArrayT = TypeVar("ArrayT", Array, np.ndarray)
MOST_AXES = 32  # of a weight


class Encoded(NamedTuple):
    """A weight in a method's own terms.

    Attributes:
        learned: float arrays that gradients may train.
        fixed: integer and boolean arrays that they may not.
    """

    learned: dict[str, Array]
    fixed: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One field as it is stored: numbers of few bits side by side, or floats.

    Attributes:
        field: name of the field in `Quantizer.pack`.
        shape: shape of the field of one slice.
        dtype: dtype of the field: unsigned integers and booleans are stored in the bits that they
            need, all others as they are.
        values: how many different numbers there are, for unsigned integers and booleans.
        slices: slices that have such a field, each begun on a new byte.
        lookups: steps that a hardware decoder takes for each number: 1 to look up a row of a
            codebook, as many as it has coordinates to work off an index without one, 0 for a number
            that is used as it is.
    """

    field: str
    shape: tuple[int, ...]
    dtype: str
    values: int | None = None
    slices: int = 1
    lookups: int = 0

    @property
    def count(self) -> int:
        """How many numbers, over all slices."""
        return self.slices * self.slice_count

    @property
    def slice_count(self) -> int:
        """How many numbers a slice has."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bits of one number."""
        if self.values is not None:
            return (self.values - 1).bit_length()
        return 8 * jnp.dtype(self.dtype).itemsize

    @property
    def bits(self) -> int:
        """Bits of all numbers, without what fills their last bytes."""
        return self.count * self.width

    @property
    def slice_bytes(self) -> int:
        """Bytes of a slice."""
        return bytes_of(self.slice_count, self.width)

    @property
    def bytes(self) -> int:
        """Bytes of all slices: what the file holds."""
        return self.slices * self.slice_bytes


@dataclasses.dataclass(frozen=True)
class Storage:
    """Everything that is stored of a leaf, by field.

    Attributes:
        streams: the streams; their fields are those of `Quantizer.pack`.
    """

    streams: tuple[Stream, ...]

    @property
    def bits(self) -> int:
        """Bits of all streams."""
        return sum(stream.bits for stream in self.streams)

    def times(self, slices: int) -> "Storage":
        """Storage of as many equal weights."""
        return Storage(
            tuple(dataclasses.replace(s, slices=s.slices * slices) for s in self.streams)
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """How one slice may be cut into parts that `Quantizer.slice_requantize` encodes alone.

    Attributes:
        dim: weights of a sub-vector, which stay together; 1 where every weight has its own code.
        axis: the axis that sub-vectors run along.
        channels: axis of the learned fields that hold a number for each of its places; they are cut
            with it.
    """

    dim: int = 1
    axis: int = 0
    channels: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """A compression method with its hyper-parameters.

    Attributes:
        method: name in recipes (class attribute).
        groups: optimizer group of every learned field (class attribute); the groups are
            ``codebook``, ``sign``, ``scale`` and ``latent``.
    """

    method: ClassVar[str]
    groups: ClassVar[Mapping[str, str]]

    def init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None = None,
    ) -> Encoded:
        """Encodes a weight; clustering happens here.

        Args:
            key: typed PRNG key.
            weight: the leaf, of shape ``spec.shape``.
            spec: description of the leaf.
            calibration: what data say about it.

        Returns:
            Learned and fixed arrays; those of a stacked leaf carry its leading axes.
        """
        self.check(spec)
        if not spec.stacked:
            return self.slice_init(key, weight, spec, calibration)
        one = spec.slice_spec()
        lead = spec.shape[: spec.stacked]
        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[spec.stacked :]), (weight, calibration)
        )
        keys = jax.random.split(key, spec.slices)

        def encode(key: Key[Array, ""], slices: tuple[Array, Calibration | None]) -> Encoded:
            return self.slice_init(key, slices[0], one, slices[1])

        # One slice after the other: vmap would hold the clustering tiles of all slices at once.
        if isinstance(weight, Tracer):
            encoded = jax.lax.map(lambda each: encode(*each), (keys, flat))
        else:  # slices share the compiled clustering of all leaves of about their size
            parts = [
                encode(keys[i], jax.tree.map(lambda x, i=i: x[i], flat)) for i in range(spec.slices)
            ]
            encoded = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), encoded)

    def decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """Rebuilds the weight ``[spec.shape]``, differentiable in ``learned``.

        Straight-through estimators carry gradients through every rounding, so what training sees
        is what the finalized model computes.
        """
        one = spec.slice_spec()
        decode = _over_slices(lambda enc: self.slice_decode(enc[0], enc[1], one), spec.stacked)
        return in_range(decode((dict(learned), dict(fixed))), spec.dtype)

    def storage(self, spec: LeafSpec) -> Storage:
        """Counts the stored bits by field; needs no weights."""
        self.check(spec)
        return self.slice_storage(spec.slice_spec()).times(spec.slices)

    def pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, np.ndarray]:
        """Gives the exact stored fields, one number of `Stream.width` bits an element.

        Args:
            learned: trained arrays.
            fixed: integer and boolean arrays.
            spec: description of the leaf.

        Returns:
            Host arrays by field name: unsigned integers and booleans for codes and signs, the
            stored dtype for codebooks and scales.
        """
        one = spec.slice_spec()
        pack = _over_slices(lambda enc: self.slice_pack(enc[0], enc[1], one), spec.stacked)
        encoded = jax.tree.map(jnp.asarray, (dict(learned), dict(fixed)))
        return {name: np.asarray(field) for name, field in pack(encoded).items()}

    def unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Inverts `pack`: the result decodes to the same bits."""
        one = spec.slice_spec()
        unpack = _over_slices(lambda f: self.slice_unpack(f, one), spec.stacked)
        return unpack({k: jnp.asarray(v) for k, v in fields.items()})

    def exist(self, fields: Fields, spec: LeafSpec) -> Bool[Array, "*stacked"] | None:
        """Whether the numbers of several fields exist together, by slice; None if they all do."""
        one = spec.slice_spec()
        exist = _over_slices(lambda f: self.slice_exist(f, one), spec.stacked)
        return exist(dict(fields))

    def check(self, spec: LeafSpec) -> None:
        """Raises ValueError, naming the leaf, if the method cannot take a leaf of this shape."""
        if spec.size == 0:
            raise ValueError(f"leaf '{spec.path}' of shape {spec.shape} is empty: keep it dense")
        self.slice_check(dataclasses.replace(spec.slice_spec(), path=spec.path))

    @property
    @abc.abstractmethod
    def settings(self) -> str:
        """The main hyper-parameters, short and readable, for tables."""

    @abc.abstractmethod
    def slice_check(self, spec: LeafSpec) -> None:
        """Raises ValueError if one slice cannot be quantized."""

    @abc.abstractmethod
    def slice_init(
        self,
        key: Key[Array, ""],
        weight: Float[Array, "..."],
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Encodes one slice."""

    @abc.abstractmethod
    def slice_decode(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> Float[Array, "..."]:
        """Decodes one slice, in any float dtype."""

    @abc.abstractmethod
    def slice_storage(self, spec: LeafSpec) -> Storage:
        """Counts one slice's bits."""

    @abc.abstractmethod
    def slice_pack(self, learned: Fields, fixed: Fields, spec: LeafSpec) -> dict[str, Array]:
        """Gives one slice's stored fields."""

    def slice_exist(self, fields: Fields, spec: LeafSpec) -> Bool[Array, ""] | None:
        """Whether all stored numbers exist, for numbers of several fields.

        None, as by default, if each field's number of values says it all.
        """
        return None

    @abc.abstractmethod
    def slice_unpack(self, fields: Fields, spec: LeafSpec) -> Encoded:
        """Inverts ``slice_pack``."""

    def slice_parts(self, spec: LeafSpec) -> Parts:
        """How one slice may be cut into parts for `slice_requantize`.

        Raises:
            ValueError: naming the leaf, if the method encodes weights as a whole only.
        """
        raise self._whole_only(spec)

    def slice_requantize(
        self,
        weight: Float[Array, "..."],
        learned: Fields,
        spec: LeafSpec,
        calibration: Calibration | None,
    ) -> Encoded:
        """Encodes one slice, or a part of it, with the codebooks, steps and scales there are.

        Codes, masks, signs and latents are chosen anew, the nearest to ``weight``; a part has those
        that it would have in the slice. Methods that have it say so by `slice_parts`.

        Args:
            weight: of shape ``spec.shape`` and dtype ``spec.dtype``.
            learned: codebooks, steps and scales; those that `Parts.channels` names are those of
                this part. What belongs to single weights is not read.
            spec: description of the part.
            calibration: importance of its elements; only what it is within a sub-vector counts.

        Raises:
            ValueError: naming the leaf, if the method encodes weights as a whole only.
        """
        raise self._whole_only(spec)

    def _whole_only(self, spec: LeafSpec) -> ValueError:
        return ValueError(
            f"leaf '{spec.path}': weights of method '{self.method}' cannot be encoded in parts: "
            "choose another method, or leave the leaf out"
        )


def _over_slices(function: Callable[[Any], Any], stacked: int) -> Callable[[Any], Any]:
    """Lifts a function over as many leading axes."""
    for _ in range(stacked):
        function = jax.vmap(function)
    return function


def straight_through(
    value: Float[Array, "*shape"], surrogate: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Gives ``value`` exactly, with the gradient of ``surrogate`` (Bengio et al., 2013).

    The sum is exact, unlike ``surrogate + stop_gradient(value - surrogate)``: a finalized model
    must compute the very bits that training saw.
    """
    return jax.lax.stop_gradient(value) + (surrogate - jax.lax.stop_gradient(surrogate))


def in_range(weight: ArrayT, dtype: Any) -> ArrayT:
    """Converts decoded weights to a dtype; those beyond its range become its largest value.

    A codeword or the outermost level may lie beyond every weight that it stands for, and float16
    ends at 65,504: finite weights must not decode to infinity. NaN stays NaN.

    Example:
        >>> in_range(jnp.array([-1e5, 2.0]), jnp.float16).tolist()
        [-65504.0, 2.0]
    """
    if jnp.finfo(dtype).max < jnp.finfo(weight.dtype).max:
        limit = float(jnp.finfo(dtype).max)
        if weight.dtype.itemsize < 4:  # bfloat16 has no 65,504
            weight = weight.astype(jnp.float32)
        weight = weight.clip(-limit, limit)
    return weight.astype(dtype)


def round_scale(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds float32 scales to the 16 bits that are stored, straight-through.

    The stored type is bfloat16: it has float32's range, so no scale under- or overflows, however
    small the weights. (``reduce_precision``, since XLA may drop a pair of conversions.)
    """
    return straight_through(jax.lax.reduce_precision(scale, 8, 7), scale)


def check_channel_axis(axis: int, spec: LeafSpec) -> None:
    """Raises ValueError, naming the leaf, if it lacks the axis of its output channels."""
    if not -len(spec.shape) <= axis < len(spec.shape):
        raise ValueError(
            f"leaf '{spec.path}' of shape {spec.shape} has no channel_axis {axis}: choose another, "
            "or keep the leaf dense"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError, naming the value, unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: it must be True or False")


def check_integer(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    """Raises ValueError, naming the value, unless it is a whole number in the range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f"{least} to {most}" if most is not None else f"at least {least}"
        raise ValueError(f"{name}={value!r}: it must be a whole number, {bound}")
