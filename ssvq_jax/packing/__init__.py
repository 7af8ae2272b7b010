"""The packed file: exact bits, one safetensors file, lossless round trip."""

from ssvq_jax.packing.errors import PackedFileError
from ssvq_jax.packing.read import PackedFile, load
from ssvq_jax.packing.stored import is_packed
from ssvq_jax.packing.write import Codec, save

__all__ = ["Codec", "PackedFile", "PackedFileError", "is_packed", "load", "save"]
