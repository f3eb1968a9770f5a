"""The contract: everything that is built in keeps it, and what does not is told with numbers."""

from collections.abc import Callable

import pytest

from fedprompt_mpi.commands.check_plugins import check_plugins
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.plugins.contract import CHECKS, findings
from fedprompt_mpi.plugins.load import load_plugins
from fedprompt_mpi.rules.registry import REGISTRIES
from tests.plugins.conftest import EXAMPLES

OTHERS = [(one.kind, name) for one in REGISTRIES if one.kind not in ("aggregator", "attack") for name in one]
"""Rules and attacks have tests of their own."""
BROKEN = {
    "the first client": (
        "def weights(self, updates):\n        return np.eye(len(updates.clients))[0]",
        {"any order of clients": "largest difference"},
    ),
    "one piece alone": (
        "coordinate_wise = True\n    def combine(self, chunk, deltas, weights):\n"
        "        return deltas.mean(axis=0, dtype=np.float64) - deltas.mean()",
        {"piece by piece": "pieces of 37"},
    ),
    "a false promise": ("withstands = True", {"far updates": "states withstands = True"}),
    "no mean": (
        "mean_at = {}\n    def weights(self, updates):\n        return np.full(len(updates.clients), 0.1)",
        {"its limit": "the mean", "equal updates": "the common update"},
    ),
    "copies of all": (
        "observes_first = True\n    kept = []\n    def observe(self, chunk, deltas, vector):\n"
        "        self.kept.append(deltas.astype(np.float64))",
        {"memory": "allowed 0.5"},
    ),
    "a state that is not told": (
        "rounds = 0\n    def begin(self, updates):\n        self.rounds += 1\n"
        "    def weights(self, updates):\n        return super().weights(updates) / self.rounds",
        {"a checkpoint": "largest difference"},
    ),
    "an exception": (
        "def weights(self, updates):\n        return updates.nothing",
        {"zeros": "AttributeError", "least number of clients": "broken.py, line 6"},
    ),
}
"""What is wrong with a rule: its body, and the checks that tell it."""


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_what_is_built_in_keeps_it(kind: str, name: str) -> None:
    found = findings(kind, name)
    assert [f.what for f in found] == list(CHECKS[kind])
    assert all(f.holds for f in found), found


@pytest.mark.parametrize("what", BROKEN)
def test_a_rule_that_breaks_it_is_told_with_numbers(what: str, write: Callable[..., str]) -> None:
    body, expected = BROKEN[what]
    source = "import numpy as np\nfrom fedprompt_mpi.plugins import Aggregator, aggregators\n"
    source += f'@aggregators.register("broken")\nclass Broken(Aggregator):\n    {body}\n'
    load_plugins([write("broken.py", source)])
    failed = {finding.what: finding.found for finding in findings("aggregator", "broken") if not finding.holds}
    for check, words in expected.items():
        ((_, found),) = [item for item in failed.items() if check in item[0]]
        assert words in found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_guides_examples_keep_it(name: str, write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    check_plugins([write(name)], "mpirun -n 4" if name == "same_value.py" else "")
    assert "FAILS" not in capsys.readouterr().out


def test_the_command_says_what_fails(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    source = "from fedprompt_mpi.plugins import metrics\n"
    source += '@metrics.register("first")\ndef first(found, options):\n    return found.answers[0] + found.labels[1]\n'
    with pytest.raises(SettingsError, match=r"1 of the checks of .*first\.py failed"):
        check_plugins([write("first.py", source)], "")
    assert "FAILS  any order of texts" in capsys.readouterr().out
