"""Runs side by side: which are the same but for their seed, what tells the others apart, and what came out."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.comparable import EXPERIMENT, dotted
from fedprompt_mpi.report.run_data import RunData

Spread = tuple[float, float | None]
"""A mean, and the standard deviation of a sample; None of a single one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in seed and place alone."""

    settings: dict[str, Any]
    """By dotted name."""
    runs: list[RunData]

    def spread(self, name: str) -> Spread | None:
        """Return mean and standard deviation of a figure of the summaries; None if a run lacks it."""
        values = [run.summary[name] for run in self.runs if run.summary and run.summary[name] is not None]
        if len(values) < len(self.runs):
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return [run.settings["seed"] for run in self.runs]

    @property
    def is_poisoned(self) -> bool:
        """Whether somebody is malicious."""
        return bool(self.settings.get("poison.clients"))


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted name, without what makes no other experiment; a model by its last name."""
    by_name = dotted(settings, EXPERIMENT)
    if "model.name" in by_name:
        by_name["model.name"] = Path(by_name["model.name"]).name
    return by_name


def group(runs: Sequence[RunData]) -> list[Group]:
    """Put runs together that differ in seed and place alone, in the order in which they come."""
    groups: list[Group] = []
    for run in runs:
        settings = flat(run.settings)
        found = next((known for known in groups if known.settings == settings), None)
        if found is None:
            groups.append(Group(settings=settings, runs=[run]))
        else:
            found.runs.append(run)
    return groups


def labels(groups: Sequence[Group]) -> list[str]:
    """Return for each group what tells it from the others, in words."""
    names = sorted({name for known in groups for name in known.settings})
    differ = [name for name in names if len({repr(known.settings.get(name)) for known in groups}) > 1]
    if not differ:
        return [f"{known.settings['task.name']}, {known.settings['prompt.method']}" for known in groups]
    return [", ".join(_word(name, known.settings.get(name)) for name in differ) for known in groups]


def _word(name: str, value: Any) -> str:
    short = name.split(".")[1]
    if name == "poison.clients":
        return f"clients {value} poisoned" if value else "clean"
    return str(value) if isinstance(value, str) and short in ("name", "method", "partition", "aggregator") else (
        f"{short} {'-' if value is None else value}"
    )  # fmt: skip


def percent(spread: Spread | None) -> str:
    """Return a rate in percent, with its standard deviation if there is one."""
    if spread is None:
        return "-"
    mean, deviation = spread
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def both_rates(known: Group) -> str:
    """Return accuracy/ASR as the paper's tables have them, in percent, each with its standard deviation."""
    return f"{percent(known.spread('accuracy'))} / {percent(known.spread('attack_success_rate'))}"
