"""From the records of all ranks to figures of a round: medians, quantiles, and how sure they are.

Of each phase a round counts with its slowest rank. The confidence interval of a median comes from the order of the
samples alone, so nothing is assumed of how times are distributed (they are skewed). With several launches of one job
each counts once, with its own median: rounds of one launch share where their processes happened to be put.

Legend: n samples.

References:
    Hunold and Carpen-Amarie, Reproducible MPI Benchmarking is Still Not as Easy as You Think, IEEE TPDS 2016 (several
    launches; the slowest rank); Le Boudec, Performance Evaluation of Computer and Communication Systems, 2010,
    Theorem 2.1 (intervals of quantiles).
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from fedprompt_mpi.comm.timing import TRANSFERS

Row = tuple[int, int, str, float, int]
"""Round, rank, phase, seconds, bytes: a line of timings.csv."""
CONFIDENCE = Fraction(95, 100)
FIGURES = {
    "train": ("train",),
    "copy": ("copy",),
    "pack": ("pack",),
    "wait": ("wait", "sync"),
    "transfer": TRANSFERS,
    "wait + transfer": ("wait", "sync", *TRANSFERS),
    **{name: (name,) for name in TRANSFERS},
    "aggregate": ("aggregate",),
    "evaluate": ("evaluate", "evaluate_clients"),
}
"""What is reported -> the phases whose sum it is, on each rank."""


def slowest_by_round(rows: Iterable[Row]) -> dict[int, dict[str, float]]:
    """Return round -> figure -> seconds of the slowest rank; `overhead` is what measuring added.

    That is the least that any rank spent in the barriers before the collectives: whoever came last waited for nobody.
    """
    by_rank: dict[int, dict[int, dict[str, float]]] = {}
    for round_, rank, phase, seconds, _ in rows:
        phases = by_rank.setdefault(round_, {}).setdefault(rank, {})
        phases[phase] = phases.get(phase, 0.0) + seconds
    slowest = {}
    for round_, ranks in by_rank.items():
        slowest[round_] = {
            name: max(sum(phases.get(part, 0.0) for part in parts) for phases in ranks.values())
            for name, parts in FIGURES.items()
        }
        slowest[round_]["overhead"] = min(phases.get("sync", 0.0) for phases in ranks.values())
    return slowest


def describe(samples: Sequence[float]) -> dict[str, float | None]:
    """Return median, quantiles and the confidence interval of the median of n samples, in their unit."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    interval = median_interval(len(ordered))
    q05, q25, median, q75, q95 = np.quantile(ordered, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    low, high = (None, None) if interval is None else (float(ordered[interval[0]]), float(ordered[interval[1]]))
    return {"median": median, "q05": q05, "q25": q25, "q75": q75, "q95": q95, "low": low, "high": high}


def median_interval(n: int) -> tuple[int, int] | None:
    """Return which of n ordered samples bound the median with `CONFIDENCE`; None if n is too small (below 6).

    The number of samples below the median is binomial with p = 1/2.
    """
    tail, low = 0, -1
    for k in range(n // 2):
        tail += math.comb(n, k)  # in whole numbers: 2^n is beyond a float from n = 1024 on
        if 2 * tail > (1 - CONFIDENCE) * Fraction(2**n):
            break
        low = k
    return None if low < 0 else (low, n - 1 - low)


def communication(launches: Sequence[Iterable[Row]], *, warmup: int) -> dict[str, Any]:
    """Return the figures of one job, launched once or several times.

    Args:
        launches: the records of each.
        warmup: first rounds to leave out. Round 0, which only evaluates, never counts; nor does what follows the last
            round, the broadcast of the final vector.
    """
    samples: dict[str, list[list[float]]] = {}
    for rows in launches:
        rounds = slowest_by_round(rows)
        trained = [round_ for round_, figures in sorted(rounds.items()) if round_ > warmup and figures["train"] > 0]
        for name in (*FIGURES, "overhead"):
            samples.setdefault(name, []).append([rounds[round_][name] for round_ in trained])
    several = len(launches) > 1
    figures = {}
    for name, by_launch in samples.items():
        values = [float(np.median(own)) for own in by_launch if own] if several else by_launch[0]
        if values and max(values) > 0:
            figures[name] = describe(values)
    rounds_used = sum(len(own) for own in samples["train"])
    return {"launches": len(launches), "rounds": rounds_used, "warmup_rounds": warmup, "seconds": figures}
