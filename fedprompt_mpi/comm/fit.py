"""The time of a collective as a function of the vector's bytes: a few straight lines, and interpolation."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

MOST_SEGMENTS = 3
LEAST_SIZES = 3
"""Measured sizes that a line is fitted to: two are met exactly, whatever they are."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Seconds of a transfer = latency + bytes / bandwidth, between two sizes: the alpha-beta model.

    References:
        Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, IJHPCA 2005,
        Section 3.
    """

    first: int
    """Smallest size in bytes."""
    last: int
    latency_s: float
    """alpha."""
    seconds_per_byte: float
    """beta."""
    worst: float
    """Largest relative error of the model at a measured size."""

    def seconds(self, size: int) -> float:
        """Return the model's seconds for a vector of n bytes."""
        return self.latency_s + self.seconds_per_byte * size


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Fit one line with the least relative errors: small vectors count as much as large ones; no term is negative."""
    n, t = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(n), n])
    candidates = [np.linalg.lstsq((terms / t).T, np.ones_like(t), rcond=None)[0]]
    for only in (0, 1):  # the bounds, where the best of both would be negative
        share = terms[only] / t
        candidates.append(np.where(np.arange(2) == only, share.sum() / (share @ share), 0.0))
    errors = [np.abs(c @ terms / t - 1) if (c >= 0).all() else np.full_like(t, np.inf) for c in candidates]
    best = int(np.argmin([error @ error for error in errors]))
    latency, per_byte = candidates[best].tolist()
    return Fit(
        first=int(n[0]), last=int(n[-1]), latency_s=latency, seconds_per_byte=per_byte, worst=float(errors[best].max())
    )


WORTH, EXACT = 0.9, 0.01
"""More lines are taken if the worst relative error falls to that share of it, and it is not small anyway."""


def fit_segments(sizes: Sequence[int], seconds: Sequence[float]) -> list[Fit]:
    """Fit up to `MOST_SEGMENTS` lines, which part the sizes where their worst relative error is least."""
    count, best = len(sizes), [fit(sizes, seconds)]
    for segments in range(2, MOST_SEGMENTS + 1):
        for ends in itertools.combinations(range(LEAST_SIZES, count - LEAST_SIZES + 1), segments - 1):
            bounds = list(itertools.pairwise([0, *ends, count]))
            if min(stop - start for start, stop in bounds) < LEAST_SIZES:
                continue
            found = [fit(sizes[start:stop], seconds[start:stop]) for start, stop in bounds]
            if max(f.worst for f in found) < WORTH * max(f.worst for f in best) > EXACT:
                best = found
    return best


def interpolate(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """Return the seconds for n bytes on the straight line between the two measured sizes around it.

    Beyond the largest the last line goes on.
    """
    if size <= sizes[-1] or len(sizes) == 1:
        return float(np.interp(size, sizes, seconds))
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
    return seconds[-1] + slope * (size - sizes[-1])
