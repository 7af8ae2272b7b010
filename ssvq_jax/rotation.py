"""Random orthogonal rotations of an axis: signs, then a Hadamard transform.

A Hadamard matrix of order n = 2^a m, m odd, is the Kronecker product of the fast transform's
[[1, 1], [1, -1]] and one of the smallest order 2^b m that Paley's constructions give: q + 1 for a
prime q = 3 mod 4, 2 (q + 1) for a prime q = 1 mod 4. So 12, 20, 28 and 36 exist, and with them 192,
576, 768 and 1536. Where none of order 256 or less is found (odd sizes, 92, 172, 11008), two
transforms of the largest power of two below n mix the first and then the last so many coordinates:
still orthogonal.

All sums are taken in a fixed order and products are by 1 and -1, so that the result has the same
bits under jit, vmap and neither.
"""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_UNROLLED = 16  # terms of a sum in one compiled loop


@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal map of the last axis: R = H D, with random signs D and a transform H.

    Source: random Hadamard rotations as in QuIP#, arXiv 2402.04396, section 3.

    Attributes:
        size: n, length of the axis.
        seed: of the signs, which are the same everywhere and for ever (SHAKE-256).

    Example:
        >>> rotation = Rotation(size=12, seed=0)
        >>> x = jnp.ones((1, 12))
        >>> bool(jnp.allclose(rotation.inverse(rotation.apply(x)), x, atol=1e-6))
        True
    """

    size: int
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether a Hadamard matrix of this order is used, so that all coordinates mix evenly.

        Example:
            >>> [Rotation(n).exact for n in (64, 576, 92, 7)]
            [True, True, False, False]
        """
        return _order(self.size) is not None

    @functools.partial(jax.jit, static_argnums=0)
    def apply(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """Rotates the last axis: R x for each row, in float32."""
        x = x.astype(jnp.float32) * self._signs(x.ndim)
        for start, length in self._spans:
            part = _transform(x[..., start : start + length], transpose=False)
            x = _replace(x, part, start)
        return x

    @functools.partial(jax.jit, static_argnums=0)
    def inverse(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """Inverts `apply`: R^T x for each row, in float32."""
        x = x.astype(jnp.float32)
        for start, length in reversed(self._spans):
            part = _transform(x[..., start : start + length], transpose=True)
            x = _replace(x, part, start)
        return x * self._signs(x.ndim)

    def _signs(self, ndim: int) -> Float[Array, "*ones n"]:
        digest = hashlib.shake_256(str(self.seed).encode()).digest(-(-self.size // 8))
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))[: self.size]
        signs = 1.0 - 2.0 * bits.astype(np.float32)
        return jnp.asarray(signs.reshape(*(1,) * (ndim - 1), -1))

    @property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        """Where transforms begin, and how long they are."""
        if self.exact:
            return ((0, self.size),)
        length = 1 << (self.size.bit_length() - 1)
        return (0, length), (self.size - length, length)


def _replace(
    x: Float[Array, "*rows n"], part: Float[Array, "*rows m"], start: int
) -> Float[Array, "*rows n"]:
    after = start + part.shape[-1]
    return jnp.concatenate([x[..., :start], part, x[..., after:]], axis=-1)


def _transform(x: Float[Array, "*rows n"], *, transpose: bool) -> Float[Array, "*rows n"]:
    """Multiplies by a Hadamard matrix, over the root of its order."""
    size = x.shape[-1]
    order = _order(size)
    assert order is not None  # only such sizes are asked for
    y = x
    half = size // 2
    while half >= order:
        pairs = y.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., :1, :], pairs[..., 1:, :]
        y = jnp.concatenate([a + b, a - b], axis=-2).reshape(x.shape)
        half //= 2
    if order > 1:
        matrix = paley(order).T if transpose else paley(order)
        groups = jnp.moveaxis(y.reshape(*x.shape[:-1], -1, order), -1, 0)
        y = jnp.moveaxis(_product(jnp.asarray(matrix), groups), 0, -1).reshape(x.shape)
    # One bit less, so that no compiler fuses this product with the sum of a second transform.
    return lax.reduce_precision(y * jnp.float32(1 / math.sqrt(size)), 8, 22)


def _product(
    matrix: Float[Array, "order order"], groups: Float[Array, "*groups"]
) -> Float[Array, "*groups"]:
    """A matrix of 1 and -1 times the first axis, summed one term after the other."""
    shape = (matrix.shape[0], *(1,) * (groups.ndim - 1))

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        signs, row = term
        return total + signs.reshape(shape) * row[None], None

    start = jnp.zeros_like(groups)
    return lax.scan(add, start, (matrix.T, groups), unroll=min(_UNROLLED, shape[0]))[0]


_MOST_ORDER = 256  # of a factor that is multiplied with term by term, and kept as a matrix


@functools.lru_cache(maxsize=256)
def _order(size: int) -> int | None:
    """Order of the factor that is no fast transform: 1 for powers of two, None for no matrix."""
    odd = size >> ((size & -size).bit_length() - 1)
    if odd == 1:
        return 1
    order = 4 * odd
    while size % order == 0 and order <= _MOST_ORDER:
        if _prime(order - 1) or (order % 8 == 4 and _prime(order // 2 - 1)):
            return order
        order *= 2
    return None


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


@functools.lru_cache(maxsize=64)
def paley(order: int) -> Float[np.ndarray, "h h"]:
    """Builds a Hadamard matrix by Paley's first or second construction.

    Args:
        order: q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4.

    Returns:
        float32 of 1 and -1, whose rows are orthogonal.

    Raises:
        ValueError: for another order.

    Example:
        >>> matrix = paley(12)
        >>> bool(np.all(matrix @ matrix.T == 12 * np.eye(12)))
        True
    """
    if order % 4 == 0 and _prime(order - 1):
        core = _conference(order - 1, antisymmetric=True)
        return np.asarray(core + np.eye(order, dtype=np.int64), np.float32)
    q = order // 2 - 1
    if order % 8 == 4 and _prime(q):
        core = _conference(q, antisymmetric=False)
        both = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        diagonal = np.eye(order // 2, dtype=np.int64)
        return np.asarray(np.kron(core, both[0]) + np.kron(diagonal, both[1]), np.float32)
    raise ValueError(f"order={order}: Paley's constructions over primes give no such matrix")


def _conference(q: int, *, antisymmetric: bool) -> np.ndarray:
    """Zeros on the diagonal, elsewhere whether differences are squares modulo q; one border."""
    character = np.full(q, -1)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    places = np.arange(q)
    matrix = np.zeros((q + 1, q + 1), np.int64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if antisymmetric else 1
    matrix[1:, 1:] = character[(places[:, None] - places) % q]
    return matrix
