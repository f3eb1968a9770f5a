"""What an attack changes: poisoned runs against clean ones of the same seed, with intervals.

A pair agrees in all settings but the attack: in seed, data, training and defence.
"""

import dataclasses
from collections.abc import Sequence

from fedprompt_mpi.comm.statistics import Difference, paired_difference
from fedprompt_mpi.report.groups import Group, Spread, percent
from fedprompt_mpi.report.run_data import RunData
from fedprompt_mpi.report.tables import Table
from fedprompt_mpi.rules.setting import Comparison
from fedprompt_mpi.rundir.may_differ import compared

CAPTION = (
    "What the attack changes against clean runs of the same seed and defence: points, with 95 % intervals; beside them "
    "the weight of malicious clients, and the right answers that the trigger turns"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The finished runs of one attack, and the clean run of each."""

    poisoned: list[RunData]
    clean: list[RunData]

    def difference(self, name: str) -> Difference | None:
        """Return the difference of a figure of the summaries; None if a run lacks it."""
        first, second = ([getattr(run.summary, name, None) for run in runs] for runs in (self.clean, self.poisoned))
        known = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        if not known or len(known) < len(first):
            return None
        return paired_difference([a for a, _ in known], [b for _, b in known])


def pair(known: Group, groups: Sequence[Group]) -> Pairs:
    """Return the pairs of a poisoned group: each of its runs with the clean one that differs in its attack alone."""
    clean = [run for other in groups if not other.is_poisoned for run in other.runs if run.summary]
    found: list[tuple[RunData, RunData]] = []
    for run in known.runs:
        ours = compared(run.settings, Comparison.CLEAN_RUN)
        partner = next((other for other in clean if compared(other.settings, Comparison.CLEAN_RUN) == ours), None)
        if run.summary and partner is not None:
            found.append((run, partner))
    return Pairs(poisoned=[run for run, _ in found], clean=[partner for _, partner in found])


def pairs_table(groups: Sequence[Group], names: Sequence[str]) -> Table | None:
    """Return a row for each poisoned group that has clean runs beside it; None if there is none."""
    rows = []
    for known, name in zip(groups, names, strict=True):
        pairs = pair(known, groups) if known.is_poisoned else None
        if pairs is None or not pairs.poisoned:
            continue
        own = Group(settings=known.settings, runs=pairs.poisoned)
        accuracy, success = pairs.difference("accuracy"), pairs.difference("attack_success_rate")
        rows.append(
            [
                name,
                str(len(pairs.poisoned)),
                percent(_mean(own.spread("malicious_share"))),
                format_difference(accuracy),
                format_difference(success),
                percent(_mean(own.spread("flip_rate"))),
                verdict(success, "raises ASR", "lowers ASR"),
            ]
        )
    if not rows:
        return None
    head = ["attack", "pairs", "weight, %", "accuracy", "ASR", "turned, %", "effect on ASR"]
    return Table(name="pairs", caption=CAPTION, rows=[head, *rows])


def _mean(spread: Spread | None) -> Spread | None:
    """Return a spread without its deviation."""
    return None if spread is None else (spread[0], None)


def format_difference(found: Difference | None) -> str:
    """Return a difference of rates in points, with its interval."""
    if found is None:
        return "-"
    if found.pairs == 1:
        return f"{100 * found.mean:+.1f} (one pair)"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def verdict(found: Difference | None, up: str, down: str) -> str:
    """Return in words whether a difference is an effect: its interval must not hold 0."""
    if found is None or not found.is_effect:
        return "none shown"
    return up if found.mean > 0 else down
