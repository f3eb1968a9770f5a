"""MPI does not start on all ranks: the job ends within the deadline, and the missing ranks are named."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedprompt_mpi.liveness import start_guard
from tests.jobs import find_mpirun, is_open_mpi, launch

DEADLINE_S = 4
EARLY = """
import os, sys, time
from fedprompt_mpi.start.launcher import read_launch
if read_launch().rank == 1:
    os._exit(0)
from fedprompt_mpi.cli import main
main(sys.argv[1:])
"""
IN_INIT = """
import os, signal, sys
from mpi4py import rc
rc.initialize = False
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.cli import main
if read_launch().rank == 1:
    from mpi4py import MPI
    MPI.Init_thread = lambda: os._exit(0)
main(sys.argv[1:])
"""


def _flags(directory: Path) -> list[str]:
    return [f"--comm.start_deadline_s={DEADLINE_S}", f"--output.dir={directory}"]


def _ends_by_itself() -> bool:
    """Open MPI's mpirun ends the job when a rank leaves before MPI_Init with status 0, and prints its own message."""
    mpirun = find_mpirun()
    return mpirun is not None and is_open_mpi(mpirun)


def test_one_guard_of_a_host_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that claims the report: also if another one sees the deadline while or after that one reports."""
    monkeypatch.setattr(start_guard, "LAST_WORDS_S", 0.1)
    first, second, third = (start_guard._Names(rank, 3) for rank in range(3))
    for names in (first, second, third):
        names.bind()
    assert first.claim_report()
    first.tell_others()
    assert not second.claim_report()  # the report is claimed
    first.claim.close()
    assert not third.claim_report()  # it is free again, but the job is over
    for names in (first, second, third):
        names.socket.close()
        names.claim.close()


def test_a_rank_that_leaves_before_it_comes_to_mpi_is_named(tmp_path: Path) -> None:
    start = time.monotonic()
    finished = launch(3, "-c", EARLY, *_flags(tmp_path / "run"), deadline_s=60)
    assert finished.status not in (0, 2, 75), finished
    assert time.monotonic() - start < DEADLINE_S + 20
    if not _ends_by_itself():
        assert finished.err.count("fedprompt_mpi:") == 1, finished
        assert f"MPI has not started on all ranks within {DEADLINE_S} s (comm.start_deadline_s)" in finished.err
        assert "of 3 ranks, ranks 0, 2 are waiting in MPI_Init on" in finished.err
        assert "rank 1 is not there" in finished.err
    assert not (tmp_path / "run").exists()


def test_a_rank_that_leaves_inside_of_mpi_init_is_named_at_once(tmp_path: Path) -> None:
    flags = ["--comm.start_deadline_s=600", f"--output.dir={tmp_path / 'run'}"]
    finished = launch(3, "-c", IN_INIT, *flags, deadline_s=60)
    assert finished.status not in (0, 2, 75), finished
    assert "rank 1 of 3 on" in finished.err
    assert "ended before MPI had started" in finished.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_job_that_waits_for_a_rank(number: signal.Signals, tmp_path: Path) -> None:
    mpirun = find_mpirun()
    assert mpirun is not None
    if _ends_by_itself():
        pytest.skip("this MPI's launcher ends the job by itself")
    job = subprocess.Popen(
        [mpirun, "-n", "3", sys.executable, "-c", EARLY, f"--output.dir={tmp_path / 'run'}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(2)
        assert job.poll() is None  # the ranks wait
        job.send_signal(number)
        assert job.wait(timeout=15) != 0
    finally:
        job.kill()
        job.wait()
