"""Packed models at work: decoding where a weight is used, and products without decoding."""

from ssvq_jax.inference.export import export_program
from ssvq_jax.inference.packed_leaf import PackedLeaf, decode_params, packed_params
from ssvq_jax.inference.serve import serve

__all__ = ["PackedLeaf", "decode_params", "export_program", "packed_params", "serve"]
