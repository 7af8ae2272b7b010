"""Packed models at work: decoded where a weight is used, multiplied with, exported."""

from ssvq_jax.inference.export import export_program
from ssvq_jax.inference.matmul import matmul
from ssvq_jax.inference.packed_leaf import PackedLeaf, decode_params, packed_params
from ssvq_jax.inference.serve import serve

__all__ = ["PackedLeaf", "decode_params", "export_program", "matmul", "packed_params", "serve"]
