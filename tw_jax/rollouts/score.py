"""Scores of repeated samples: mean@n, unbiased pass@k, and confidence intervals.

Samples of one problem resemble each other, so the unit of every interval is the problem, not the
sample. This file knows no task and no grading.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its confidence interval, all in the unit of the values."""

    value: float
    low: float
    high: float


def mean_at_n(correct: np.ndarray) -> np.ndarray:
    """Returns the share of correct samples of each problem.

    Args:
      correct: [P, K] bool, P problems with K samples each.

    Returns:
      [P] float64; its mean is mean@K, called pass@1 if samples are drawn independently.
    """
    return _counts(correct)[0] / correct.shape[1]


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Returns the unbiased estimate that at least one of k samples of a problem is correct.

    With c of n samples correct it is 1 - C(n - c, k) / C(n, k), the share of k-subsets that contain
    a correct sample. For k = n its mean is the share of problems with any correct sample.
    Source: Chen et al. (arXiv:2107.03374), 2.1.

    Args:
      correct: [P, n] bool.
      k: 1 to n.

    Returns:
      [P] float64.

    Raises:
      ValueError: If k is out of range.
    """
    counts, n = _counts(correct)
    if not 1 <= k <= n:
        raise ValueError(f"pass_at_k: k = {k} must be 1 to {n}, the number of samples per problem.")
    # Exact integers are divided once, because a product of floats loses digits; n is small.
    table = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return table[counts]


def passes(correct: np.ndarray) -> dict[str, float]:
    """Returns the mean over problems of `pass_at_k`, for powers of two from 2 up to K.

    Args:
      correct: [P, K] bool, P problems with K samples each.
    """
    powers = [k for k in (2, 4, 8, 16, 32, 64) if k <= correct.shape[1]]
    return {f"pass_at_{k}": float(pass_at_k(correct, k).mean()) for k in powers}


def wilson(share: float, trials: int, *, confidence: float = 0.95) -> Estimate:
    """Returns Wilson's score interval of a share; it is valid at 0 and 1, unlike a bootstrap.

    center = (p + z^2/2n) / (1 + z^2/n), half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    With one sample per problem it is the usual interval. With several, pass the mean of the
    problems' shares and the number of problems. The interval is then wider than necessary, never
    narrower, because no variable in [0, 1] has a larger variance than a coin of the same mean.
    Source: Wilson (1927), Journal of the American Statistical Association 22.

    Args:
      share: Mean of values in [0, 1].
      trials: Number of independent values, 1 or more.
      confidence: Nominal coverage, in (0, 1).
    """
    if not 0 <= share <= 1 or trials < 1:
        raise ValueError(
            f"wilson: share = {share} must be 0 to 1, and trials = {trials} must be at least 1."
        )
    z = _quantile(confidence)
    scale = 1 + z**2 / trials
    center = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / scale
    # At 0 and 1 one end is exactly the share, which the difference misses by a rounding.
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return Estimate(float(share), low, high)


def bootstrap(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Returns the percentile bootstrap of a mean over problems, for values of any unit.

    Args:
      values: [P] numbers, one for each problem, such as shares, tokens or seconds.
      confidence: Nominal coverage, in (0, 1).
      resamples: Number of times that P problems are drawn with replacement.
      seed: Seed of the draws; the same seed gives the same interval.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"bootstrap: values have shape {values.shape} and need [P] with P > 0.")
    _quantile(confidence)
    rng = np.random.Generator(np.random.PCG64(seed))
    size = values.size
    means = [values[rng.integers(size, size=size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def _counts(correct: np.ndarray) -> tuple[np.ndarray, int]:
    """Correct samples of each problem, [P], and the number of samples, K."""
    if correct.ndim != 2 or not correct.size or correct.dtype != np.bool_:
        raise ValueError(
            f"correct is {correct.dtype}{list(correct.shape)} and must be bool [P, K], not empty."
        )
    return correct.sum(axis=1), correct.shape[1]


def _quantile(confidence: float) -> float:
    """The z of a two-sided interval."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must be between 0 and 1, such as 0.95.")
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
