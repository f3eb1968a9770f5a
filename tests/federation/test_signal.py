"""The backdoor's signal in the aggregated step."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi.config import OutputConfig, PoisonConfig, PromptConfig, RunConfig, SettingsError
from fedprompt_mpi.federation.signal import backdoor_snr
from tests.jobs import read_rounds, run_here


def test_by_hand() -> None:
    """A step of (2, 1, 2) along the first axis: 4 to 5."""
    direction = np.array([1.0, 0, 0])
    assert backdoor_snr(direction, np.array([2.0, 1, 2])) == pytest.approx(10 * math.log10(4 / 5))
    assert backdoor_snr(direction, np.array([-2.0, 1, 2])) is None
    assert backdoor_snr(direction, np.zeros(3)) is None


def test_poison_that_all_clients_share_has_a_larger_signal(tmp_path: Path) -> None:
    """Than none has; a run without the measurement is the same otherwise."""
    flags = ["--output.backdoor_snr=true", "--client.steps=5", "--federation.rounds=3", "--client.batch_size=16"]
    means = []
    for name, poison in (("clean", ["--poison.trigger=cf"]), ("all", ["--poison.clients=all", "--poison.rate=1"])):
        run_here(tmp_path / name, *flags, *poison)
        found = [line["backdoor_snr"] for line in read_rounds(tmp_path / name)]
        assert found[0] is None
        means.append(np.mean([-60.0 if ratio is None else ratio for ratio in found[1:]]))
    assert means[1] > means[0] + 3
    run_here(tmp_path / "without", *flags[1:], "--poison.trigger=cf")
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("clean", "without"))
    assert (ours["accuracy"], ours["attack_success_rate"]) == (theirs["accuracy"], theirs["attack_success_rate"])


def test_what_it_needs() -> None:
    with pytest.raises(SettingsError, match="it needs a trigger"):
        RunConfig(output=OutputConfig(backdoor_snr=True))
    with pytest.raises(SettingsError, match="another method than full"):
        RunConfig(
            output=OutputConfig(backdoor_snr=True),
            prompt=PromptConfig(method="full"),
            poison=PoisonConfig(trigger="cf"),
        )
