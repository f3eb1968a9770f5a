"""What has a name in the settings: rules, attacks, methods and so on, the built-in ones and those of plug-ins alike.

There is a registry for each kind, and `register` is its only door:

    @aggregators.register("median")
    class Median(Aggregator): ...

What has options of its own names a dataclass, whose fields are made by `setting`. Those of a plug-in have a table of
their own, such as `[federation.my_rule]`; those of the built-in ones stand in the section itself, as they always have.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import keyword
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from fedprompt_mpi.rules.setting import Comparison, SettingsError

PACKAGE = __name__.split(".")[0]
NAME = re.compile(r"[a-z][a-z0-9_-]{0,59}")
Thing = TypeVar("Thing")
Registered = TypeVar("Registered")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[Thing]):
    """One that is registered."""

    thing: Thing
    options: type[Any] | None
    """Dataclass of its own options."""
    module: str
    """In which it was registered."""

    @property
    def is_built_in(self) -> bool:
        """True if it is of this package."""
        return self.module.split(".")[0] == PACKAGE


class Registry(Mapping[str, Thing]):
    """The things of one kind, by name: the built-in ones first, in their order."""

    def __init__(self, kind: str, setting: str, home: str, *, base: str = "", late: tuple[str, ...] = ()) -> None:
        """Begin with nothing.

        Args:
            kind: in words, for messages.
            setting: dotted name of the setting that names one; its section holds the tables of options.
            home: module in which the built-in ones are registered; it is imported at the first look.
            base: class from which those that are registered are derived, as "module:Class"; empty for functions.
            late: names of the built-in ones, if importing `home` takes too long to check a name.
        """
        self.kind, self.setting = kind, setting
        self._home, self._base, self._late = f"{PACKAGE}.{home}", base, late
        self._entries: dict[str, Entry[Thing]] = {}

    @property
    def section(self) -> str:
        """Of the settings, in which the tables of options are."""
        return self.setting.split(".")[0]

    def register(self, name: str, *, options: type[Any] | None = None) -> Callable[[Registered], Registered]:
        """Return a decorator that registers a class or a function.

        Args:
            name: by which the settings name it: lower-case letters, digits, `-` and `_`.
            options: dataclass of its options, each made by `setting` and followed by a docstring.

        Raises:
            SettingsError: if the name is taken, or no name; if the thing or its options are of another kind.
        """

        def add(thing: Registered) -> Registered:
            module = str(sys._getframe(1).f_globals.get("__name__", ""))
            entry: Entry[Any] = Entry(thing=thing, options=options, module=module)
            self._check(name, entry)
            self._entries[name] = entry
            return thing

        return add

    def _check(self, name: str, entry: "Entry[Any]") -> None:
        if not NAME.fullmatch(name):
            raise SettingsError(f"{name[:60]!r} is no name of a {self.kind}: take lower-case letters, digits, - and _")
        if not entry.is_built_in:
            self._load()
            if name in self:
                other = "is built in" if name in self._late else f"is registered by {self._entries[name].module}"
                raise SettingsError(f"there are two of the name {name!r} for {self.setting}, one of which {other}")
        if self._base and not entry.is_built_in:
            module, _, kind = self._base.partition(":")
            if not (isinstance(entry.thing, type) and issubclass(entry.thing, base_class(module, kind))):
                raise SettingsError(f"the {self.kind} {name!r} is no class derived from {kind}")
            if getattr(entry.thing, "trains_model", False):
                raise SettingsError(f"the {self.kind} {name!r} trains the model itself, which a plug-in's cannot")
        elif not callable(entry.thing):
            raise SettingsError(f"the {self.kind} {name!r} cannot be called")
        if entry.options is not None and not entry.is_built_in:
            self._check_options(name, entry.options)

    def _check_options(self, name: str, options: type[Any]) -> None:
        """Raise SettingsError if the options of a plug-in can have no table in the section."""
        whose = f"the {self.kind} {name!r}"
        if not name.isidentifier() or keyword.iskeyword(name):
            raise SettingsError(f"{whose} has options, in a table of its name: take letters, digits and _ alone")
        if not dataclasses.is_dataclass(options):
            raise SettingsError(f"{whose} has options {options.__name__}, which are no dataclass")
        for field in dataclasses.fields(options):
            if "may_differ" not in field.metadata:
                raise SettingsError(f"{whose} has the option {field.name}, which is not made by setting(...)")

    def _load(self) -> None:
        importlib.import_module(self._home)

    def __getitem__(self, name: str) -> Thing:
        """Return what has a name.

        Raises:
            SettingsError: if nothing has it.
        """
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            raise SettingsError(self.unknown(name))
        return self._entries[name].thing

    def get(self, name: str, default: Any = None) -> Any:
        """Return what has a name, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 - it would call itself

    def unknown(self, name: object) -> str:
        """Return what to say of a name that nothing has."""
        return f"{self.setting} is {str(name)[:80]!r}: choose one of {', '.join(sorted(self))}, or name its plug-in"

    def knows(self, name: object) -> bool:
        """Return True if something has a name, or if names of plug-ins that are not here are let pass."""
        return name in self or (_lets_pass.get() and NAME.fullmatch(str(name)) is not None)

    def __contains__(self, name: object) -> bool:
        """Return True if something has a name."""
        return name in self._entries or any(name == one for one in self)

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        if not self._late:
            self._load()
        return iter(dict.fromkeys((*self._late, *self._entries)))

    def __len__(self) -> int:
        """Return their number."""
        return sum(1 for _ in self)

    def of_plugins(self) -> dict[str, Entry[Thing]]:
        """Return those that are not built in."""
        return {name: entry for name, entry in self._entries.items() if not entry.is_built_in}

    def forget(self, module: str) -> None:
        """Take out what a module has registered."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.module != module}


_lets_pass: contextvars.ContextVar[bool] = contextvars.ContextVar("lets_pass", default=False)


@contextlib.contextmanager
def let_strangers_pass() -> Iterator[None]:
    """Let names pass that nothing has: the settings of a run are read without loading its plug-ins."""
    token = _lets_pass.set(True)
    try:
        yield
    finally:
        _lets_pass.reset(token)


def extended(settings: type[Any]) -> type[Any]:
    """Return a class of settings whose sections also have the tables of options of the plug-ins."""
    tables = [
        (registry.setting, name, entry.options)
        for registry in REGISTRIES
        for name, entry in registry.of_plugins().items()
        if entry.options is not None
    ]
    return _extended(settings, tuple(tables)) if tables else settings


@functools.cache
def _extended(settings: type[Any], tables: tuple[tuple[str, str, type[Any]], ...]) -> type[Any]:
    sections = []
    for section in dataclasses.fields(settings):
        own = [(setting, name, kind) for setting, name, kind in tables if setting.split(".")[0] == section.name]
        if own:
            kind: Any = section.default_factory
            same = {f"{section.name}.{field.name}": field.metadata["may_differ"] for field in dataclasses.fields(kind)}
            _check_tables(section.name, [name for _, name, _ in own], {setting.split(".")[1] for setting in same})
            more = [(name, options, _table(options, same[setting])) for setting, name, options in own]
            kind = _with_fields(kind, more)
            sections.append((section.name, kind, dataclasses.field(default_factory=kind, metadata=section.metadata)))
    return _with_fields(settings, sections)


def _check_tables(section: str, names: list[str], taken: set[str]) -> None:
    """Raise SettingsError if a plug-in's table has the name of a setting, or of another table."""
    for place, name in enumerate(names):
        if name in taken or name in names[:place]:
            raise SettingsError(f"a plug-in has options of the name {section}.{name}, which is taken: rename it")


