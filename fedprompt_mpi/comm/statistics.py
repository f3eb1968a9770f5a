"""Statistics of the rounds from the records of all ranks: medians, quantiles and confidence intervals.

A phase of a round counts with its slowest rank. A transfer counts with the slowest rank of each collective, since the
collective lasts as long. The confidence interval of a median follows from the order of the samples alone: it assumes
no distribution (times are skewed). Each of several launches of one job counts once, with its own median, since its
rounds share the placement of its processes.

Legend: n samples.

References:
    Hunold and Carpen-Amarie, Reproducible MPI Benchmarking is Still Not as Easy as You Think, IEEE TPDS 2016 (several
    launches; the slowest rank); Le Boudec, Performance Evaluation of Computer and Communication Systems, 2010,
    Theorem 2.1 (intervals of quantiles).
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from fedprompt_mpi.comm.timing import SECURE, TRANSFERS

TimingRow = tuple[int, int, str, float, int]
"""Round, rank, phase, seconds, bytes: a line of timings.csv."""
CONFIDENCE = Fraction(95, 100)
NORMAL_95 = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""
LEAST_SAMPLES = 6
"""Fewer samples do not bound a median with that confidence."""
WAITING = ("wait", "sync")
STATISTICS = (
    "train", "copy", "pack", "wait", "wait (rank 0)", "wait (workers)", "transfer", "wait + transfer", *TRANSFERS,
    "residuals", *SECURE, "aggregate", "evaluate", "overhead",
)  # fmt: skip
"""The figures that are reported of a round."""

OCCASIONAL = ("evaluate", "residuals")
"""Figures of some rounds only: zero is not the time of what was not done."""
MOST_OPEN = 2**19
"""Records that are held while rounds are incomplete: some 60 MB."""

_Phases = dict[str, list[float]]
"""Phase -> seconds of each of its records, in order."""


def slowest_by_round(rows: Iterable[TimingRow]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield each round and its figures, figure -> seconds, as soon as the round is complete.

    So the records of a long run need little memory: if they are many, a round is complete once there are records of the
    next but one (what belongs to a round may be recorded in the one after it).

    `overhead` is the time that measuring added: of each synchronisation the least time of any rank, since the last
    rank to arrive waited for no other. `total` is the longest sum of all phases of any rank, so that no other figure
    exceeds it; figures of different ranks overlap.

    Raises:
        ValueError: if there is a record of a round that was complete.
    """
    rounds: dict[int, dict[int, _Phases]] = {}
    held, complete = 0, -1
    for round_, rank, phase, seconds, _ in rows:
        if round_ <= complete:
            raise ValueError(f"a record of round {round_} comes after round {complete} is complete")
        if held >= MOST_OPEN and round_ not in rounds:
            for done in sorted(number for number in rounds if number < round_ - 1):
                yield done, _figures(rounds.pop(done))
                complete = done
            held = sum(
                len(own) for by_rank in rounds.values() for phases in by_rank.values() for own in phases.values()
            )
        rounds.setdefault(round_, {}).setdefault(rank, {}).setdefault(phase, []).append(seconds)
        held += 1
    for left, by_rank in rounds.items():
        yield left, _figures(by_rank)


def _figures(by_rank: Mapping[int, _Phases]) -> dict[str, float]:
    ranks = by_rank.values()
    workers = [phases for rank, phases in by_rank.items() if rank]
    transfers = {phase: sum(map(max, _by_occasion(ranks, phase))) for phase in TRANSFERS}
    return {
        **{name: _slowest(ranks, name) for name in ("train", "copy", "pack", "residuals", *SECURE, "aggregate")},
        **transfers,
        "evaluate": _slowest(ranks, "evaluate", "evaluate_clients"),
        "wait": _slowest(ranks, *WAITING),
        "wait (rank 0)": _slowest([by_rank.get(0, {})], *WAITING),
        "wait (workers)": _slowest(workers, *WAITING),
        "transfer": sum(transfers.values()),
        "wait + transfer": _slowest(ranks, *WAITING, *TRANSFERS),
        "overhead": sum(map(min, _by_occasion(ranks, "sync"))),
        "total": max((sum(map(sum, phases.values())) for phases in ranks), default=0.0),
    }


def _slowest(ranks: Collection[_Phases], *names: str) -> float:
    """Return the longest time that a rank spent in some phases together, in seconds."""
    return max((sum(sum(phases.get(name, ())) for name in names) for phases in ranks), default=0.0)


