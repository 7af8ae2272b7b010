"""Statistics of one weight beside its decoded form: error, signs, codes.

On the host, in float64: shares and sums over millions of weights stay exact.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Integer

NEAR_ZERO = 0.1  # of the leaf's root mean square


@dataclasses.dataclass(frozen=True)
class WeightError:
    """How far a decoded weight V is from the weight W; None where a figure would divide by zero.

    Attributes:
        relative: ||W - V||^2 / ||W||^2.
        sqnr: signal to quantization noise, -10 log10 of ``relative``, in dB; None if V is exact.
        cosine: <W, V> / (||W|| ||V||).
    """

    relative: float | None
    sqnr: float | None
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class SignStatistics:
    """Signs of a weight, as shares of its elements.

    Attributes:
        negative: below zero.
        wrong: of the opposite sign once decoded (a zero is opposite to nothing). Methods that
            store signs have none; vector quantization does.
        near_zero: magnitude below a tenth of the leaf's root mean square: the signs that a
            fine-tuning step turns, and that will oscillate.
    """

    negative: float
    wrong: float
    near_zero: float


@dataclasses.dataclass(frozen=True)
class CodeStatistics:
    """How evenly codes use a codebook; of a stacked leaf, over the codebooks of its slices.

    Attributes:
        codewords: rows to choose from, of all slices together.
        used: rows that some code names.
        entropy: of the codes, in bits; the mean over slices.
        entropy_limit: log2 k, the entropy of k rows used equally often.
        imbalance: k * sum of p_i^2 with p_i the share of codes that name row i, as faiss defines
            it: 1 for rows used equally often, k where all codes name one; the mean over slices.
    """

    codewords: int
    used: int
    entropy: float
    entropy_limit: float
    imbalance: float


def weight_error(
    weight: Float[np.ndarray, "*shape"], decoded: Float[np.ndarray, "*shape"]
) -> WeightError:
    """Calculates the distance of a decoded weight.

    Args:
        weight: W, float64.
        decoded: V, float64.

    Returns:
        Relative error, SQNR and cosine.

    Example:
        >>> weight_error(np.array([3.0, 4.0]), np.array([3.0, 3.5])).relative
        0.01
    """
    signal, noise = float(np.sum(weight**2)), float(np.sum((weight - decoded) ** 2))
    norms = math.sqrt(signal) * math.sqrt(float(np.sum(decoded**2)))
    return WeightError(
        relative=noise / signal if signal else None,
        sqnr=10 * math.log10(signal / noise) if signal and noise else None,
        cosine=float(np.sum(weight * decoded)) / norms if norms else None,
    )


def sign_statistics(
    weight: Float[np.ndarray, "*shape"], decoded: Float[np.ndarray, "*shape"]
) -> SignStatistics:
    """Counts signs.

    Args:
        weight: W.
        decoded: the decoded weight.

    Returns:
        Shares of W's elements.

    Example:
        >>> sign_statistics(np.array([-2.0, 2.0, 0.1, -2.0]), np.array([-2.0, 0.0, -0.1, -2.0]))
        SignStatistics(negative=0.5, wrong=0.25, near_zero=0.25)
    """
    rms = math.sqrt(float(np.mean(weight**2)))
    return SignStatistics(
        negative=float(np.mean(weight < 0)),
        wrong=float(np.mean(np.sign(weight) * np.sign(decoded) < 0)),
        near_zero=float(np.mean(np.abs(weight) < NEAR_ZERO * rms)),
    )


def code_statistics(codes: Integer[np.ndarray, "*slices n"], codewords: int) -> CodeStatistics:
    """Counts how often codes name each row of a codebook.

    Args:
        codes: row indices, a codebook a slice. Padded sub-vectors count: their codes are stored.
        codewords: k, rows of one codebook.

    Returns:
        Rows used, entropy and imbalance.

    Example:
        >>> code_statistics(np.array([0, 0, 1, 2]), codewords=4)
        CodeStatistics(codewords=4, used=3, entropy=1.5, entropy_limit=2.0, imbalance=1.5)
    """
    slices = codes.reshape(-1, codes.shape[-1])
    counts = np.stack([np.bincount(one, minlength=codewords) for one in slices])
    shares = counts / slices.shape[1]
    logarithms = np.log2(shares, where=counts > 0, out=np.zeros_like(shares))
    return CodeStatistics(
        codewords=counts.size,
        used=int(np.count_nonzero(counts)),
        entropy=float(np.mean(-np.sum(shares * logarithms, axis=1))) + 0.0,  # no minus zero
        entropy_limit=math.log2(codewords),
        imbalance=float(np.mean(codewords * np.sum(shares**2, axis=1))),
    )
