"""How one setting is declared: default, bounds, and in which comparisons of runs it may differ."""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints


class SettingsError(ValueError):
    """The user's settings or data are wrong; the message names the setting, the value and the remedy."""


class Comparison(enum.Flag):
    """A comparison of two runs. A setting states in which of them it may differ."""

    RESUME = enum.auto()
    """A run and its continuation: the final vector has the same bits."""
    SWEEP = enum.auto()
    """A finished run and the run that a sweep is about to start."""
    LAUNCHES = enum.auto()
    """Launches of one job, whose timings are pooled."""
    SEEDS = enum.auto()
    """Runs of one experiment, which are averaged over seeds."""
    CLEAN_RUN = enum.auto()
    """A poisoned run and the clean run that stands beside it."""


NEVER, ALWAYS = Comparison(0), ~Comparison(0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The numbers that a setting accepts; every one of them is finite."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        """Return True if a number is within the bounds."""
        return self.at_least <= value <= self.at_most and self.above < value < self.below and math.isfinite(value)

    def __str__(self) -> str:
        named = (
            ("of at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return "a finite number " + " and ".join(f"{name} {bound:g}" for name, bound in named if math.isfinite(bound))


def setting(
    default: Any = None, *, factory: Callable[[], Any] | None = None, may_differ: Comparison = NEVER, **bounds: float
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: its value if the user gives none.
        factory: makes the default where that is mutable.
        may_differ: the comparisons of runs that ignore this setting.
        bounds: of a number, as `Bounds` names them.
    """
    metadata = {"may_differ": may_differ, "bounds": Bounds(**bounds) if bounds else None}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(section: str, settings: Any) -> None:
    """Check every setting of a section against its bounds and its list of values.

    Args:
        section: name of the section, for the message; empty for the settings outside of sections.
        settings: a dataclass whose fields are made by `setting`.

    Raises:
        SettingsError: naming the setting, its value and the values that it accepts.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata.get("bounds")
        name = f"{section}.{field.name}" if section else field.name
        if bounds is not None and isinstance(value, int | float) and not bounds.hold(value):
            raise SettingsError(f"{name} is {value}: give {bounds}")
        parts = (hints[field.name], *get_args(hints[field.name]))
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if isinstance(value, str) and choices and value not in choices:
            raise SettingsError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
