"""What one equation of a jaxpr computes, and from what: a product, other arithmetic, or nothing.

A primitive that is not named here may hold matrix products: `is_known` then says no.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from ssvq_jax.hardware.workload import Product

# Primitives that call one jaxpr on all their operands, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "composite": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}

PRODUCTS = ("dot_general", "conv_general_dilated")

_KINDS = {
    # One operation a result.
    "elementwise": """
        abs add add_any and ceil clamp clz conj eq eq_to floor ge gt integer_pow is_finite le le_to
        lt lt_to max min mul mulhi ne neg nextafter not or population_count round select_n
        shift_left shift_right_arithmetic shift_right_logical sign square sub xor
    """,
    "transcendental": """
        acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma div erf
        erf_inv erfc exp exp2 expm1 igamma igamma_grad_a igammac lgamma log log1p logistic
        polygamma pow regularized_incomplete_beta rem rsqrt sin sinh sqrt tan tanh zeta
    """,
    # One operation an element that is reduced, sorted or added up.
    "reduction": """
        approx_top_k argmax argmin cumlogsumexp cummax cummin cumprod cumsum pmax pmin psum reduce
        reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window
        reduce_window_max reduce_window_min reduce_window_sum reduce_xor scatter-add scatter-max
        scatter-min scatter-mul scatter-sub select_and_gather_add select_and_scatter
        select_and_scatter_add sort top_k
    """,
    # Data is moved or renamed, or drawn at random: no arithmetic of the model.
    "": """
        bitcast_convert_type broadcast_in_dim complex concatenate convert_element_type copy
        debug_callback debug_print device_put dynamic_slice dynamic_update_slice empty empty2
        from_edtype gather imag iota layout_constraint name pad platform_index random_bits
        random_clone random_fold_in random_gamma random_seed random_split random_unwrap random_wrap
        real reduce_precision reshape reshard rev rng_bit_generator rng_uniform scatter
        sharding_constraint slice split squeeze stack stop_gradient threefry2x32 tile to_edtype
        transpose unstack
    """,
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}


class Origin(NamedTuple):
    """What a value is made of: constants alone, unless it says more.

    Attributes:
        leaves: parameters, by leaf path; none if it is an activation.
        moving: it is an activation: it depends on more than the parameters.
    """

    leaves: frozenset[str] = frozenset()
    moving: bool = False


CONSTANT, ACTIVATION = Origin(), Origin(moving=True)


def merge(origins: Iterable[Origin]) -> Origin:
    """Gives the origin of what is computed from several values."""
    origins = list(origins)
    if any(origin.moving for origin in origins):
        return ACTIVATION
    return Origin(frozenset[str]().union(*(origin.leaves for origin in origins)))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part of a function computes.

    Attributes:
        products: as in `Workload`.
        operations: other arithmetic, by kind, as in `Workload`.
        gathered: numbers that inputs pick out of parameters, by leaf path.
        used: paths of the parameters that inputs meet in any other way.
    """

    products: list[Product] = dataclasses.field(default_factory=list)
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    gathered: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    used: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Work") -> None:
        """Adds what is computed next."""
        self.products.extend(other.products)
        self.operations.update(other.operations)
        self.gathered.update(other.gathered)
        self.used.update(other.used)

    def meet(self, eqn: JaxprEqn, inputs: Sequence[Origin]) -> None:
        """Notes which parameters an equation brings together with an activation."""
        for i, origin in enumerate(inputs):
            if i == 0 and eqn.primitive.name == "gather" and len(origin.leaves) == 1:
                (path,) = origin.leaves
                self.gathered[path] += math.prod(_shape(eqn.outvars[0]))
            else:
                self.used.update(origin.leaves)

    def repeated(self, rounds: int) -> "Work":
        """Gives the work of all rounds of a loop."""
        if not rounds:
            return Work()
        products = [dataclasses.replace(x, rounds=x.rounds * rounds) for x in self.products]
        operations, gathered = (
            collections.Counter({key: number * rounds for key, number in counter.items()})
            for counter in (self.operations, self.gathered)
        )
        return Work(products, operations, gathered, self.used)

    @property
    def cost(self) -> tuple[int, int]:
        """Multiplications in products, and operations: to compare branches by."""
        return sum(product.macs for product in self.products), self.operations.total()


