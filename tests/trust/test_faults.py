"""Faults of the machine and of its users that cost no run, or end it in one message."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedprompt_mpi.cli import exhausted
from fedprompt_mpi.comm.placement import MOST_THREADS_PER_PROCESSOR, thread_count
from fedprompt_mpi.comm.start import SHARED_BYTES_PER_RANK, shared_memory_warning
from fedprompt_mpi.comm.temporary import explained
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.federation.federation import Federation
from fedprompt_mpi.files import CannotWriteError, ChangedFileError
from fedprompt_mpi.liveness import clock
from fedprompt_mpi.liveness.clock import RunningClock
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.output import Output
from tests.jobs import SMALL, launch, read_rounds, run_here

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a file system of its own")
JOB = (sys.executable, "-m", "fedprompt_mpi", *SMALL)


def _start(directory: Path, *flags: str, out: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*JOB, f"--output.dir={directory}", *flags], stdout=out, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _until_round(directory: Path, round_: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (directory / "rounds.jsonl").exists() and len(read_rounds(directory)) > round_:
            return
        time.sleep(0.05)
    raise AssertionError(f"round {round_} did not end within 60 s")


def test_the_clock_stands_still_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    running = RunningClock()
    for step, ran in ((1.0, 1.0), (5.0, 6.0), (3600.0, 6.0), (1.0, 7.0)):
        now[0] += step
        assert running() == ran


def test_a_rank_that_is_stuck_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Liveness()
    from fedprompt_mpi.liveness.watchdog import StalledError

    with pytest.raises(StalledError, match=r"no progress for 0\.5 s"), live.watched(0.5):  # noqa: PT012
        for _ in range(100):
            time.sleep(0.1)


def test_output_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    """All at once: a reader that goes away, descriptors that are closed, a full device."""
    jobs = {}
    for number, case in enumerate(("| head -1", ">&-", ">/dev/full", "2>&- >&- <&-")):
        words = (*JOB, f"--output.dir={tmp_path / str(number)}", "--federation.rounds=1")
        command = f"{' '.join(map(shlex.quote, words))} {case}; exit ${{PIPESTATUS[0]}}"
        jobs[case] = tmp_path / str(number), subprocess.Popen(
            ["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    for case, (directory, job) in jobs.items():
        _, err = job.communicate(timeout=100)
        assert job.returncode == 0, f"{case}: {err}"
        assert "Traceback" not in err
        assert (directory / "summary.json").exists()


def test_a_terminal_that_knows_few_characters(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        Output(stream, steers=False).write("größer \u202e\x1b[2J\n")
    assert (tmp_path / "out").read_text() == "gr\\xf6\\xdfer \\u202e\\x1b[2J\n"


def test_a_closed_terminal_asks_to_stop(tmp_path: Path) -> None:
    """Under nohup, which ignores the signal, the run goes on."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ignoring = _start(tmp_path / "ignoring", "--federation.rounds=12")
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        job = _start(tmp_path / "run", "--federation.rounds=400")
    finally:
        signal.signal(signal.SIGHUP, handler)
    for directory, process, status in ((tmp_path / "ignoring", ignoring, 0), (tmp_path / "run", job, 75)):
        _until_round(directory, 1)
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, out + err
        assert list((directory / "checkpoint").glob("round-*"))


@NEEDS_ROOT
def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        finished = launch(
            1, "-m", "fedprompt_mpi", *SMALL, f"--output.dir={tmp_path / 'run'}", environment={"TMPDIR": str(small)}
        )
    finally:
        subprocess.run(["umount", small], check=True)
    assert finished.status == 3, finished
    assert str(small) in finished.err and "TMPDIR" in finished.err
    assert "Traceback" not in finished.err and finished.err.count("fedprompt_mpi:") == 1


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (28, "Make room"),
        (13, "Allow this user"),
        (30, "Allow this user"),
        (116, "Bring the folder"),
        (40, "Remove what"),
    ],
)
def test_the_remedy_fits_the_error(number: int, remedy: str) -> None:
    assert CannotWriteError("a file", OSError(number, os.strerror(number))).remedy.startswith(remedy)


