"""Figures of an attack, each with its interval of 95 % confidence.

Legend: n scores of what was there (positives), m of what was not (negatives).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedprompt_mpi.comm.statistics import NORMAL_95, student_95


class Figure(NamedTuple):
    """A figure and its interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether the interval holds a value."""
        return self.low <= value <= self.high


def auc_value(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the probability that a positive `[n]` scores above a negative `[m]`, ties counting half."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left") + np.searchsorted(ordered, positives, side="right")
    return float(below.sum()) / (2 * len(positives) * len(negatives))


def auc_interval(value: float, n: int, m: int) -> Figure:
    """Return an AUC of n positives and m negatives with its interval.

    At 0 and 1 the variance is that of half a pair less, or it would be none.

    References:
        Hanley and McNeil, The Meaning and Use of the Area under a ROC Curve, Radiology, 1982, Equations 1 and 2.
    """
    at = min(max(value, 0.5 / (n * m)), 1 - 0.5 / (n * m))
    q1, q2 = at / (2 - at), 2 * at**2 / (1 + at)
    variance = (at * (1 - at) + (n - 1) * (q1 - at**2) + (m - 1) * (q2 - at**2)) / (n * m)
    reach = NORMAL_95 * math.sqrt(max(variance, 0.0))
    return Figure(value, max(0.0, value - reach), min(1.0, value + reach))


def allowed(false_positive_rate: float, negatives: int) -> int:
    """Return which of m negatives, the largest first, is the threshold of a false-positive rate; 0 if m is too few.

    What was not there and is like the others is above the k-th largest of them with a probability of k / (m + 1).
    """
    return math.floor(false_positive_rate * (negatives + 1) + 1e-9)


def above(positives: np.ndarray, negatives: np.ndarray, rank: int) -> int:
    """Return how many positives are above the negative of a rank, 1 for the largest.

    References:
        Carlini et al., Membership Inference Attacks From First Principles, S&P 2022, arXiv:2112.03570, Section IV (the
        rate at a low false-positive rate).
    """
    return int((positives > np.sort(negatives)[-rank]).sum())


def proportion(hits: int, count: int, confidence: float = 0.95) -> Figure:
    """Return a share of independent trials with its exact interval.

    References:
        Clopper and Pearson, The Use of Confidence or Fiducial Limits, Biometrika, 1934.
    """
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _root(lambda p: _at_least(hits, count, p) - tail)
    high = 1.0 if hits == count else _root(lambda p: tail - _at_least(count - hits, count, 1 - p))
    return Figure(hits / count, low, high)


def _root(increasing: Callable[[float], float]) -> float:
    """Return where in [0, 1] an increasing function is zero."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return low


def _at_least(hits: int, count: int, p: float) -> float:
    """Return the probability of at least so many hits, each of probability p."""
    if p in (0.0, 1.0):
        return float(p == 1.0 or hits == 0)
    k = np.arange(hits, count + 1)
    return float(np.exp(_log_choose(count)[hits:] + k * math.log(p) + (count - k) * math.log1p(-p)).sum())


@functools.cache
def _log_choose(count: int) -> np.ndarray:
    """Return the logarithms of the numbers of choices of 0, 1, ... of so many."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    return logs[count] - logs - logs[::-1]


def mean(values: np.ndarray) -> Figure:
    """Return the mean of a share over uploads, with the interval of Student's t distribution; of one it is endless.

    Where all are 0, or all are 1, they have no spread, and the interval is that of as many trials.
    """
    middle, count = float(np.mean(values)), len(values)
    if count < 2:
        return Figure(middle, -math.inf, math.inf)
    if np.ptp(values) == 0 and middle in (0.0, 1.0):
        return proportion(round(middle) * count, count)
    reach = student_95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Figure(middle, max(0.0, middle - reach), min(1.0, middle + reach))
