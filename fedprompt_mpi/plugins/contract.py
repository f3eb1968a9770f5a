"""What must hold of everything that is registered, whoever has written it: the suite of the command check.

A check returns what it has found, with its numbers, or raises `BrokenError`. The same checks run in the tests of this
package, over what is built in.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fedprompt_mpi.plugins import contract_of_others, contract_of_rules
from fedprompt_mpi.plugins.contract_base import BrokenError
from fedprompt_mpi.plugins.load import place_of


def _gradients(name: str) -> str:
    from fedprompt_mpi.plugins import contract_of_methods  # PyTorch

    return contract_of_methods.gradients(name)


def _one_by_one(name: str) -> str:
    from fedprompt_mpi.plugins import contract_of_methods

    return contract_of_methods.one_by_one(name)


def _by_name(checks: Mapping[str, Callable[[Any], str]], make: Callable[[str], Any]) -> dict[str, Callable[[str], str]]:
    return {what: (lambda name, check=check: check(make(name))) for what, check in checks.items()}


CHECKS: dict[str, dict[str, Callable[[str], str]]] = {
    "aggregator": _by_name(contract_of_rules.RULES, contract_of_rules.rule_of),
    "attack": _by_name(contract_of_rules.ATTACKS, contract_of_rules.attack_of),
    "server optimiser": {"piece by piece": contract_of_others.chunks},
    "wire format": {"round trip": contract_of_others.round_trip},
    "partition": {"every example once": contract_of_others.deals_out},
    "metric": {"any order of texts": contract_of_others.measures},
    "task": {"examples": contract_of_others.examples},
    "method": {"gradients": _gradients, "several in one pass": _one_by_one},
}
"""Kind -> what is checked -> check of one by its name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check has found."""

    what: str
    holds: bool
    found: str


def findings(kind: str, name: str) -> list[Finding]:
    """Check one that is registered; an exception in it is a finding too."""
    made = []
    for what, check in CHECKS[kind].items():
        try:
            found, holds = check(name), True
        except BrokenError as error:
            found, holds = str(error), False
        except Exception as error:  # of the plug-in
            found, holds = f"{type(error).__name__}: {error} ({place_of(error) or 'outside of it'})", False
        made.append(Finding(what=what, holds=holds, found=found))
    return made