def test_only_a_lack_of_room_is_put_down_to_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError) as caught, explained(tmp_path):
        raise OSError(28, "No space left on device")
    assert "TMPDIR" in caught.value.remedy and str(tmp_path) in str(caught.value)
    with pytest.raises(FileNotFoundError), explained(tmp_path):
        raise FileNotFoundError(2, "No such file")


@NEEDS_ROOT
@pytest.mark.parametrize(("options", "says"), [("ro", "read-only"), ("size=1m", "bytes free"), ("size=1g", "")])
def test_shared_memory_is_looked_at_before_mpi_needs_it(
    options: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPI_LOCALNRANKS", "3")
    monkeypatch.setenv("MPI_LOCALRANKID", "0")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=True)
    try:
        warning = shared_memory_warning("MPICH", str(tmp_path))
        assert (says in warning) if says else warning == ""
        assert shared_memory_warning("Open MPI", str(tmp_path)) == ""
        monkeypatch.setenv("MPI_LOCALRANKID", "1")
        assert shared_memory_warning("MPICH", str(tmp_path)) == "", "one rank of a host says it"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert SHARED_BYTES_PER_RANK > 5_000_000


@pytest.mark.parametrize("change", ["written to", "replaced", "removed"])
def test_weights_that_change_end_the_run_by_name(
    change: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    weights = folder / "model.safetensors"
    draw = Federation.draw_cohort

    def changed(self: Federation, round_: int) -> object:
        if round_ == 2:
            if change == "written to":
                with weights.open("r+b") as file:
                    file.seek(-4096, 2)
                    file.write(b"\xff" * 4096)
            elif change == "replaced":
                shutil.copy(weights, folder / "other")
                (folder / "other").replace(weights)
            else:
                weights.unlink()
        return draw(self, round_)

    monkeypatch.setattr(Federation, "draw_cohort", changed)
    with pytest.raises(ChangedFileError, match=r"model\.safetensors was (changed|moved or removed)"):
        run_here(tmp_path / "run", f"--model.name={folder}", '--task.label_words=["terrible","great"]')
    assert len(read_rounds(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("OMP_NUM_THREADS", "999999", "give at most"), ("PYTHONOPTIMIZE", "2", "take 1 or none")],
)
def test_a_variable_that_would_break_the_run_is_refused(variable: str, value: str, says: str, tmp_path: Path) -> None:
    flags = (*SMALL, f"--output.dir={tmp_path / 'run'}")
    finished = launch(1, "-m", "fedprompt_mpi", *flags, environment={variable: value})
    assert finished.status == 2, finished
    assert variable in finished.err and says in finished.err
    assert not (tmp_path / "run").exists()


def test_threads_up_to_a_few_for_each_processor_are_taken() -> None:
    most = MOST_THREADS_PER_PROCESSOR * (os.cpu_count() or 1)
    assert thread_count(None, str(most), one_client_a_pass=True) == most  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="OMP_NUM_THREADS is"):
        thread_count(None, str(most + 1), one_client_a_pass=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("limit", "says"), [("-n 12", "ulimit -n"), ("-v 400000", "ulimit -v")])
def test_limits_of_the_shell_are_named(limit: str, says: str, tmp_path: Path) -> None:
    command = " ".join(f"'{part}'" for part in (*JOB, f"--output.dir={tmp_path / 'run'}"))
    finished = subprocess.run(
        ["bash", "-c", f"ulimit {limit}; {command}"], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 3, finished
    assert says in finished.stderr and "Traceback" not in finished.stderr


def test_what_an_exhausted_system_raises_is_known() -> None:
    assert "ulimit -u" in exhausted(RuntimeError("can't start new thread"))
    assert "ulimit -v" in exhausted(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"))
    assert "TMPDIR" in exhausted(OSError(28, "No space left on device"))
    assert exhausted(ValueError("anything else")) == ""
