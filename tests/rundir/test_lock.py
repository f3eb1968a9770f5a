"""One job at a time in a run directory."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.federation import prepare
from fedprompt_mpi.rundir import lock
from fedprompt_mpi.rundir.lock import DirectoryInUseError, DirectoryLock
from tests.jobs import REPOSITORY, SMALL, launch, run_here

FLAGS = [*SMALL, "--task.max_train=40", "--task.max_test=8", "--federation.rounds=100000"]


def test_a_lock_is_taken_once_and_let_go_of(tmp_path: Path) -> None:
    first, second = DirectoryLock(), DirectoryLock()
    first.take(tmp_path)
    with pytest.raises(DirectoryInUseError, match=f"^process {os.getpid()} on {socket.gethostname()}$"):
        second.take(tmp_path)
    first.release()
    assert not list(tmp_path.iterdir())  # it does not stay
    second.take(tmp_path)
    second.release()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job opens the file of the first, which ends; a third takes the lock; the second must not have one."""
    first, second, third = DirectoryLock(), DirectoryLock(), DirectoryLock()
    first.take(tmp_path)
    really = lock._lock

    def lock_later(handle: int) -> bool:
        monkeypatch.setattr(lock, "_lock", really)
        first.release()
        third.take(tmp_path)
        return really(handle)

    monkeypatch.setattr(lock, "_lock", lock_later)
    with pytest.raises(DirectoryInUseError):
        second.take(tmp_path)
    third.release()
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_in_another_job_is_let_be(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "fedprompt_mpi", *FLAGS, f"--output.dir={directory}"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=alone)
    try:
        until = time.monotonic() + 60
        while not list(directory.glob("checkpoint/round-*")):
            assert other.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        refused = launch(2, *command[1:], "--output.resume=true")
        assert refused.status == 2
        assert refused.err.count("fedprompt_mpi: error: ") == 1
        assert f"which another job is using (process {other.pid} on " in refused.err
        assert refused.err.count(str(directory)) == 1
        assert other.poll() is None
        other.send_signal(signal.SIGKILL)  # whatever way it ends, the next one may continue
    finally:
        other.kill()
        other.wait()
    rounds = len((directory / "rounds.jsonl").read_text().splitlines())
    assert run_here(directory, *FLAGS[len(SMALL) :], f"--federation.rounds={rounds + 1}", "--output.resume=true")


def test_what_another_job_has_done_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that begin in one new directory: the second finds it taken, or used, once it comes to it."""
    claim = prepare._claim

    def claim_second(*given: Any) -> None:
        monkeypatch.setattr(prepare, "_claim", claim)
        run_here(tmp_path / "run", "--federation.rounds=1")
        claim(*given)

    for flags in ([], ["--output.resume=true"]):
        monkeypatch.setattr(prepare, "_claim", claim_second)
        with pytest.raises(SettingsError, match="which another job has used meanwhile"):
            run_here(tmp_path / "run", "--federation.rounds=1", *flags)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1
        shutil.rmtree(tmp_path / "run")
