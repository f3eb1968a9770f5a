"""Which model types work with which methods, and the refusal of the others before anything is loaded.

`supported.json` has the outcome of `examine.py` for the model types of one version of transformers. A type that is not
in it, or any under another version, is tried out when it is used.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import read_json, write_json
from fedprompt_mpi.plm.quantised import NOT_TRAINED, is_quantised
from fedprompt_mpi.rules import registry

TABLE = Path(__file__).parent / "supported.json"


def check_supported(config: Any, method: str, name: str) -> None:
    """Check that a method works with a model.

    Args:
        config: the transformers config.
        method: of `prompt.method`.
        name: the model's, for the message.

    Raises:
        SettingsError: naming the method, the model type, the reason, and the methods that work.
    """
    outcome = support_of(config)
    if outcome[method]:
        raise SettingsError(refusal(outcome, method, config.model_type, name))


def refusal(outcome: Mapping[str, str], method: str, model_type: str, name: str) -> str:
    """Return why a method does not work with a model, and what to do."""
    others = [other for other in registry.methods if not outcome[other]]
    remedy = f"take prompt.method {' or '.join(others)}" if others else "use another model"
    named = f"model.name {name!r}, of type {model_type}"
    return f"prompt.method {method} does not work with {named}: {outcome[method]}; {remedy}"


def support_of(config: Any, *, anew: bool = False) -> dict[str, str]:
    """Return for each method why it does not work with a model, empty if it does; `anew`: whatever the table says."""
    outcome = _tried(config, anew=anew)
    if is_quantised(config):
        outcome["full"] = outcome["full"] or NOT_TRAINED
    return outcome


def _tried(config: Any, *, anew: bool) -> dict[str, str]:
    known: Mapping[str, Mapping[str, str]] = _table()["types"]
    if not anew and _minor(_table()["transformers"]) == _minor(_version()) and config.model_type in known:
        return {name: known[config.model_type].get(name, "") for name in registry.methods}
    from fedprompt_mpi.plm.examine import examine

    return examine(config)


@functools.cache
def _table() -> dict[str, Any]:
    return read_json(TABLE)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _version() -> str:
    import transformers

    return transformers.__version__


def write_table(outcome: Mapping[str, Mapping[str, str]]) -> None:
    """Keep an outcome of `examine.examine_all` for the installed transformers."""
    types = {name: {method: reason for method, reason in found.items() if reason} for name, found in outcome.items()}
    write_json(TABLE, {"transformers": _version(), "types": types})


def format_table(outcome: Mapping[str, Mapping[str, str]]) -> str:
    """Return an outcome of `examine.examine_all` in Markdown: a row for the types that have the same methods."""
    groups: dict[str, list[str]] = {}
    for name, found in outcome.items():
        able = ", ".join(method for method in registry.methods if not found[method])
        groups.setdefault(able or "none", []).append(name)
    rows = [f"| {methods} | {len(names)} | {', '.join(names)} |" for methods, names in sorted(groups.items())]
    return "\n".join(["| methods | types | |", "| --- | --- | --- |", *rows])
