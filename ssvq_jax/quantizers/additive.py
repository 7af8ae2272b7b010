"""Additive codes under the moments of a layer's inputs: codes, then codebooks, in turn.

A weight is cut into groups of d consecutive input channels; a sub-vector is a group of one output.
All sub-vectors have a code of the base codebook, those of the first groups one of every extended
codebook besides, and a sub-vector is the sum of its codewords times the scale of its output. What
is minimised is trace(E H E^T) with E ``[o, c]`` the error and H ``[c, c]`` the moments: the mean
squared error of the layer's outputs, summed up over them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float32, Int32

from ssvq_jax.quantizers.codebook import CodebookDtype, round_codebook

_BEAM = 8  # sums of codewords that are followed up
_ROUNDS = 20  # at most
_LEAST_GAIN = 0.01  # of the objective, for another round
_SOLVER_STEPS = 24  # of conjugate gradients, at most: they begin near the solution


class Codebooks(NamedTuple):
    """The codewords.

    Attributes:
        base: of all sub-vectors.
        extended: of the critical ones.
    """

    base: Float32[Array, "k d"]
    extended: Float32[Array, "m r d"]


class Codes(NamedTuple):
    """The codewords' places.

    Attributes:
        base: a code a sub-vector.
        extended: m codes a critical sub-vector, which are the first q groups.
    """

    base: Int32[Array, "o g"]
    extended: Int32[Array, "m o q"]


class Problem(NamedTuple):
    """What is to be approximated.

    Attributes:
        target: the weight, its padding zero.
        moments: H, zero where the weight is padded.
        scale: of every output; with a column a channel, times the sign of each weight.
    """

    target: Float32[Array, "o c"]
    moments: Float32[Array, "c c"]
    scale: Float32[Array, "o one_or_c"]


class _Course(NamedTuple):
    """Where the refinement stands: the objective a round before, now, and rounds done."""

    codebooks: Codebooks
    codes: Codes
    before: Float32[Array, ""]
    now: Float32[Array, ""]
    rounds: Int32[Array, ""]


@functools.partial(jax.jit, static_argnums=3)
@jax.default_matmul_precision("highest")  # accelerators round the factors of a product otherwise
def refine(
    problem: Problem, codebooks: Codebooks, codes: Codes, codebook_dtype: CodebookDtype
) -> tuple[Codebooks, Codes]:
    """Improves codes and codebooks in turn until a round gains less than a hundredth.

    Codes are chosen group by group, given all others, for all outputs at once: among all codewords
    where there is one codebook, by a beam search where there are several. Codebooks minimise a
    quadratic, by conjugate gradients. Neither step is taken where it would not lower the objective
    with the codebooks as they are stored.

    Args:
        problem: weight, moments and scales.
        codebooks: to begin with.
        codes: to begin with.
        codebook_dtype: what codebooks are stored in.

    Returns:
        Codebooks, before they are rounded for storage, and codes.
    """
    # Squares of all are multiplied: powers of two bring them to where float32 holds that.
    largest = jnp.max(jnp.abs(problem.scale))
    unit, outer = _power_of_two(jnp.max(jnp.abs(problem.target)) / largest), _power_of_two(largest)
    problem = Problem(
        problem.target / outer / unit,
        problem.moments / _power_of_two(jnp.max(jnp.diagonal(problem.moments))),
        problem.scale / outer,
    )
    codebooks = jax.tree.map(lambda x: x / unit, codebooks)

    def stored(codebooks: Codebooks) -> Codebooks:
        rounded = functools.partial(round_codebook, codebook_dtype=codebook_dtype)
        base, extended = codebooks
        return Codebooks(rounded(base * unit) / unit, jax.vmap(rounded)(extended * unit) / unit)

    def proceeds(course: _Course) -> Bool[Array, ""]:
        return (course.now < (1 - _LEAST_GAIN) * course.before) & (course.rounds < _ROUNDS)

    def step(course: _Course) -> _Course:
        codes = choose_codes(problem, stored(course.codebooks), course.codes)
        now = objective(problem, stored(course.codebooks), codes)
        solved = solve_codebooks(problem, course.codebooks, codes)
        after = objective(problem, stored(solved), codes)
        pick = functools.partial(jnp.where, after < now)
        codebooks = jax.tree.map(pick, solved, course.codebooks)
        return _Course(codebooks, codes, course.now, jnp.minimum(after, now), course.rounds + 1)

    start = objective(problem, stored(codebooks), codes)
    course = _Course(codebooks, codes, jnp.full_like(start, jnp.inf), start, jnp.int32(0))
    codebooks, codes, *_ = lax.while_loop(proceeds, step, course)
    return jax.tree.map(lambda x: x * unit, codebooks), codes


def decode(codebooks: Codebooks, codes: Codes) -> Float32[Array, "o c"]:
    """Adds up codewords, without scales."""
    values = codebooks.base[codes.base]
    extra = jnp.zeros_like(values[:, : codes.extended.shape[2]])
    for m in range(codebooks.extended.shape[0]):
        extra = extra + codebooks.extended[m][codes.extended[m]]
    rest = values[:, extra.shape[1] :]
    return jnp.concatenate([values[:, : extra.shape[1]] + extra, rest], 1).reshape(
        len(codes.base), -1
    )


def objective(problem: Problem, codebooks: Codebooks, codes: Codes) -> Float32[Array, ""]:
    """Calculates trace(E H E^T)."""
    error = problem.scale * decode(codebooks, codes) - problem.target
    return jnp.sum(error * (error @ problem.moments))


def solve_codebooks(problem: Problem, codebooks: Codebooks, codes: Codes) -> Codebooks:
    """Minimises the objective over the codebooks: normal equations, by conjugate gradients."""
    scale = problem.scale
    _, gather = jax.vjp(lambda books: decode(books, codes), codebooks)

    def normal(books: Codebooks) -> Codebooks:
        return gather(scale * ((scale * decode(books, codes)) @ problem.moments))[0]

    right = gather(scale * (problem.target @ problem.moments))[0]
    diagonal = gather(jnp.square(scale) * jnp.diagonal(problem.moments)[None])[0]

    def precondition(books: Codebooks) -> Codebooks:
        return jax.tree.map(lambda x, d: jnp.where(d > 0, x / d, 0.0), books, diagonal)

    solved, _ = cg(normal, right, codebooks, tol=1e-5, maxiter=_SOLVER_STEPS, M=precondition)
    return solved


def choose_codes(problem: Problem, codebooks: Codebooks, codes: Codes) -> Codes:
    """Chooses the codes of one group after the other, given those of all others."""
    dim = codebooks.base.shape[1]
    error = problem.scale * decode(codebooks, codes) - problem.target
    signed = problem.scale.shape[1] > 1

    def visit(
        group: Int32[Array, ""], state: tuple[Codes, Array], critical: bool
    ) -> tuple[Codes, Array]:
        codes, gradient = state
        first = group * dim
        rows = lax.dynamic_slice_in_dim(problem.moments, first, dim)
        own, scale = lax.dynamic_slice_in_dim(rows, first, dim, axis=1), problem.scale
        if signed:  # then H is another one for the magnitudes of every output
            scale = lax.dynamic_slice_in_dim(scale, first, dim, axis=1)
            signs = jnp.sign(scale)
            own = own[None] * signs[:, :, None] * signs[:, None, :]
        found = _of_group(codes, group, critical)
        value = _sum_of(codebooks, found)
        # u of a sub-vector changes the objective, over its scale's square, by u H u^T - 2 u t^T.
        pull = _times(value, own) - lax.dynamic_slice_in_dim(gradient, first, dim, axis=1) / scale
        chosen = _search(codebooks, own, pull, found)
        change = scale * (_sum_of(codebooks, chosen) - value)
        return _with_group(codes, group, chosen), gradient + change @ rows

    state = (codes, error @ problem.moments)
    q, g = codes.extended.shape[2], codes.base.shape[1]
    state = lax.fori_loop(0, q, functools.partial(visit, critical=True), state)
    return lax.fori_loop(q, g, functools.partial(visit, critical=False), state)[0]


def _search(
    codebooks: Codebooks,
    own: Float32[Array, "*o d d"],
    pull: Float32[Array, "o d"],
    found: list[Int32[Array, " o"]],
) -> list[Int32[Array, " o"]]:
    """Beam search for the codewords whose sum u has the least u H u^T - 2 u t^T."""
    outputs = len(pull)
    books = [codebooks.base, *codebooks.extended][: len(found)]
    score = jnp.zeros((outputs, 1))
    sums = jnp.zeros((outputs, 1, pull.shape[1]))
    beams: list[Array] = []
    for i, book in enumerate(books):
        each = jnp.expand_dims(book, range(own.ndim - 2))
        alone = jnp.atleast_2d(jnp.sum((book @ own) * each, axis=-1))[:, None]
        cross = (2 * (sums @ own) - 2 * pull[:, None]) @ book.T
        scores = (score[:, :, None] + alone + cross).reshape(outputs, -1)
        if i + 1 == len(books):
            best = jnp.argmin(scores, axis=1)[:, None]
        else:
            best = lax.top_k(-scores, min(_BEAM, scores.shape[1]))[1]
        score = jnp.take_along_axis(scores, best, 1)
        beam, code = best // len(book), (best % len(book)).astype(jnp.int32)
        beams = [jnp.take_along_axis(codes, beam, 1) for codes in beams] + [code]
        sums = jnp.take_along_axis(sums, beam[:, :, None], 1) + book[code]
    taken = (book[code] for book, code in zip(books, found, strict=True))
    value = sum(taken, start=jnp.zeros_like(pull))
    now = jnp.sum(_times(value, own) * value - 2 * value * pull, axis=1)
    return [
        jnp.where(score[:, 0] < now, new[:, 0], old) for new, old in zip(beams, found, strict=True)
    ]


def _of_group(codes: Codes, group: Int32[Array, ""], critical: bool) -> list[Int32[Array, " o"]]:
    found = [lax.dynamic_index_in_dim(codes.base, group, 1, keepdims=False)]
    if critical:
        extended = lax.dynamic_index_in_dim(codes.extended, group, 2, keepdims=False)
        found += list(extended)
    return found


def _with_group(codes: Codes, group: Int32[Array, ""], found: list[Int32[Array, " o"]]) -> Codes:
    base = lax.dynamic_update_index_in_dim(codes.base, found[0], group, 1)
    if len(found) == 1:
        return codes._replace(base=base)
    extended = jnp.stack(found[1:])
    return Codes(base, lax.dynamic_update_index_in_dim(codes.extended, extended, group, 2))


def _sum_of(codebooks: Codebooks, found: list[Int32[Array, " o"]]) -> Float32[Array, "o d"]:
    value = codebooks.base[found[0]]
    for book, code in zip(codebooks.extended, found[1:], strict=False):
        value = value + book[code]
    return value


def _times(
    values: Float32[Array, "o d"], matrix: Float32[Array, "*o d d"]
) -> Float32[Array, "o d"]:
    """Rows times a matrix, or each times its own."""
    return values @ matrix if matrix.ndim == 2 else (values[:, None] @ matrix)[:, 0]


def _power_of_two(number: Float32[Array, ""]) -> Float32[Array, ""]:
    """The power of two above a positive number; 1 for zero."""
    exponent = jnp.where(number > 0, jnp.frexp(number)[1], 0)
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -100, 100))
