"""Import transformers' models without compilers, distributed tensors and solvers: these are loaded when they are used.

The modules that every model builds on import names from `torch._dynamo`, `torch.distributed.tensor`, scipy and others,
and with them 1,300 modules of which a prompt uses none. In `late_imports` such a module is replaced by a stand-in. A
name taken from it is looked up in the real module once somebody calls it, asks for an attribute or derives from it;
before that nothing can be an instance of it. So nothing is missing, it only comes later.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LATE = (
    "accelerate",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
)
"""Modules that come late, with all below them."""
SHAPES = ("torch._meta_registrations", "torch.distributed._meta_registrations")
"""These come late too, but only in a process of the command line (`own_the_process`): they give torch's operations on
the meta device shapes that C++ does not know, no code asks for them by name, and `with_shapes` loads them."""
_AFTER_SHAPES = "torch._decomp"
"""Can only be imported by them: torch itself always comes to it that way."""


@contextlib.contextmanager
def late_imports() -> Iterator[None]:
    """Let the modules of `LATE` that are imported in the block come when they are used."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _COMING.update(LATE, SHAPES if _owned else ())
    try:
        yield
    finally:
        for root in (*LATE, *SHAPES):
            if root not in _ASKED:
                _withdraw(root)
        _COMING.clear()


def own_the_process() -> None:
    """Note that no other code than this program's runs in this process."""
    global _owned
    _owned = True


_owned = False


def with_shapes(build: Callable[[], Any]) -> Any:
    """Return what `build` makes; if it needs one of `SHAPES`, it is called again with them."""
    try:
        return build()
    except NotImplementedError:
        if all(map(_is_loaded, SHAPES)):
            raise
        _load_shapes()
        return build()


def _load_shapes() -> None:
    for module in SHAPES:
        _withdraw(module)
        importlib.import_module(module)


def on_meta(build: Callable[[], Any]) -> Any:
    """Return what `build` makes on the meta device: modules without memory."""
    import torch

    def built() -> Any:
        with torch.device("meta"):
            return build()

    return with_shapes(built)


_COMPILER = "torch._dynamo"
_ASKED = (_COMPILER, "torch.distributed.tensor")
"""Stay stand-ins after the block: optimizers ask the compiler in every step to stay out, and transformers asks of each
weight whether it is a distributed tensor."""
_MARKS = ("allow_in_graph", "assume_constant_result", "disable", "graph_break")
"""What code tells the compiler, by decorators and calls; where nothing is compiled, it does nothing."""


class _Late:
    """An object that is made when it is used: a name of a module, or what a call of such a name returns."""

    def __init__(self, module: str, name: str, make: Callable[[], Any] | None = None) -> None:
        self._module, self._name, self._make = module, name, make

    def _real(self) -> Any:
        if _owned and self._module.startswith("torch.") and SHAPES[0] not in sys.modules:
            _load_shapes()  # which the compiler can only be imported after
        _withdraw(_root_of(self._module))
        if self._make is None:
            module = importlib.import_module(self._module)
            below = not hasattr(module, self._name)
            real = importlib.import_module(f"{self._module}.{self._name}") if below else getattr(module, self._name)
        else:
            real = self._make()
        self._make = lambda: real
        return real

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._module == _COMPILER and self._name in _MARKS and not _is_loaded(_COMPILER):
            marked = next(iter(arguments), None)
            return (lambda function: function) if marked is None else marked
        if _root_of(self._module) in _COMING:
            return _Late(self._module, "", lambda: self._real()(*arguments, **named))
        return self._real()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __getitem__(self, item: Any) -> Any:
        return self._real()[item]

    def __mro_entries__(self, bases: Any) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return _is_loaded(self._module) and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: Any) -> bool:
        return _is_loaded(self._module) and issubclass(subclass, self._real())

    def __or__(self, other: Any) -> Any:  # in an annotation
        return Any

    __ror__ = __or__


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Late(self.__name__, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes stand-ins of the modules of `LATE` that are not there yet."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _AFTER_SHAPES and _owned and not _is_loaded(SHAPES[0]):
            _load_shapes()
            return _Present.spec(fullname)
        root = _root_of(fullname)
        if _is_loaded(root) or not (root in _COMING or isinstance(sys.modules.get(root), _StandIn)):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        _MADE.add(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run nothing."""


class _Present(importlib.abc.Loader):
    """Loads a module that has come meanwhile."""

    @classmethod
    def spec(cls, name: str) -> importlib.machinery.ModuleSpec:
        """Return what finds it; its own, which the import system would take instead, would load it a second time."""
        module = sys.modules[name]
        found = importlib.machinery.ModuleSpec(name, cls(), origin=module.__file__, is_package=True)
        found.submodule_search_locations = list(module.__path__)
        module.__spec__ = None
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Run nothing."""


_COMING: set[str] = set()
"""Modules of `LATE` that are to come late, in a block of `late_imports`."""


_MADE: set[str] = set()
"""Names of the modules that are stand-ins now."""


def _root_of(module: str) -> str:
    """Return the member of `LATE` or `SHAPES` that a module belongs to; empty if to none."""
    return next((late for late in (*LATE, *SHAPES) if module == late or module.startswith(f"{late}.")), "")


def _is_loaded(module: str) -> bool:
    return module in sys.modules and not isinstance(sys.modules[module], _StandIn)


def _withdraw(root: str) -> None:
    """Let a module of `LATE` be imported as it is from now on."""
    _COMING.discard(root)
    for name in [made for made in _MADE if _root_of(made) == root]:
        _MADE.discard(name)
        module = sys.modules.get(name)
        if isinstance(module, _StandIn):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(child) is module:
                delattr(sys.modules[parent], child)
