"""Compression methods under one protocol: one file a method, one entry in the registry."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssvq_jax.quantizers.base import Encoded, Quantizer, Storage, Stream
from ssvq_jax.quantizers.calibration import Calibration, InputMoments
from ssvq_jax.quantizers.channel_relaxed import ChannelRelaxed
from ssvq_jax.quantizers.channel_relaxed_sign_split import ChannelRelaxedSignSplit
from ssvq_jax.quantizers.masked import Masked, MaskedSignSplit
from ssvq_jax.quantizers.pyramid_vector import Pyramid
from ssvq_jax.quantizers.sign_split import SignSplit
from ssvq_jax.quantizers.uniform import Uniform
from ssvq_jax.quantizers.vector import Vector

METHODS: dict[str, type[Quantizer]] = {
    method.method: method
    for method in (
        ChannelRelaxed,
        ChannelRelaxedSignSplit,
        Masked,
        MaskedSignSplit,
        Pyramid,
        SignSplit,
        Uniform,
        Vector,
    )
}


def to_json(quantizer: Quantizer) -> dict[str, Any]:
    """Writes a quantizer as plain data.

    Example:
        >>> to_json(Uniform(bits=8))
        {'method': 'uniform', 'bits': 8, 'per_channel': True, 'channel_axis': -1}
    """
    return {"method": quantizer.method, **dataclasses.asdict(quantizer)}


def from_json(data: Mapping[str, Any]) -> Quantizer:
    """Reads a quantizer from plain data.

    Raises:
        ValueError: for an unknown method or field, or a value the method refuses.

    Example:
        >>> from_json({"method": "vector", "codewords": 256, "dim": 8}).codewords
        256
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"quantizer {data!r} is no mapping: give {{'method': ..., ...}} or null")
    fields = dict(data)
    name = fields.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method {name!r} is unknown: choose one of {sorted(METHODS)}")
    method = METHODS[name]
    known = [field.name for field in dataclasses.fields(method)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"method '{name}' has no field {unknown}: it has {known}")
    return method(**fields)


__all__ = [
    "METHODS",
    "Calibration",
    "ChannelRelaxed",
    "ChannelRelaxedSignSplit",
    "Encoded",
    "InputMoments",
    "Masked",
    "MaskedSignSplit",
    "Pyramid",
    "Quantizer",
    "SignSplit",
    "Storage",
    "Stream",
    "Uniform",
    "Vector",
    "from_json",
    "to_json",
]
