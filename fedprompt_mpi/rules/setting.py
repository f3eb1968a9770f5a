"""How one setting is declared: default, bounds, and in which comparisons of runs it may differ.

`typed` makes typed values of what a file holds: settings, and the records of a run.
"""

import dataclasses
import enum
import functools
import math
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

MOST_MESSAGE = 1200
"""Characters of a message: a name in it may be as long as its author likes."""


class SettingsError(ValueError):
    """The user's settings or data are wrong; the message names the setting, the value and the remedy, in one line."""

    def __init__(self, message: str) -> None:
        """Keep a message; line ends in it, as of a name in a file, become spaces, and a very long one is cut."""
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= MOST_MESSAGE else f"{line[: MOST_MESSAGE - 200]} ... {line[-190:]}")


class OwnFileError(SettingsError):
    """A file that this rank has read is wrong or not there; the other ranks may have another."""


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
    """A poisoned run and the clean run that stands beside it: of the same seed, under the same defence."""


_MOST, _LEAST = 1e15, 1e-15
"""Numbers that mean something; beyond, products of two settings are no float any more. Whole numbers may be larger."""
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
        in_bounds = self.at_least <= value <= self.at_most and self.above < value < self.below
        return in_bounds and (isinstance(value, int) or value == 0 or _LEAST <= abs(value) <= _MOST)

    def __str__(self) -> str:
        named = (
            ("of at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return "a finite number " + " and ".join(f"{name} {bound:g}" for name, bound in named if math.isfinite(bound))


class Names(Protocol):
    """The names that a setting accepts, which are not known when it is declared."""

    def knows(self, name: object) -> bool:
        """Return True if a name is accepted."""
        ...

    def unknown(self, name: object) -> str:
        """Return what to say of one that is not."""
        ...


def setting(
    default: Any = None,
    *,
    factory: Callable[[], Any] | None = None,
    names: "Names | None" = None,
    may_differ: Comparison = NEVER,
    **bounds: float,
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: its value if the user gives none.
        factory: makes the default where that is mutable.
        names: of what it may name: a registry.
        may_differ: the comparisons of runs that ignore this setting.
        bounds: of a number, as `Bounds` names them.
    """
    metadata = {"may_differ": may_differ, "bounds": Bounds(**bounds) if bounds else None, "names": names}
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
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        value, bounds, names = getattr(settings, field.name), field.metadata.get("bounds"), field.metadata.get("names")
        name = f"{section}.{field.name}" if section else field.name
        if dataclasses.is_dataclass(value) and section:
            check(name, value)
        unknown = [one for one in _texts(value) if names is not None and not names.knows(one)]
        if names is not None and unknown:
            raise SettingsError(names.unknown(unknown[0]))
        if bounds is not None and isinstance(value, int | float) and not bounds.hold(value):
            raise SettingsError(f"{name} is {value}: give {bounds}")
        parts = (hints[field.name], *get_args(hints[field.name]))
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        for text in _texts(value):
            if found := NO_TEXT.search(text):
                raise SettingsError(f"{name} is {text[:60]!r}, which holds {found[0]!r}: that is no text")
        if isinstance(value, str) and choices and value not in choices:
            raise SettingsError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a value, in lists too."""
    if isinstance(value, str):
        yield value
    for part in value if isinstance(value, list) else []:
        yield from _texts(part)


MOST_BITS = 64
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no text holds: NUL, and halves of surrogate pairs, which stand for bytes that are no UTF-8."""
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}


def typed(kind: Any, value: Any, where: str = "") -> Any:
    """Return a value of a JSON or TOML file as a type, which is checked all the way down.

    Args:
        kind: a dataclass, a list, a dict with text keys, a choice of words, a union of those, or a plain type. Keys
            that a dataclass does not have are ignored: a later version may have added them to a record.
        value: as the file's parser returned it.
        where: dotted name of the value, for the message.

    Raises:
        ValueError: if it is no such value; the message names it, and what it should be.
    """
    if isinstance(value, int) and value.bit_length() > MOST_BITS:  # Python does not even print one of 4,300 digits
        raise ValueError(f"{where or 'it'} is a number of more than {MOST_BITS} bits: expecting {describe(kind)}")
    if dataclasses.is_dataclass(kind):
        return _typed_table(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return _typed_union(kind, value, where)
    if origin is list and isinstance(value, list):
        return [typed(arguments[0], part, where) for part in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): typed(arguments[1], part, f"{where}.{name}") for name, part in value.items()}
    if kind is Any or (origin is Literal and isinstance(value, str) and value in arguments):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where or 'it'} is a number of more than 64 bits: expecting {describe(kind)}")
    if isinstance(value, str) and NO_TEXT.search(value):
        raise ValueError(f"{where or 'it'} is {value[:60]!r}, which is no text")
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where or 'it'} is {value}: expecting a finite number")
    if origin is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where or 'it'} is {str(value)[:60]!r}: expecting {describe(kind)}")


def check_table(kind: Any, table: Any, where: str = "") -> None:
    """Check the names and the types of a table that need not be complete, and whose values need not fit together.

    Raises:
        ValueError: naming what is unknown or of another type.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where or 'it'} is {str(table)[:60]!r}: expecting a table")
    hints = _hints(kind)
    for name, value in table.items():
        dotted = f"{where}.{name}".lstrip(".")
        if name not in {field.name for field in dataclasses.fields(kind)}:
            raise ValueError(f"there is no setting {dotted[:80]!r}")
        if dataclasses.is_dataclass(hints[name]):
            check_table(hints[name], value, dotted)
        else:
            typed(hints[name], value, dotted)


def describe(kind: Any) -> str:
    """Return in words what a type is."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return " or ".join(describe(part) for part in arguments if part is not type(None))
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else repr(*arguments)
    if origin is list:
        return f"a list, each of its parts {describe(arguments[0])}"
    return _KINDS.get(kind, "a table")


def _typed_union(kind: Any, value: Any, where: str) -> Any:
    plain = [part for part in get_args(kind) if part is not type(None)]
    if value is None and len(plain) < len(get_args(kind)):
        return None
    if len(plain) == 1:
        return typed(plain[0], value, where)
    for part in plain:
        try:
            return typed(part, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where or 'it'} is {str(value)[:60]!r}: expecting {describe(kind)}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed_table(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {str(value)[:60]!r}: expecting a table")
    hints, made = _hints(kind), {}
    for field in dataclasses.fields(kind):
        given = value.get(field.name, value.get(f"{field.name}_", dataclasses.MISSING))  # older files have `round_`
        if given is not dataclasses.MISSING:
            made[field.name] = typed(hints[field.name], given, f"{where}.{field.name}".lstrip("."))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where or 'it'} has no {field.name}")
    return kind(**made)
