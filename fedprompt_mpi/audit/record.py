"""audit.json: what each attack saw, and the figures that follow.

Legend: n scores of what was there, m of what was not.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from fedprompt_mpi.audit.intervals import Figure, above, allowed, auc_interval, auc_value, mean, proportion

View = Literal["server", "client", "public"]
FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an attack makes of one upload, one step of the global vector, or the final prompt."""

    attack: str
    by: str
    """The statistic."""
    view: View
    round: int
    client: int | None = None
    """Whose upload it is; None of a sum."""
    scores: list[float] = dataclasses.field(default_factory=list)
    """Of words or examples, larger means in."""
    truth: list[bool] = dataclasses.field(default_factory=list)
    """Which of them were in."""
    hits: int = 0
    """Of an attack that names words or counts labels: how many it names rightly,"""
    said: int = 0
    """how many it names,"""
    true: int = 0
    """how many there are,"""
    chance: float | None = None
    """and the share of these that a guess without the upload gets."""
    chance_auc: float = 0.5
    """The AUC of a guess without the upload."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FigureRecord:
    """A figure with its interval of 95 % confidence; None where it is infinite."""

    value: float
    low: float | None
    high: float | None
    chance: float | None = None
    """What a guess gets."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """The figures of one attack from one view."""

    attack: str
    by: str
    view: View
    observations: int
    """Uploads, or sums."""
    positives: int
    negatives: int
    """Scores of one observation, on average, where there are scores."""
    figures: dict[str, FigureRecord]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRecord:
    """What canaries say of the mechanism's epsilon."""

    mechanism: str
    rounds: int
    inside: int
    outside: int
    bound: float
    """Epsilon is at least this, with 95 % confidence."""
    estimate: float | None
    """Of two normal distributions of the scores; None if they do not overlap."""
    most: float
    """The largest bound that so many canaries can show."""
    stated: float | None
    """The accountant's epsilon."""
    delta: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """audit.json."""

    method: str
    mechanism: str
    secure_aggregation: bool
    batch_size: int
    steps: int | None
    """None where client.epochs decides."""
    rounds: list[int]
    """That were audited."""
    seconds: float
    """Of the attacks, on the slowest rank."""
    leaks: list[Leak]
    canary: CanaryRecord | None = None
    observations: list[Observation] = dataclasses.field(default_factory=list)


def leaks_of(observations: Iterable[Observation]) -> list[Leak]:
    """Return the figures of observations, by attack, statistic and view."""
    groups: dict[tuple[str, str, View], list[Observation]] = {}
    for seen in observations:
        groups.setdefault((seen.attack, seen.by, seen.view), []).append(seen)
    return [_leak(group) for group in groups.values()]


def _leak(group: list[Observation]) -> Leak:
    first, figures = group[0], dict(_figures(group))
    return Leak(
        attack=first.attack,
        by=first.by,
        view=first.view,
        observations=len(group),
        positives=round(np.mean([sum(seen.truth) for seen in group])),
        negatives=round(np.mean([len(seen.truth) - sum(seen.truth) for seen in group])),
        figures=figures,
    )


def _figures(group: list[Observation]) -> Iterator[tuple[str, FigureRecord]]:
    scored = [seen for seen in group if any(seen.truth) and not all(seen.truth)]
    inside = [np.array(seen.scores)[np.array(seen.truth)] for seen in scored]
    outside = [np.array(seen.scores)[~np.array(seen.truth)] for seen in scored]
    if scored:
        value = float(np.mean([auc_value(one, other) for one, other in zip(inside, outside, strict=True)]))
        # what was not there is the same for all observations of a round, and so are words
        count = sum(map(len, inside)) if group[0].attack == "membership" else max(map(len, inside))
        guesses = [seen.chance_auc for seen in scored]
        yield "auc", _record(auc_interval(value, count, max(map(len, outside))), float(np.mean(guesses)))
    if scored and group[0].attack == "membership":
        for rate in FALSE_POSITIVE_RATES:
            ranks = [allowed(rate, len(other)) for other in outside]
            if all(ranks):
                hits = sum(above(one, other, k) for one, other, k in zip(inside, outside, ranks, strict=True))
                chance = float(np.mean([k / (len(other) + 1) for k, other in zip(ranks, outside, strict=True)]))
                yield f"tpr_at_{rate:g}", _record(proportion(hits, sum(map(len, inside))), chance)
    named = [seen for seen in group if seen.true]
    if named:
        chances = [seen.chance for seen in named if seen.chance is not None]
        chance = float(np.mean(chances)) if chances else None
        yield "recall", _record(mean(np.array([seen.hits / seen.true for seen in named])), chance)
        if named[0].attack == "tokens":
            yield "precision", _record(mean(np.array([seen.hits / max(seen.said, 1) for seen in named])), None)


def _record(figure: Figure, chance: float | None) -> FigureRecord:
    low, high = (bound if math.isfinite(bound) else None for bound in (figure.low, figure.high))
    return FigureRecord(value=figure.value, low=low, high=high, chance=chance)
