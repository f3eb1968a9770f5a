"""Nobody hangs: exceptions, ranks that are stuck or stopped, and requests to stop. Every job has a deadline."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedprompt_mpi import load_prompt
from tests.failures.conftest import check_report
from tests.jobs import REPOSITORY, SMALL, Finished, find_mpirun, is_open_mpi, launch, read_rounds, run_here, run_program

FLAGS = ("--client.batched=1", "--federation.rounds=3", "--output.checkpoint_every=2")


def _doomed(fates: str, directory: Path, *flags: str, launcher_flags: Sequence[str] = ()) -> Finished:
    return launch(
        3, "-m", "tests.failures.doomed", fates, *SMALL, *FLAGS, f"--output.dir={directory}", *flags,
        deadline_s=80, launcher_flags=launcher_flags,
    )  # fmt: skip


def test_an_exception_on_all_workers_is_one_report(tmp_path: Path) -> None:
    finished = _doomed("1:train:2:raise,2:train:2:raise", tmp_path / "run")
    check_report(finished)
    assert "rank 1 of 3 on" in finished.err or "rank 2 of 3 on" in finished.err  # whichever was first
    assert "failed in phase train of round 2" in finished.err


@pytest.mark.parametrize(
    "fate", ["0:prepare:0", "2:broadcast:2", "2:gather:2", "0:aggregate:2", "1:evaluate:2", "2:checkpoint:2"]
)
def test_an_exception_in_any_phase_names_it(fate: str, tmp_path: Path) -> None:
    rank, phase, round_ = fate.split(":")
    finished = _doomed(f"{fate}:raise", tmp_path / "run")
    check_report(finished)
    assert f"rank {rank} of 3 on {socket.gethostname()} failed in phase {phase} of round {round_}" in finished.err


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    """Without ULFM, whichever the launcher."""
    finished = _doomed("2:train:2:kill", tmp_path / "run")
    assert finished.status not in (0, 2, 3, 75)
    assert finished.err.count("fedprompt_mpi:") == 1, finished
    assert "rank 2 on" in finished.err
    assert "rank 2 in train of round 2" in finished.err


def test_a_full_disk_ends_the_job_and_the_last_checkpoint_is_good(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, for a disk of its own")
    flags = ("--federation.rounds=60", "--client.steps=1", "--output.evaluate_every=60")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", disk], check=True)
    try:
        finished = run_program(3, disk / "run", *FLAGS, *flags)
        assert finished.status == 3, finished
        assert "rank 0 of 3 on" in finished.err
        assert re.search(r"cannot write \S+ \(.*No space left on device.*\) in phase \w+ of round \d+", finished.err)
        assert "--output.resume true continues" in finished.err
        assert "Traceback" not in finished.err
        assert finished.err.count("fedprompt_mpi:") == 1
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        run_here(disk / "run", *FLAGS, *flags, "--output.resume=true")
        run_here(tmp_path / "whole", *FLAGS, *flags)
        assert [line["round"] for line in read_rounds(disk / "run")] == list(range(61))
        ours, theirs = load_prompt(disk / "run").vector, load_prompt(tmp_path / "whole").vector
        assert ours.tobytes() == theirs.tobytes()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("rank", "phase"), [(2, "train"), (0, "aggregate")])
def test_a_rank_that_is_stuck_says_where(rank: int, phase: str, tmp_path: Path) -> None:
    finished = _doomed(f"{rank}:{phase}:2:sleep", tmp_path / "run", "--comm.deadline_s=15")
    assert finished.status == 3
    assert f"rank {rank} of 3 on" in finished.err
    assert f"has made no progress for 15 s (comm.deadline_s) in phase {phase} of round 2" in finished.err
    assert "time.sleep(1000)" in finished.err
    assert finished.err.count("fedprompt_mpi:") == 1


def test_a_rank_that_is_stopped_is_missed_by_the_others(tmp_path: Path) -> None:
    """It cannot speak for itself: the others call the roll."""
    finished = _doomed("2:train:2:stop", tmp_path / "run", "--comm.deadline_s=15")
    assert finished.status == 3
    assert "no sign of life from rank 2 for more than 15 s" in finished.err
    assert finished.err.count("fedprompt_mpi:") == 1


@pytest.mark.parametrize("fate", ["2:train:2:term", "2:evaluate:1:term", "0:evaluate:1:term"])
def test_a_rank_that_is_told_to_stop_gives_the_round_up(fate: str, tmp_path: Path) -> None:
    """Round 2 is given up, which nothing had saved yet: round 1 is saved now, and the resumed run has the same bits."""
    run_here(tmp_path / "whole", *FLAGS)
    stopped = _doomed(fate, tmp_path / "run")
    assert stopped.status == 75, stopped
    assert "stopped on request after round 1" in stopped.out
    assert [line["round"] for line in read_rounds(tmp_path / "run")] in ([0], [0, 1])  # written once it is evaluated
    resumed = run_program(2, tmp_path / "run", *FLAGS, "--output.resume=true")
    assert resumed.status == 0, resumed
    assert [line["round"] for line in read_rounds(tmp_path / "run")] == [0, 1, 2, 3]
    ours, theirs = load_prompt(tmp_path / "run").vector, load_prompt(tmp_path / "whole").vector
    assert ours.tobytes() == theirs.tobytes()


def test_a_rank_that_may_not_give_the_round_up_finishes_it(tmp_path: Path) -> None:
    """With a short wire format part of the round is in the other ranks' error feedback: all stop after it."""
    flags = ("--comm.wire=int8", "--output.evaluate_every=3")
    stopped = _doomed("2:train:2:term", tmp_path / "run", *flags)
    assert stopped.status == 75, stopped
    assert "stopped on request after round 2" in stopped.out
    resumed = run_program(2, tmp_path / "run", *FLAGS, *flags, "--output.resume=true")
    assert resumed.status == 0, resumed
    run_here(tmp_path / "whole", *FLAGS, *flags)
    ours, theirs = load_prompt(tmp_path / "run").vector, load_prompt(tmp_path / "whole").vector
    assert ours.tobytes() == theirs.tobytes()


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    mpirun = find_mpirun()
    assert mpirun is not None
    options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
    command = [mpirun, *options, "-n", "3", sys.executable, "-m", "fedprompt_mpi", *SMALL, "--federation.rounds=100000"]
    watchers = set(_processes_with("last_seen.py"))
    process = subprocess.Popen(
        [*command, f"--output.dir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(lambda: (tmp_path / "run" / "checkpoint").exists(), 60)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=20) == (1 if is_open_mpi(mpirun) else 75)
        _wait_for(lambda: not _processes_with(str(tmp_path)), 10)
        _wait_for(lambda: not set(_processes_with("last_seen.py")) - watchers, 10)
    finally:
        for pid in _processes_with(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    resumed = run_program(2, tmp_path / "run", "--federation.rounds=1", "--output.resume=true")
    assert resumed.status == 0, resumed


def _wait_for(holds: object, seconds: float) -> None:
    assert callable(holds)
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def _processes_with(word: str) -> list[int]:
    """Return the processes whose command line has a word."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue  # gone meanwhile
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_job_that_was_stopped_as_a_whole_goes_on(ranks: int, tmp_path: Path) -> None:
    """All of its processes sleep for longer than its deadline."""
    deadline_s = 6.0 if ranks == 1 else 15.0  # which the start on few cores must not exceed
    command = [sys.executable, "-m", "fedprompt_mpi", *SMALL, *FLAGS, "--federation.rounds=40"]
    command += [f"--output.dir={tmp_path / 'run'}", f"--comm.deadline_s={deadline_s}"]
    if ranks > 1:
        mpirun = find_mpirun()
        assert mpirun is not None
        options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
        command = [mpirun, *options, "-n", str(ranks), *command]
    job = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "rounds.jsonl").exists() or len(read_rounds(tmp_path / "run")) < 3:
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.05)
        listed = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=True).stdout
        processes = [int(number) for number in listed.split()]
        assert len(processes) >= ranks
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process, number)
            if number == signal.SIGSTOP:
                time.sleep(deadline_s + 3)
        out, _ = job.communicate(timeout=100)
        assert job.returncode == 0, out
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
