"""Federated prompt tuning over MPI: train soft prompts of a frozen language model, measure, attack.

from fedprompt_mpi import RunConfig, run, load_prompt
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprompt_mpi.commands.predict import load_prompt  # noqa: TC004 - imported by the class below
    from fedprompt_mpi.config import RunConfig, SettingsError  # noqa: TC004
    from fedprompt_mpi.run import run  # noqa: TC004

__all__ = ["RunConfig", "SettingsError", "load_prompt", "run"]


def _late(module: str, name: str) -> property:
    """Return an attribute that is imported on first use, and that the import of a module of its name leaves alone."""
    return property(lambda _: getattr(importlib.import_module(f"{__name__}.{module}"), name), lambda _, value: None)


class _Package(types.ModuleType):
    """This package. A process that only hands its rank over imports none of its members."""

    RunConfig, SettingsError = _late("config", "RunConfig"), _late("config", "SettingsError")
    load_prompt: Any = _late("commands.predict", "load_prompt")
    run: Any = _late("run", "run")


sys.modules[__name__].__class__ = _Package
