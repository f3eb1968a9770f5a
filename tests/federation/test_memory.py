"""Rank 0 holds no whole updates, however many and long they are; workers hold those of one round."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.federation import rank_training
from fedprompt_mpi.federation.client_training import PassResult
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.federation import Federation
from fedprompt_mpi.federation.updates import LocalUpdates
from tests.jobs import SMALL, run_here

BENCH = Path(__file__).parent.parent / "bench" / "aggregate.py"


def test_ten_updates_of_25_million_parameters_fit_into_2_gb() -> None:
    """The updates alone are 1 GB; of all rules FoolsGold needs most, since it remembers as much."""
    command = [sys.executable, str(BENCH), "--parameters=25000000", "--clients=10", "--rule=foolsgold"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    *_, peak, unit = finished.stdout.split()
    assert unit == "GB"
    assert 1.0 < float(peak) < 2.0


def test_a_round_s_updates_are_gone_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With full fine-tuning they are as large as the PLM, for each client of the rank."""
    kept: list[weakref.ref[np.ndarray]] = []
    train, train_pass = Federation.train, rank_training.train

    def watched(self: Federation, cohort: Cohort, round_: int) -> LocalUpdates:
        assert all(of_round() is None for of_round in kept)
        updates = train(self, cohort, round_)
        kept.append(weakref.ref(updates.deltas))
        return updates

    of_passes: list[weakref.ref[np.ndarray]] = []

    def watched_pass(*arguments: Any) -> PassResult:
        assert all(of_pass() is None for of_pass in of_passes)
        made = train_pass(*arguments)
        of_passes.append(weakref.ref(made.deltas))
        return made

    monkeypatch.setattr(Federation, "train", watched)
    monkeypatch.setattr(rank_training, "train", watched_pass)
    run_here(tmp_path / "run", *SMALL, "--federation.rounds=2", "--client.batched=1")
    assert (len(kept), len(of_passes)) == (2, 20)