def _table(options: type[Any], may_differ: Comparison) -> Any:
    """Return the field of a plug-in's options."""
    return dataclasses.field(default_factory=options, metadata={"may_differ": may_differ})


def _with_fields(kind: type[Any], fields: list[tuple[str, Any, Any]]) -> type[Any]:
    """Return a subclass of a dataclass that has more fields, or other ones."""
    named = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace=named, frozen=True, kw_only=True)


def base_class(module: str, name: str) -> type[Any]:
    """Return a class of this package."""
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)


aggregators: Registry[Any] = Registry(
    "aggregator", "federation.aggregator", "rules.aggregators", base="rules.aggregator_base:Aggregator"
)
attacks: Registry[Any] = Registry("attack", "poison.attack", "rules.attacks", base="rules.attack_base:Attack")
server_optimizers: Registry[Any] = Registry(
    "server optimiser",
    "federation.server_optimizer",
    "rules.server_optimizers",
    base="rules.server_optimizers:ServerOptimizer",
)
methods: Registry[Any] = Registry(
    "method",
    "prompt.method",
    "plm.methods",
    base="plm.method_base:Method",
    late=("soft", "p_tuning", "prefix", "lora", "bitfit", "full"),
)
partitions: Registry[Any] = Registry("partition", "federation.partition", "text.partition")
tasks: Registry[Any] = Registry("task", "task.name", "text.tasks")
metrics: Registry[Any] = Registry("metric", "output.metrics", "rules.metrics")
wire_formats: Registry[Any] = Registry("wire format", "comm.wire", "comm.codec", base="comm.codec:Codec")
REGISTRIES = (aggregators, attacks, server_optimizers, methods, partitions, tasks, metrics, wire_formats)
