"""Runs side by side: runs that differ only in their seed form a group, which is labelled by its settings."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import DEFAULT_TRIGGERS
from fedprompt_mpi.liveness.output import one_line
from fedprompt_mpi.report.run_data import RunData
from fedprompt_mpi.rules.setting import Comparison
from fedprompt_mpi.rundir.may_differ import compared

TRIGGER, WHO = "poison.trigger", {"poison.clients", "poison.count"}
Spread = tuple[float, float | None]
"""Mean and standard deviation of a sample; the deviation of a single value is None."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ only in seed and machine."""

    settings: dict[str, Any]
    """By dotted name."""
    runs: list[RunData]

    def spread(self, name: str) -> Spread | None:
        """Return mean and standard deviation of a figure of the summaries; None if a run lacks it."""
        found = [getattr(run.summary, name, None) for run in self.runs]
        values = [value for value in found if value is not None]
        if len(values) < len(self.runs):
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return [run.settings["seed"] for run in self.runs]

    @property
    def is_poisoned(self) -> bool:
        """True if a client is malicious."""
        return bool(self.settings.get("poison.clients") or self.settings.get("poison.count"))

    @property
    def implied_trigger(self) -> str:
        """The trigger that its malicious clients imply."""
        return DEFAULT_TRIGGERS.get(self.settings.get("poison.kind", "word"), "") if self.is_poisoned else ""


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that tell experiments apart, by dotted name; a model by the last part of its name."""
    by_name = compared(settings, Comparison.SEEDS)
    if "model.name" in by_name:
        by_name["model.name"] = Path(by_name["model.name"]).name
    return by_name


def _in_use(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of tables inside of sections by name, but those that belong to another method."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            is_other = name.startswith("prompt.") and name != f"prompt.{settings['prompt.method']}"
            found |= {} if is_other else {f"{name}.{inner}": own for inner, own in value.items()}
        else:
            found[name] = value
    return found


def group(runs: Sequence[RunData]) -> list[Group]:
    """Group runs that differ only in seed and machine; groups are in the order of their first runs."""
    groups: list[Group] = []
    for run in runs:
        settings = _in_use(flat(run.settings))
        found = next((known for known in groups if known.settings == settings), None)
        if found is None:
            groups.append(Group(settings=settings, runs=[run]))
        else:
            found.runs.append(run)
    return groups


def labels(groups: Sequence[Group]) -> list[str]:
    """Return a label for each group: the settings in which the groups differ."""
    differ = differing(groups)
    if not differ:
        return [f"{known.settings['task.name']}, {known.settings['prompt.method']}" for known in groups]
    return [one_line(", ".join(_words(known, differ))) for known in groups]


def differing(groups: Sequence[Group]) -> list[str]:
    """Return the settings in which groups differ, by dotted name.

    The trigger of a poisoned run is none of them if each run has the one that its malicious clients imply.
    """
    names = sorted({name for known in groups for name in known.settings})

    def values(name: str) -> set[str]:
        """Return what the groups have; a method's own settings are those of its groups alone."""
        is_own = name.count(".") > 1
        return {repr(known.settings.get(name)) for known in groups if name in known.settings or not is_own}

    found = [name for name in names if len(values(name)) > 1]
    implied = all(known.settings.get(TRIGGER) == known.implied_trigger for known in groups)
    return [name for name in found if name != TRIGGER or not implied]


def shown_setting(value: Any) -> str:
    """Return a setting's value for a table."""
    if value in (None, "", []):
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def who_is_poisoned(settings: Mapping[str, Any]) -> str:
    """Return in words which clients are malicious, from settings by dotted name."""
    if count := settings.get("poison.count"):
        return f"{count} drawn client{'s' if count > 1 else ''} poisoned"
    clients = settings["poison.clients"]
    return f"clients {clients} poisoned" if clients else "clean"


def _words(known: Group, names: Sequence[str]) -> list[str]:
    """Return in words what a group's settings of these names are; who is poisoned is one of them."""
    words = [_word(name, known.settings[name]) for name in names if name not in WHO and name in known.settings]
    return [*words, who_is_poisoned(known.settings)] if not WHO.isdisjoint(names) else words


def _word(name: str, value: Any) -> str:
    short = name.rpartition(".")[2]
    return str(value) if isinstance(value, str) and short in ("name", "method", "partition", "aggregator") else (
        f"{short} {'-' if value in (None, '') else value}"
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