def is_known(eqn: JaxprEqn) -> bool:
    """Whether an equation's work can be counted."""
    if eqn.primitive.name == "conv_general_dilated":
        # With strides in a dilated input, how much of a window meets zeros differs by place.
        dilation, strides = eqn.params["lhs_dilation"], eqn.params["window_strides"]
        return max(dilation, default=1) == 1 or max(strides) == 1
    return eqn.primitive.name in PRODUCTS or eqn.primitive.name in _KIND


def arithmetic(eqn: JaxprEqn) -> dict[str, int]:
    """Counts operations of an equation that is no matrix product, by kind."""
    kind = _KIND[eqn.primitive.name]
    if not kind:
        return {}
    results = sum(math.prod(_shape(x)) for x in eqn.outvars)
    return {kind: _reduced(eqn) if kind == "reduction" else results}


def _reduced(eqn: JaxprEqn) -> int:
    name, operands = eqn.primitive.name, eqn.invars
    if "window_dimensions" in eqn.params:
        # A window for each result; the gradient of one has a window for each cotangent.
        windows = operands[0] if name.startswith("select_and_scatter") else eqn.outvars[0]
        return math.prod(_shape(windows)) * math.prod(eqn.params["window_dimensions"])
    return math.prod(_shape(operands[2] if name.startswith("scatter") else operands[0]))


def product(eqn: JaxprEqn, lhs: Origin, rhs: Origin) -> tuple[dict[str, int], frozenset[str]]:
    """Gives the sizes of a matrix product, by field of `Product`, and the leaves that feed it."""
    if eqn.primitive.name == "dot_general":
        return _dot_sizes(eqn, lhs.moving, rhs.moving), lhs.leaves | rhs.leaves
    # A kernel that is an activation slides over what may be a weight: that is the input.
    feeding = frozenset() if rhs.moving else lhs.leaves | rhs.leaves
    return _convolution_sizes(eqn), feeding


def _dot_sizes(eqn: JaxprEqn, lhs_moves: bool, rhs_moves: bool) -> dict[str, int]:
    """Reads a ``dot_general``.

    The operand that stays from call to call is ``[K, N]``. Of two activations, the one with more
    rows is the input; of two weights, and of equals, the left one is.
    """
    (lhs_k, rhs_k), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = (_shape(x) for x in eqn.invars)
    k, count = _pick(lhs, lhs_k), _pick(lhs, lhs_batch)
    m, n = _rest(lhs, (*lhs_k, *lhs_batch)), _rest(rhs, (*rhs_k, *rhs_batch))
    if rhs_moves and (n > m or not lhs_moves):
        m, n = n, m
    return {"m": m, "k": k, "n": n, "count": count}


def _convolution_sizes(eqn: JaxprEqn) -> dict[str, int]:
    """Reads a ``conv_general_dilated``: a product of windows and kernels for each group.

    A transposed convolution (dilated input) is the product of single pixels and whole kernels,
    ``[batch · input pixels, channels] x [channels, window · outputs]``, whose results are added
    where they overlap: nothing is multiplied by the zeros between the pixels.
    """
    params = eqn.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out = (_shape(x) for x in (*eqn.invars, *eqn.outvars))
    outputs, channels = (rhs[axis] for axis in numbers.rhs_spec[:2])
    window = _pick(rhs, numbers.rhs_spec[2:])
    groups = params["feature_group_count"] * params["batch_group_count"]
    batch, n = out[numbers.out_spec[0]], outputs // groups
    inputs = batch * _pick(lhs, numbers.lhs_spec[2:])
    if max(params["lhs_dilation"], default=1) > 1:
        return {"m": inputs, "k": channels, "n": window * n, "count": groups}
    m, k = batch * _pick(out, numbers.out_spec[2:]), window * channels
    overlap = {"input_elements": inputs * channels} if inputs * channels < m * k else {}
    return {"m": m, "k": k, "n": n, "count": groups} | overlap


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())  # a token has none


def _pick(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _rest(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(size for axis, size in enumerate(shape) if axis not in axes)
