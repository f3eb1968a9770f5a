"""The ranks of a node import once: the same bits as alone, and fronts, ranks and importer live and die together."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt_mpi.rundir.prompt import read_prompt
from fedprompt_mpi.start import front, handover
from tests.jobs import SMALL, find_mpirun, is_open_mpi, launch, run_program

ENDS_WITHIN_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run under way on three ranks."""

    mpirun: subprocess.Popen[str]
    directory: Path
    fronts: list[int]
    importer: int
    ranks: list[int]

    def end(self) -> int:
        """Return the launcher's status, once nothing of the job is left."""
        status = self.mpirun.wait(ENDS_WITHIN_S)
        until = time.monotonic() + ENDS_WITHIN_S
        while left := _processes(self.directory):
            assert time.monotonic() < until, f"{left} are left"
            time.sleep(0.1)
        return status


def _processes(directory: Path) -> dict[int, int]:
    """Return the parents of the processes whose command line names a directory."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(directory).encode() in (place / "cmdline").read_bytes():
                found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    mpirun = find_mpirun()
    assert mpirun is not None
    flags = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
    run = tmp_path / "run"
    own = ["-m", "fedprompt_mpi", *SMALL, "--federation.rounds=10000", f"--output.dir={run}"]
    process = subprocess.Popen(
        [mpirun, *flags, "-n", "3", sys.executable, *own],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not (run / "checkpoint").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        parents = {number: parent for number, parent in _processes(run).items() if number != process.pid}
        (importer,) = {
            parent for parent in parents.values() if list(parents.values()).count(parent) == 3 and parent in parents
        }
        ranks = [number for number, parent in parents.items() if parent == importer]
        fronts = [
            number for number in parents if number != importer and number not in ranks and parents[number] not in ranks
        ]
        yield Job(mpirun=process, directory=run, fronts=fronts, importer=importer, ranks=ranks)
    finally:
        process.kill()
        process.wait()


def test_the_same_bits_as_alone(tmp_path: Path) -> None:
    for way in ("together", "plain"):
        finished = run_program(3, tmp_path / way, environment={"FEDPROMPT_START": way, front.KEPT_FOR: None})
        assert finished.status == 0, finished
    prompts = [read_prompt(tmp_path / way)[0]["vector"] for way in ("together", "plain")]
    assert prompts[0].tobytes() == prompts[1].tobytes()


TELL = """
import json, os, resource, sys
import fedprompt_mpi.commands.doctor as doctor
from fedprompt_mpi.__main__ import main
from fedprompt_mpi.start.launcher import Origin

def tell(rest, liveness):
    mask = os.umask(0)
    files = os.listdir("/proc/self/fd")
    told = {
        "environment": {name: value for name, value in os.environ.items() if name in ("OWN", "LANG", "PATH")},
        "folder": os.getcwd(), "umask": mask, "processors": sorted(os.sched_getaffinity(0)),
        "limit": resource.getrlimit(resource.RLIMIT_NOFILE), "forked": Origin.parent is not None,
    }
    open(f"{sys.argv[-1]}-{liveness.rank}", "w").write(json.dumps([told, len(files)]))
    liveness.end()

doctor.main = tell
sys.argv = ["fedprompt_mpi", "doctor", sys.argv[1]]
main()
"""


def test_a_rank_is_where_and_what_its_front_was(tmp_path: Path) -> None:
    """Environment, folder, umask, processors and limits are the launcher's, and it has no other rank's files."""
    told: dict[str, list[tuple[dict[str, object], int]]] = {}
    for way in ("plain", "together"):
        environment = {"OWN": "two words", "FEDPROMPT_START": way, front.KEPT_FOR: None}
        finished = launch(2, "-c", TELL, str(tmp_path / way), environment=environment)
        assert finished.status == 0, finished
        told[way] = [json.loads((tmp_path / f"{way}-{rank}").read_text()) for rank in range(2)]
    for (plain, plain_files), (together, files) in zip(told["plain"], told["together"], strict=True):
        assert not plain.pop("forked")
        assert together.pop("forked")
        assert plain == together
        assert files <= plain_files + 2  # the leash


def _kept_for(name: str) -> set[int]:
    """Return the processes that have a keeper's name in their environment."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{front.KEPT_FOR}={name}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.add(int(place.name))
    return found


def test_one_importer_for_all_jobs_of_its_keeper(tmp_path: Path) -> None:
    """Of one process and of several, parallel commands and others; it ends with its keeper, not with a job."""
    keeper = subprocess.Popen(["sleep", "600"])
    name = front.process_name(keeper.pid)
    environment = {front.KEPT_FOR: name}
    try:
        finished = run_program(1, tmp_path / "one", environment=environment)
        assert finished.status == 0, finished
        (importer,) = _kept_for(name)
        began = time.perf_counter()
        assert launch(1, "-m", "fedprompt_mpi", "cost", environment=environment).status == 0
        assert run_program(3, tmp_path / "three", environment=environment).status == 0
        other = launch(1, "-m", "fedprompt_mpi", "cost", environment={**environment, "HF_HOME": str(tmp_path)})
        assert other.status == 0  # by itself: what libraries read when they are loaded differs
        assert _kept_for(name) == {importer}, time.perf_counter() - began
        changed = (
            "import fedprompt_mpi.commands.cost as c; c.main = print; from fedprompt_mpi.__main__ import main; main()"
        )
        assert "cost" not in launch(1, "-c", changed, "cost", environment=environment).err
        assert "soft" in launch(1, "-m", "fedprompt_mpi", "cost", environment=environment).out
    finally:
        keeper.kill()
        keeper.wait()
    until = time.monotonic() + ENDS_WITHIN_S
    while _kept_for(name):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert launch(1, "-m", "fedprompt_mpi", "--version", environment=environment).status == 0


