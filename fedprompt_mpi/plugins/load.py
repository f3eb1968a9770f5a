"""Load the plug-ins that the settings name: files, modules, and packages that announce themselves.

Nothing is loaded that nobody has named. What a plug-in registers is found by name from then on (`rules.registry`); its
hash goes with the run, so that a changed one does not continue it.
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from fedprompt_mpi.config import run_config
from fedprompt_mpi.files import read_text
from fedprompt_mpi.rules.registry import REGISTRIES
from fedprompt_mpi.rules.setting import OwnFileError, SettingsError, check, typed

GROUP = "fedprompt_mpi.plugins"
"""Entry points by which installed packages announce plug-ins."""
MOST_BYTES = 10**7
"""Of a file; there is no need to read more to see that it is none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One that is loaded."""

    name: str
    """File name without its folder, or name of a module."""
    sha256: str
    """Of the file, or of all files of a package that end in .py."""
    registers: list[str]
    """Such as "aggregator my_rule"."""


_loaded: dict[str, types.ModuleType] = {}
"""By what named it."""


def load_plugins(named: Sequence[str]) -> None:
    """Load plug-ins, each once.

    Args:
        named: files that end in .py, entry points of `GROUP`, or modules.

    Raises:
        OwnFileError: if there is no such plug-in, it fails, or it registers nothing; the message names file and line.
    """
    for name in named:
        place = str(Path(name).resolve()) if name.endswith(".py") else name
        if place in _loaded:
            continue
        try:
            module = _import_file(Path(name)) if name.endswith(".py") else _import_module(name)
            _check_options()
        except SettingsError as error:
            _forget(name)
            raise OwnFileError(f"plugin {name}{_line(error, name)}: {error}") from error
        except (Exception, SystemExit) as error:
            _forget(name)
            raise OwnFileError(f"plugin {name}{_line(error, name)}: {type(error).__name__}: {error}") from error
        if not any(_is_of(entry.module, module) for one in REGISTRIES for entry in one.of_plugins().values()):
            raise OwnFileError(f"plugin {name} registers nothing: see the guide of plug-ins")
        _loaded[place] = module


def _check_options() -> None:
    """Check that the options of plug-ins have defaults that their own types and bounds accept, and tables of their own.

    Raises:
        SettingsError: if they do not.
    """
    for registry in REGISTRIES:
        for name, entry in registry.of_plugins().items():
            if entry.options is not None:
                defaults = dataclasses.asdict(entry.options())
                try:
                    check(f"{registry.section}.{name}", typed(entry.options, defaults, f"{registry.section}.{name}"))
                except ValueError as error:
                    raise SettingsError(f"a default of {registry.kind} {name}: {error}") from error
    run_config()


def _module_name(path: Path) -> str:
    return f"fedprompt_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"


def _import_file(path: Path) -> types.ModuleType:
    """Run a file as a module of its name, from the bytes that are hashed."""
    try:
        source = read_text(path, MOST_BYTES).encode()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"it cannot be read ({why}): name a file of Python, or a module") from error
    name = _module_name(path)
    module = types.ModuleType(name)
    module.__file__ = str(path.resolve())
    module.__dict__["__sha256__"] = hashlib.sha256(source).hexdigest()
    sys.modules[name] = module  # dataclasses look it up
    exec(compile(source, str(path.resolve()), "exec"), module.__dict__)
    return module


def _forget(named: str) -> None:
    """Take out what a plug-in has registered that cannot be used."""
    module = _module_name(Path(named)) if named.endswith(".py") else named
    sys.modules.pop(module, None)
    for registry in REGISTRIES:
        registry.forget(module)


def _import_module(name: str) -> types.ModuleType:
    announced = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}
    target = announced.get(name, name).partition(":")[0]
    try:
        found = importlib.util.find_spec(target) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        known = f"; announced are {', '.join(sorted(announced))}" if announced else ""
        raise SettingsError(f"there is no such module{known}: name a file that ends in .py, or a module")
    return importlib.import_module(target)


def _is_of(module: str, plugin: types.ModuleType) -> bool:
    return module == plugin.__name__ or module.startswith(f"{plugin.__name__}.")


def loaded() -> list[Plugin]:
    """Return the plug-ins whose things are registered: those that were named, and modules that were imported."""
    by_module: dict[str, list[str]] = {}
    for registry in REGISTRIES:
        for name, entry in registry.of_plugins().items():
            by_module.setdefault(_top(entry.module), []).append(f"{registry.kind} {name}")
    return [
        Plugin(name=_name(module), sha256=_hash(sys.modules[module]), registers=registers)
        for module, registers in sorted(by_module.items())
        if module in sys.modules
    ]


def hashes() -> dict[str, str]:
    """Return the SHA-256 of the plug-ins by name, and by what they register if two have the same name."""
    plugins = loaded()
    names = [plugin.name for plugin in plugins]
    return {
        name if names.count(name) == 1 else f"{name} ({', '.join(plugin.registers)})": plugin.sha256
        for name, plugin in zip(names, plugins, strict=True)
    }


def _top(module: str) -> str:
    return module.partition(".")[0]


def _name(module: str) -> str:
    file = getattr(sys.modules[module], "__file__", None)
    return Path(file).name if module.startswith("fedprompt_plugin_") and file else module


def _hash(module: types.ModuleType) -> str:
    """Return the SHA-256 of a file as it was run, or of the files of a package and their names."""
    if found := module.__dict__.get("__sha256__"):
        return found
    paths = [Path(folder) for folder in getattr(module, "__path__", [])]
    files = sorted((file, folder) for folder in paths for file in folder.rglob("*.py"))
    if not files and getattr(module, "__file__", None):
        files = [(Path(str(module.__file__)), Path(str(module.__file__)).parent)]
    digest = hashlib.sha256()
    for file, folder in files:
        content = read_text(file, MOST_BYTES).encode()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def place_of(error: BaseException) -> str:
    """Return the innermost line of a plug-in that an exception has passed, such as "rule.py, line 7"; empty if none."""
    modules = {_top(entry.module) for one in REGISTRIES for entry in one.of_plugins().values()} & sys.modules.keys()
    places = tuple(
        str(place)
        for module in map(sys.modules.__getitem__, modules)
        for place in getattr(module, "__path__", [getattr(module, "__file__", None)])
    )
    passed = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(places)]
    return f"{Path(passed[-1].filename).name}, line {passed[-1].lineno}" if places and passed else ""


def _line(error: BaseException, name: str) -> str:
    """Return the line of a plug-in that is being loaded at which an exception was raised, such as ", line 7"."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}" if error.lineno else ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(Path(name).resolve())]
    if own:
        return f", line {own[-1].lineno}"
    last = frames[-1] if not name.endswith(".py") else None
    return "" if last is None or last.filename == __file__ else f" ({Path(last.filename).name}, line {last.lineno})"