def _by_occasion(ranks: Collection[_Phases], phase: str) -> Iterable[tuple[float, ...]]:
    """Return the seconds of each rank, for each time that all ranks went through a phase together."""
    return zip_longest(*(phases.get(phase, ()) for phases in ranks), fillvalue=0.0)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability, of which a share of `count` independent draws is known.

    References:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927, Equation 7.
    """
    z2 = NORMAL_95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


LEAST_PAIRS = 3
"""Fewer pairs are never called an effect: two differences may be equal by chance."""


class Difference(NamedTuple):
    """The mean of paired differences, and its interval of 95 % confidence."""

    mean: float
    low: float
    high: float
    pairs: int
    """n; with one pair the interval is infinite."""

    @property
    def is_effect(self) -> bool:
        """True if the interval of at least `LEAST_PAIRS` does not hold 0."""
        return self.pairs >= LEAST_PAIRS and (self.low > 0 or self.high < 0)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean of second - first of n pairs, with the interval of Student's t distribution.

    It takes the differences for normally distributed. Where all are equal, as of rates at their bounds, their spread
    says nothing about the next one, and the interval is a point.

    References:
        Student, The Probable Error of a Mean, Biometrika, 1908.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    count, mean = len(differences), float(np.mean(differences))
    if count == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    reach = student_95(count - 1) * float(np.std(differences, ddof=1)) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach, count)


def student_95(freedom: int) -> float:
    """Return the quantile 0.975 of Student's t distribution with so many degrees of freedom, within 1e-6 of itself.

    It is the root of the distribution's integral, of which Simpson's rule takes 2,001 points.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    low, high = 0.0, 13.0  # the largest, of one degree, is 12.7
    while high - low > 1e-9:
        middle = (low + high) / 2
        at = np.linspace(0.0, middle, len(weights))
        density = scale * (1 + at**2 / freedom) ** (-(freedom + 1) / 2)
        low, high = (middle, high) if float(density @ weights) * at[1] / 3 < 0.475 else (low, middle)
    return low


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A figure over repetitions, rounds or launches, in its unit."""

    median: float
    q05: float
    q25: float
    q75: float
    q95: float
    low: float | None
    """Of the confidence interval of the median; None of too few samples."""
    high: float | None


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Return median, quantiles and the confidence interval of the median of n samples, in their unit."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    interval = median_interval(len(ordered))
    q05, q25, median, q75, q95 = np.quantile(ordered, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
    low, high = (None, None) if interval is None else (float(ordered[interval[0]]), float(ordered[interval[1]]))
    return Quantiles(median=median, q05=q05, q25=q25, q75=q75, q95=q95, low=low, high=high)


def median_interval(n: int) -> tuple[int, int] | None:
    """Return which of n ordered samples bound the median with `CONFIDENCE`; None below `LEAST_SAMPLES`.

    The number of samples below the median is binomial with p = 1/2.
    """
    tail, low = 0, -1
    for k in range(n // 2):
        tail += math.comb(n, k)  # in whole numbers: 2^n is beyond a float from n = 1024 on
        if 2 * tail > (1 - CONFIDENCE) * Fraction(2**n):
            break
        low = k
    return None if low < 0 else (low, n - 1 - low)


def rounds_after(rounds: Iterable[tuple[int, dict[str, float]]], before: int) -> dict[int, dict[str, float]]:
    """Return the figures of the rounds after one, numbered anew from 1: those of the last job of a resumed run."""
    return {round_ - before: figures for round_, figures in rounds if round_ > before}


def communication(launches: Sequence[Mapping[int, Mapping[str, float]]], *, warmup: int) -> dict[str, Any]:
    """Return the figures of one job, launched once or several times.

    Args:
        launches: of each, round -> figure -> seconds of the slowest rank.
        warmup: first rounds to leave out. Round 0, which only evaluates, never counts; nor does what follows the last
            round, the broadcast of the final vector.
    """
    samples: dict[str, list[list[float]]] = {}
    for rounds in launches:
        trained = [round_ for round_, figures in sorted(rounds.items()) if round_ > warmup and figures["train"] > 0]
        for name in STATISTICS:
            own = [rounds[round_][name] for round_ in trained]
            samples.setdefault(name, []).append([s for s in own if s > 0 or name not in OCCASIONAL])
    several = len(launches) > 1
    figures = {}
    for name, by_launch in samples.items():
        values = [float(np.median(own)) for own in by_launch if own] if several else by_launch[0]
        if values and max(values) > 0:
            figures[name] = dataclasses.asdict(quantiles(values))
    rounds_used = sum(len(own) for own in samples["train"])
    return {"launches": len(launches), "rounds": rounds_used, "warmup_rounds": warmup, "seconds": figures}
