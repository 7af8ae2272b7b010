"""The pyramid P(D, K): integer points whose D magnitudes sum to K, their numbers, a search.

Source: Fischer, "A pyramid vector quantizer", IEEE Trans. Inf. Theory 32(4), 1986.

Fischer's index walks the coordinates with l of them and q pulses left: points whose next coordinate
is 0 come first, then 1, -1, 2, -2, and so on. Counted from the end, ``rest = N(D, K) - 1 - index``,
this order needs no table of pairs (pulses, coordinate): with V(l, m) points of l coordinates whose
magnitudes sum to at most m, a rest belongs to the largest ``m <= q`` with ``2 V(l-1, m-1) <= rest``
pulses for what follows, and the coordinate's magnitude is q - m. So one coordinate is a search in a
sorted table of K numbers, the same for all points.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

MOST_DIM = 256
MOST_PULSES = 512
_COMPARED = 32  # pulses up to which comparing with the whole table is faster than bisection


def count(dim: int, pulses: int) -> int:
    """Calculates the number of points N(D, K).

    N(D, K) = N(D-1, K) + N(D, K-1) + N(D-1, K-1), with N(D, 0) = 1 and N(0, K > 0) = 0.

    Args:
        dim: D, coordinates.
        pulses: K, sum of their magnitudes.

    Returns:
        The exact number.

    Example:
        >>> count(8, 8)
        157184
    """
    return _counts(dim, pulses)[dim][pulses]


def width(dim: int, pulses: int) -> int:
    """Bits of an index: ceil(log2 N(D, K)).

    Example:
        >>> width(8, 8)
        18
    """
    return (count(dim, pulses) - 1).bit_length()


def words(dim: int, pulses: int) -> int:
    """Words of 32 bits that hold an index.

    Example:
        >>> words(32, 32)
        3
    """
    return max(-(-width(dim, pulses) // 32), 1)


@functools.partial(jax.jit, static_argnames="pulses")
def index(points: Int32[Array, "n d"], pulses: int) -> UInt32[Array, "n w"]:
    """Numbers points: Fischer's index, from 0 to N(D, K) - 1.

    Args:
        points: integer points whose magnitudes sum to ``pulses``.
        pulses: K.

    Returns:
        The index of each point in words of 32 bits, the least significant first.

    Example:
        >>> index(jnp.array([[0, 2], [2, 0], [-2, 0]]), pulses=2).tolist()
        [[0], [6], [7]]
    """
    dim = points.shape[1]
    tables = _tables(dim, pulses)
    size = words(dim, pulses)

    def add(
        state: tuple[tuple[Array, ...], Array], step: tuple[Array, Array, Array]
    ) -> tuple[tuple[tuple[Array, ...], Array], None]:
        rest, after = state  # pulses of the coordinates that follow
        x, before, own = step
        rest = _add(rest, _rows(before, after))
        rest = _add(rest, _where(x > 0, _rows(own, after)))
        return (rest, after + jnp.abs(x)), None

    zero = jnp.zeros_like(points[:, 0])
    start = (tuple(zero.astype(jnp.uint32) for _ in range(size)), zero)
    last_first = (points.T[::-1], jnp.asarray(tables.before), jnp.asarray(tables.own))
    (rest, _), _ = lax.scan(add, start, last_first)
    last = tuple(jnp.broadcast_to(x, zero.shape) for x in jnp.asarray(tables.last))
    return jnp.stack(_subtract(last, rest), axis=-1)


@functools.partial(jax.jit, static_argnames=("dim", "pulses"))
def point(index: UInt32[Array, "n w"], dim: int, pulses: int) -> Int32[Array, "n d"]:
    """Inverts `index`; numbers from N(D, K) on give points of some other sum.

    Args:
        index: words of 32 bits, the least significant first.
        dim: D.
        pulses: K.

    Returns:
        The points.

    Example:
        >>> point(jnp.array([[0], [6], [7]], jnp.uint32), dim=2, pulses=2).tolist()
        [[0, 2], [2, 0], [-2, 0]]
    """
    tables = _tables(dim, pulses)

    # The search for a coordinate ends the step before, so that its result is stored before it is
    # used: else XLA would search anew for every word.
    def take(
        state: tuple[tuple[Array, ...], Array, Array], step: tuple[Array, Array, Array]
    ) -> tuple[tuple[tuple[Array, ...], Array, Array], Array]:
        rest, left, after = state  # pulses of this coordinate and of those that follow it
        before, own, following = step
        rest = _subtract(rest, _rows(before, after))
        count = _rows(own, after)
        positive = _reaches(rest, count)
        rest = _subtract(rest, _where(positive, count))
        magnitude = left - after
        return (rest, after, _search(rest, following, after)), jnp.where(
            positive, magnitude, -magnitude
        )

    columns = tuple(index[:, i] for i in range(words(dim, pulses)))
    last = tuple(jnp.broadcast_to(x, columns[0].shape) for x in jnp.asarray(tables.last))
    left = jnp.zeros_like(columns[0], jnp.int32) + jnp.int32(pulses)
    rest = _subtract(last, columns)
    before, own = jnp.asarray(tables.before[::-1]), jnp.asarray(tables.own[::-1])
    start = (rest, left, _search(rest, before[0], left))
    _, coordinates = lax.scan(take, start, (before, own, jnp.roll(before, -1, axis=0)))
    return coordinates.T


def exists(index: UInt32[Array, "n w"], dim: int, pulses: int) -> Bool[Array, " n"]:
    """Whether numbers are the index of a point: below N(D, K).

    Example:
        >>> exists(jnp.array([[7], [8]], jnp.uint32), dim=2, pulses=2).tolist()
        [True, False]
    """
    columns = tuple(index[:, i] for i in range(words(dim, pulses)))
    last = tuple(jnp.broadcast_to(x, columns[0].shape) for x in jnp.asarray(_last(dim, pulses)))
    return _reaches(last, columns)


@functools.partial(jax.jit, static_argnames="pulses")
def nearest(
    x: Float[Array, "n d"], pulses: int, importance: Float[Array, "n d"] | None = None
) -> Int32[Array, "n d"]:
    """Searches the point whose direction is next to each vector's, greedily.

    On the magnitudes: from p_j = floor(K |x_j| / sum |x|), one pulse at a time goes where
    (<x, p> + x_j)^2 / (|p|^2 + 2 p_j + 1) is largest; then the signs are given back. With
    importance h both products are weighted by it, and the search begins at no pulses.

    Args:
        x: vectors, of any scale.
        pulses: K.
        importance: non-negative weight of each coordinate's squared error.

    Returns:
        Points of P(D, K); that of a zero vector has all pulses in the first coordinate.

    Example:
        >>> nearest(jnp.array([[0.1, -3.0, 2.0], [0.0, 0.0, 0.0]]), pulses=5).tolist()
        [[0, -3, 2], [5, 0, 0]]
    """
    dim = x.shape[1]
    # A coordinate is a row: everything below is elementwise in n, and sums over rows are unrolled.
    size = jnp.abs(x.astype(jnp.float32)).T
    place = lax.broadcasted_iota(jnp.int32, size.shape, 0)
    largest = _over_rows(jnp.maximum, size)
    first = (place == 0).astype(jnp.float32)  # what a zero vector is taken for
    size = jnp.where(largest >= _TINY, size / jnp.maximum(largest, _TINY), first)
    if importance is None:
        weight = jnp.ones_like(size)
        total = _over_rows(jnp.add, size)
        placed = jnp.floor(size * (jnp.float32(pulses) / total))
        rounds = min(dim, pulses)  # each coordinate lost less than a pulse, and rounding
    else:
        weight = importance.astype(jnp.float32).T
        largest = _over_rows(jnp.maximum, weight)
        weight = jnp.where(largest > 0, weight / jnp.maximum(largest, _TINY), 1.0)
        placed = jnp.zeros_like(size)
        rounds = pulses
    gain = weight * size
    # The coordinate in the lowest bits of a score, which is not negative, makes one maximum of two.
    low = (1 << (dim - 1).bit_length()) - 1

    def choose(placed: Array, product: Array, square: Array) -> Array:
        wanted = jnp.square(product + gain)
        score = wanted / (square + weight * (2.0 * placed + 1.0) + _TINY)
        packed = lax.bitcast_convert_type(score, jnp.int32) & ~low | (low - place)
        return low - (_over_rows(jnp.maximum, packed) & low)

    # The next choice is made at the end of a round, so that it is stored before it is used: else
    # XLA would make it anew for every coordinate.
    def place_one(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        placed, left, product, square, chosen = state
        more = (place == chosen) & (left > 0)
        product = product + _over_rows(jnp.add, jnp.where(more, gain, 0.0))
        grown = jnp.where(more, weight * (2.0 * placed + 1.0), 0.0)
        square = square + _over_rows(jnp.add, grown)
        placed = placed + more.astype(jnp.float32)
        left = jnp.maximum(left - 1.0, 0.0)
        return placed, left, product, square, choose(placed, product, square)

    left = jnp.float32(pulses) - _over_rows(jnp.add, placed)
    product = _over_rows(jnp.add, gain * placed)
    square = _over_rows(jnp.add, weight * jnp.square(placed))
    state = (placed, left, product, square, choose(placed, product, square))
    placed = lax.fori_loop(0, rounds, place_one, state)[0].astype(jnp.int32)
    return jnp.where(x.T < 0, -placed, placed).T


def _over_rows(function: Callable[[Array, Array], Array], rows: Array) -> Array:
    """Reduces rows to one, ``[1, n]``: unrolled, since XLA's CPU reductions are not vectorised."""
    return functools.reduce(function, (rows[i : i + 1] for i in range(rows.shape[0])))


