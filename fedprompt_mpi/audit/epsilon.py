"""A lower bound of epsilon from canaries: how well may those that were in be told from those that were not.

A mechanism is (epsilon, delta)-private only if for every test TPR <= e^epsilon FPR + delta, and the same of the rates
of rejection. So rates that were observed bound epsilon from below, with the confidence of their intervals.

References:
    Andrew et al., One-shot Empirical Privacy Estimation for Federated Learning, 2023, arXiv:2302.03098 (many canaries
    in one run; the Gaussian estimate).
    Jagielski et al., Auditing Differentially Private Machine Learning, NeurIPS 2020, arXiv:2006.07709 (the bound by
    Clopper and Pearson).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedprompt_mpi.audit.intervals import proportion
from fedprompt_mpi.comm.statistics import wilson_interval

THRESHOLDS = 200
"""Tried on one half of the canaries; the best is judged on the other half."""


class EpsilonBound(NamedTuple):
    """What canaries say of epsilon."""

    bound: float
    """Epsilon is at least this, with 95 % confidence."""
    estimate: float
    """Of two normal distributions with the scores' means and their common deviation; no bound."""
    most: float
    """The largest bound that so many canaries can show."""


def lower_bound(inside: np.ndarray, outside: np.ndarray, delta: float) -> EpsilonBound:
    """Return what the scores of canaries `[n]` that were in and `[m]` that were not say; larger means in."""
    thresholds = np.unique(np.quantile(np.concatenate([inside[::2], outside[::2]]), np.linspace(0, 1, THRESHOLDS)))
    best = max(thresholds, key=lambda at: _bound(inside[::2], outside[::2], at, delta, wilson_interval))
    judged = _bound(inside[1::2], outside[1::2], float(best), delta, _exact)
    apart = _bound(np.ones(len(inside) // 2), np.zeros(len(outside) // 2), 0.5, delta, _exact)
    return EpsilonBound(judged, _gaussian(inside, outside, delta), apart)


def _exact(share: float, count: int) -> tuple[float, float]:
    """Return the bounds of a share by Clopper and Pearson; a wrong one of either rate has half of 5 %."""
    found = proportion(round(share * count), count)
    return found.low, found.high


def _bound(
    inside: np.ndarray,
    outside: np.ndarray,
    threshold: float,
    delta: float,
    interval: Callable[[float, int], tuple[float, float]],
) -> float:
    """Return the bound of one test, of whichever of its two rates says more."""
    true = interval(float((inside > threshold).mean()), len(inside))[0]
    false = interval(float((outside > threshold).mean()), len(outside))[1]
    bounds = [0.0]
    for share, other in ((true - delta, false), (1 - false - delta, 1 - true)):
        if share > 0 and other > 0:
            bounds.append(math.log(share / other))
    return max(bounds)


def _gaussian(inside: np.ndarray, outside: np.ndarray, delta: float) -> float:
    """Return epsilon of telling two normal distributions of equal deviation apart, at delta.

    References:
        Balle and Wang, Improving the Gaussian Mechanism, ICML 2018, arXiv:1805.06530, Theorem 8.
    """
    spread = math.sqrt((float(np.var(inside)) + float(np.var(outside))) / 2)
    apart = float(np.mean(inside) - np.mean(outside))
    if apart <= 0:
        return 0.0
    if spread == 0:
        return math.inf
    mu = apart / spread

    def spent(epsilon: float) -> float:
        left = _normal(mu / 2 - epsilon / mu)
        right = _normal(-mu / 2 - epsilon / mu)
        return left - (math.exp(min(epsilon, 700.0)) * right if right > 0 else 0.0)

    low, high = 0.0, mu**2 / 2 + 10 * mu + 10
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > max(delta, 1e-12) else (low, middle)
    return low


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
