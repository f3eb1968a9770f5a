"""Compare the settings of two runs. Each setting states beside its field in which comparisons it may differ."""

from collections.abc import Mapping
from typing import Any

from fedprompt_mpi.config import declared
from fedprompt_mpi.rules.setting import Comparison


def compared(settings: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    """Return the settings that must agree in a comparison, by dotted name.

    `federation.rounds` may differ under RESUME and CLEAN_RUN if the learning rate is constant: under another schedule
    the number of rounds changes every round. `poison.kind` may differ under CLEAN_RUN unless it decides what the attack
    success rate is of.

    Args:
        settings: nested, as in a config.toml.
        comparison: the one at hand.
    """
    ignored = {name for name, field in declared() if comparison in field.metadata["may_differ"]}
    if comparison in Comparison.RESUME | Comparison.CLEAN_RUN and settings["client"]["schedule"] == "constant":
        ignored.add("federation.rounds")
    named: dict[str, Any] = {}
    if comparison in Comparison.CLEAN_RUN and settings["poison"].get("kind") in ("composite", "natural"):
        ignored.discard("poison.kind")  # it decides what the attack success rate is of
    for section, content in settings.items():
        if section in ignored:
            continue
        if isinstance(content, dict):
            named |= {f"{section}.{name}": value for name, value in content.items()}
        else:
            named[section] = content
    return {name: value for name, value in named.items() if name not in ignored}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted name -> (theirs, ours) where two sets of settings differ; None for a setting that is not set."""
    return {
        name: (theirs.get(name), ours.get(name))
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    }