_TINY = float(np.finfo(np.float32).tiny)


class _Tables(NamedTuple):
    """Numbers in words of 32 bits, the least significant first.

    Attributes:
        before: 2 V(l, m-1) ``[D, K + 1, w]``, of l = 0 first: how many points of l + 1 coordinates
            and at least m pulses have fewer than m of them after the first coordinate.
        own: N(l, m) ``[D, K + 1, w]``.
        last: N(D, K) - 1 ``[w]``.
    """

    before: np.ndarray
    own: np.ndarray
    last: np.ndarray


@functools.lru_cache(maxsize=64)
def _counts(dim: int, pulses: int) -> list[list[int]]:
    """N(l, m) for all l <= D and m <= K."""
    rows = [[1] + [0] * pulses]
    for _ in range(dim):
        above, row = rows[-1], [1]
        for m in range(1, pulses + 1):
            row.append(above[m] + row[-1] + above[m - 1])
        rows.append(row)
    return rows


@functools.lru_cache(maxsize=64)
def _tables(dim: int, pulses: int) -> _Tables:
    size = words(dim, pulses)
    own = np.zeros((dim, pulses + 1, size), np.uint32)
    before = np.zeros_like(own)
    for rest, row in enumerate(_counts(dim, pulses)[:dim]):
        ball = 0
        for m, number in enumerate(row):
            before[rest, m] = _split(2 * ball, size)
            own[rest, m] = _split(number, size)
            ball += number
    return _Tables(before, own, _last(dim, pulses))


