"""Which settings may differ between two runs that count as the same, for each of those who ask.

A list names what is left out of the comparison: settings by section, or None for a whole section.
"""

from collections.abc import Mapping
from typing import Any

LeftOut = Mapping[str, set[str] | None]

RESULT: LeftOut = {
    "output": None,
    "comm": {"mode", "gpu_aware", "warmup", "deadline_s"},
    "model": {"device"},
    "poison": {"clean_run"},
}
"""A run that goes on has the same bits: see `with_rounds`."""
RUN: LeftOut = {"output": None, "comm": None}
"""A run of a sweep has been done."""
JOB: LeftOut = {"seed": None, "output": None}
"""Launches of one job are pooled."""
EXPERIMENT: LeftOut = {
    "seed": None,
    "output": None,
    "task": {"data"},
    "model": {"device"},
    "poison": {"clean_run"},
    "comm": {"warmup", "deadline_s"},
}
"""Runs are averaged over seeds, wherever they ran."""
ATTACK_AND_DEFENCE: LeftOut = {
    "seed": None,
    "output": None,
    "comm": None,
    "privacy": None,
    "task": {"data"},
    "model": {"dtype", "device"},
    "poison": {
        "clients", "rate", "distributed", "mode", "attack", "boost", "norm_bound", "neurotoxin_share", "gaussian_std",
        "clean_run",
    },
    "federation": {
        "aggregator", "assumed_malicious", "clip_norm", "outlier_threshold", "flame_noise", "server_examples",
        "noise_std", "server_optimizer", "server_lr", "server_momentum", "server_beta2", "server_tau",
    },
}  # fmt: skip
"""A clean run stands beside a poisoned one."""


def with_rounds(left_out: LeftOut, settings: Mapping[str, Any]) -> LeftOut:
    """Leave out the number of rounds too, unless the schedule makes it part of every round.

    Args:
        left_out: one of the lists.
        settings: nested, as in a config.toml.
    """
    if settings["client"]["schedule"] != "constant":
        return left_out
    return {**left_out, "federation": {"rounds", *(left_out.get("federation") or ())}}


def dotted(settings: Mapping[str, Any], left_out: LeftOut) -> dict[str, Any]:
    """Return nested settings by their dotted names, but for those that are left out."""
    named = {}
    for section, content in settings.items():
        out = left_out.get(section, set())
        if out is None:
            continue
        if isinstance(content, dict):
            named |= {f"{section}.{name}": value for name, value in content.items() if name not in out}
        else:
            named[section] = content
    return named


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted name -> (theirs, ours), by name, where two are not the same; None for one that is not set."""
    return {
        name: (theirs.get(name), ours.get(name))
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    }