def test_a_killed_rank_takes_its_front_along(job: Job) -> None:
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.end() != 0


def test_a_killed_front_takes_its_rank_along(job: Job) -> None:
    os.kill(job.fronts[1], signal.SIGKILL)
    assert job.end() != 0


def test_a_killed_importer_ends_the_job(job: Job) -> None:
    os.kill(job.importer, signal.SIGKILL)
    assert job.end() != 0


def test_a_front_passes_signals_on(job: Job) -> None:
    for number in job.fronts:
        os.kill(number, signal.SIGUSR1)
    assert job.end() == 75


def test_a_rank_of_other_surroundings_imports_for_itself(tmp_path: Path) -> None:
    """A job of two programs that bind their threads differently: the second cannot be forked from the first one's."""
    mpirun = find_mpirun()
    assert mpirun is not None
    flags = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
    own = [sys.executable, "-m", "fedprompt_mpi", *SMALL, f"--output.dir={tmp_path / 'run'}"]
    command = [mpirun, *flags, "-n", "1", *own, ":", "-n", "1", "env", "OMP_PLACES=cores", *own]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert finished.returncode == 0, finished
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_importer_of_somebody_else_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of sockets are everybody's: whoever listens there under another user is told nothing."""
    name = "the-name-of-a-job"
    ready, tell = os.pipe()
    other = os.fork()
    if other == 0:
        try:
            address = f"\0fedprompt-importer-{os.getuid()}-{name}"
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(address)
                listener.listen(1)
                os.write(tell, b"x")
                connection, _ = listener.accept()
                os._exit(0 if connection.recv(1) == b"" else 1)
        finally:
            os._exit(2)
    os.read(ready, 1)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, pytest.raises(PermissionError):
            front.connect(connection, name)
    finally:
        _, status = os.waitpid(other, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_who_starts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not front.starts_together([])  # no launcher
    for name, value in (("PMI_RANK", "0"), ("PMI_SIZE", "4"), ("MPI_LOCALNRANKS", "4"), ("MPI_LOCALRANKID", "0")):
        monkeypatch.setenv(name, value)
    assert front.starts_together([])
    assert front.starts_together(["doctor"])
    assert not front.starts_together(["report", "run"])
    assert not front.starts_together(["--help"])
    monkeypatch.setenv("FEDPROMPT_START", "plain")
    assert not front.starts_together([])
    monkeypatch.setenv("FEDPROMPT_START", "")
    monkeypatch.setenv("MPI_LOCALNRANKS", "1")
    assert not front.starts_together([])


@pytest.mark.parametrize("status", [0, 3, 75, -signal.SIGKILL, -signal.SIGTERM])
def test_a_front_ends_as_its_rank(status: int) -> None:
    child = os.fork()
    if child == 0:
        front.end_as(status)
    _, how = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(how) == status


def test_the_kernel_kills_who_hangs_on() -> None:
    """Also a process that is in C code for good."""
    leash, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
        handover.hang_on(leash)
        while True:
            time.sleep(1)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(held)
    _, how = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(how) == -signal.SIGKILL
    os.close(leash)


def test_a_slow_import_is_told_on_rank_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds of nothing look like a job that hangs."""
    monkeypatch.setattr(front, "TELL_AFTER_S", (0.1, 0.2, 100))
    monkeypatch.setattr(sys, "argv", ["fedprompt_mpi"])
    for rank, told in (("0", ["0.1 s", "0.2 s"]), ("1", [])):
        monkeypatch.setenv("PMI_RANK", rank)
        monkeypatch.setenv("PMI_SIZE", "2")
        monkeypatch.setenv("MPI_LOCALRANKID", rank)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            threading.Timer(0.4, theirs.send, [front.FORKED]).start()
            assert front._answer(ours) == front.FORKED
            assert ours.gettimeout() is None
        assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == told


def test_that_nobody_reads_it_costs_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing print must not look like an importer that has gone: it would start the rank a second time."""

    class Unread(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(front, "TELL_AFTER_S", (0.05, 100))
    monkeypatch.setattr(sys, "argv", ["fedprompt_mpi"])
    monkeypatch.setattr(sys, "stdout", Unread())
    for name in ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Timer(0.2, theirs.send, [front.FORKED]).start()
        assert front._answer(ours) == front.FORKED