def _last(dim: int, pulses: int) -> np.ndarray:
    return np.array(_split(count(dim, pulses) - 1, words(dim, pulses)), np.uint32)


def _split(number: int, size: int) -> list[int]:
    return [number >> 32 * i & 0xFFFFFFFF for i in range(size)]


def _search(
    rest: tuple[Array, ...], before: UInt32[Array, "m w"], left: Int32[Array, " n"]
) -> Int32[Array, " n"]:
    """The most pulses, of those left, whose table entry does not exceed the rest."""
    pulses = before.shape[0] - 1
    found = jnp.zeros_like(left)
    if pulses <= _COMPARED:
        for m in range(1, pulses + 1):
            found = found + _reaches(rest, tuple(before[m])).astype(jnp.int32)
        return jnp.minimum(found, left)
    for bit in reversed(range(pulses.bit_length())):
        tried = found + jnp.int32(1 << bit)
        entry = _rows(before, jnp.minimum(tried, pulses))
        found = jnp.where((tried <= left) & _reaches(rest, entry), tried, found)
    return found


def _rows(table: UInt32[Array, "m w"], row: Int32[Array, " n"]) -> tuple[Array, ...]:
    """Words of rows of a table."""
    return tuple(table[:, i].at[row].get(mode="promise_in_bounds") for i in range(table.shape[1]))


def _reaches(a: tuple[Array, ...], b: tuple[Array, ...]) -> Bool[Array, " n"]:
    """Whether a >= b."""
    result = a[0] >= b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        result = (x > y) | ((x == y) & result)
    return result


def _where(condition: Bool[Array, " n"], number: tuple[Array, ...]) -> tuple[Array, ...]:
    """The number, or 0."""
    return tuple(jnp.where(condition, x, jnp.uint32(0)) for x in number)


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    carry = jnp.zeros_like(a[0])
    result = []
    for x, y in zip(a, b, strict=True):
        part = x + y
        whole = part + carry
        carry = ((part < x) | (whole < part)).astype(jnp.uint32)
        result.append(whole)
    return tuple(result)


def _subtract(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    borrow = jnp.zeros_like(a[0])
    result = []
    for x, y in zip(a, b, strict=True):
        part = x - y
        whole = part - borrow
        borrow = ((x < y) | (part < borrow)).astype(jnp.uint32)
        result.append(whole)
    return tuple(result)
