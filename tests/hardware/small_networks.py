"""Networks of a few layers, some in several formats, and an accelerator to work by hand."""

import jax

from ssvq_jax import SignSplit, Uniform, Vector, make_plan
from ssvq_jax.hardware import Accelerator, Product, Workload, with_bits, with_plan

# 2 x 2 PEs at 1 Hz, a byte a second: cycles are bytes are seconds.
TINY = Accelerator(
    "tiny", 2, 2, "ws", clock_hz=1.0, dram_bytes_per_s=1.0, lookups_per_cycle=1, weights="streamed"
)
# [3, 4] x [4, 4], then [3, 4] x [4, 2]; 5 weights feed nothing.
CHAIN = Workload(
    (Product("a", 3, 4, 4, leaves=("a",)), Product("b", 3, 4, 2, leaves=("b",))),
    {"elementwise": 10},
    {"a": 16, "b": 8, "bias": 5},
)
INT8 = with_bits(CHAIN, 8, other_bits=8)


SHAPES = {f"{i}": jax.ShapeDtypeStruct((64, 64), "float32") for i in range(3)}


def chain(m: int) -> Workload:
    products = [Product(name, m, 64, 64, leaves=(name,)) for name in SHAPES]
    attention = Product("attention", m, 16, m, count=4)
    return Workload(
        (*products[:2], attention, products[2]),
        {"elementwise": 100 * m},
        dict.fromkeys(SHAPES, 4096),
    )


def formats(m: int = 8) -> dict:
    plans = {
        "ssvq": make_plan(SHAPES, [(".*", SignSplit(codewords=16, dim=8))]),
        "vq": make_plan(SHAPES, [(".*", Vector(codewords=64, dim=4))]),
        "uniform": make_plan(SHAPES, [(".*", Uniform(bits=4))]),
    }
    return {"int8": with_bits(chain(m), 8)} | {
        name: with_plan(chain(m), plan) for name, plan in plans.items()
    }


FORMATS = formats()
