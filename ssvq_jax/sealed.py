"""JSON objects that carry a checksum of themselves, so that a damaged one is not believed."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum to an object: the CRC-32 of its JSON with sorted keys.

    Args:
        data: JSON values by name.

    Returns:
        The object as JSON gives it back, with its checksum under the key ``checksum``.

    Example:
        >>> seal({"steps": 10})
        {'steps': 10, 'checksum': '8c9951ee'}
    """
    plain = json.loads(json.dumps(data))
    return {**plain, CHECKSUM: _crc32(plain)}


def unseal(data: Any, what: str) -> dict[str, Any]:
    """Compares an object with its checksum, and takes that off.

    Args:
        data: what `seal` gave.
        what: the object, for messages.

    Raises:
        ValueError: if it is not what `seal` gave.

    Example:
        >>> unseal(seal({"steps": 10}) | {"steps": 11}, "config.json")
        Traceback (most recent call last):
        ValueError: config.json is damaged or was edited: its checksum does not fit its content
    """
    if not isinstance(data, Mapping) or CHECKSUM not in data:
        raise ValueError(f"{what} has no checksum: it is damaged, or not of this version")
    found = {name: value for name, value in data.items() if name != CHECKSUM}
    if data[CHECKSUM] != _crc32(found):
        raise ValueError(f"{what} is damaged or was edited: its checksum does not fit its content")
    return found


def _crc32(data: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"
