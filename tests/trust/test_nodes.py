"""Nodes that others use too, the network, and folders that one stands in."""

import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt_mpi.comm import temporary
from fedprompt_mpi.rundir.directory import make_directory
from tests.jobs import SMALL, communicate, find_mpirun, is_open_mpi, launch, run_here

ONE_ROUND = (*SMALL, "--federation.rounds=1")


def test_the_umask_holds(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run_here(tmp_path / "run", "--federation.rounds=1", "--output.report=true")
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_files_are_readable_where_the_umask_says_so(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run_here(tmp_path / "run", "--federation.rounds=1")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o644}, modes


THEIRS = ("torch", "numpy", "mpi4py", "json", "transformers", "tqdm", "tomli_w")


@pytest.mark.parametrize("how", ["script", "-P"])
def test_no_module_of_the_folder_one_stands_in_is_imported(how: str, tmp_path: Path) -> None:
    for name in THEIRS:
        (tmp_path / f"{name}.py").write_text(
            "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n1/0\n"
        )
    script = str(Path(sys.executable).parent / "fedprompt-mpi")
    command = [script] if how == "script" else [sys.executable, "-P", "-m", "fedprompt_mpi"]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    finished = subprocess.run(
        [*command, *ONE_ROUND, "--output.dir=run"], cwd=tmp_path, env=variables, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished
    assert not list(tmp_path.glob("*.ran"))


def test_names_that_the_program_chooses_are_unique(tmp_path: Path) -> None:
    made = [make_directory(tmp_path / "runs" / "x", is_new=True).name for _ in range(3)]
    assert made == ["x", "x-2", "x-3"]
    assert make_directory(tmp_path / "runs" / "x", is_new=False) == tmp_path / "runs" / "x"


def test_what_killed_runs_left_behind_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this user's abandoned folders only: not a living run's, not a young one, not what is only named like it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, handle = temporary.make_folder()
    dead, young = tmp_path / f"{temporary.PREFIX}dead", tmp_path / f"{temporary.PREFIX}young"
    for folder in (dead, young):
        folder.mkdir()
        (folder / "table").write_text("x")
    (tmp_path / "mine").mkdir()
    link = tmp_path / f"{temporary.PREFIX}link"
    link.symlink_to(tmp_path / "mine")
    other = tmp_path / "fedprompt-somebody"
    other.mkdir()
    for path in (living, dead, other, tmp_path / "mine"):
        os.utime(path, (0, 0))
    temporary.remove_left_behind()
    assert not dead.exists()
    assert all(path.exists() for path in (living, young, other, link, tmp_path / "mine"))
    temporary.remove_folder(living, handle)
    assert not living.exists()


def test_a_killed_run_s_folder_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.run(
        [sys.executable, "-c", "from fedprompt_mpi.comm.temporary import *; make_folder(); os.kill(os.getpid(), 9)"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    run_here(tmp_path / "run", "--federation.rounds=1")
    assert not left.exists()


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """Yield the port of a server that answers nothing, and what it has heard."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(1)
                    heard.append(connection.recv(1000))

        thread = threading.Thread(target=listen)
        thread.start()
        yield server.getsockname()[1], heard
        over.set()
        thread.join()


def test_local_files_make_nobody_call_a_server(tmp_path: Path, tiny, listener: tuple[int, list[bytes]]) -> None:
    """A hub that must hear nothing; it does hear of a model that is asked for by its id."""
    port, heard = listener
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = "".join(f"a {'good' if k % 2 else 'bad'} film of {k},{k % 2}\n" for k in range(60))
        (data / f"{split}.csv").write_text(f"text,label\n{rows}")
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": None, "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HOME": str(tmp_path / "hf"), "HTTP_PROXY": f"http://127.0.0.1:{port}", "NO_PROXY": None,
        "HTTPS_PROXY": f"http://127.0.0.1:{port}", "TRANSFORMERS_OFFLINE": None, "HF_DATASETS_OFFLINE": None,
    }  # fmt: skip
    flags = ["--task.name=sst2", f"--task.data={data}", '--task.label_words=["terrible","great"]']
    flags += [f"--model.name={tiny('bert')}", f"--output.dir={tmp_path / 'run'}"]
    finished = launch(1, "-m", "fedprompt_mpi", *ONE_ROUND, *flags, environment=hub)
    assert finished.status == 0, finished
    assert heard == []
    wanted = launch(1, "-m", "fedprompt_mpi", "cost", "--model=some/model", environment=hub)
    assert wanted.status == 2, wanted
    assert any(b"some/model" in request for request in heard)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a network of its own")
def test_the_main_job_needs_no_network(tmp_path: Path) -> None:
    mpirun = find_mpirun()
    assert mpirun is not None
    options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
    job = [mpirun, *options, "-n", "3", sys.executable, "-m", "fedprompt_mpi", *ONE_ROUND]
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *job, f"--output.dir={tmp_path}"]
    finished = communicate(command, {**os.environ, "OMP_NUM_THREADS": "1"}, 120)
    assert finished.status == 0, finished


def test_a_lock_cannot_be_taken_by_reading_it(tmp_path: Path) -> None:
    """Flock needs no right to write: so nobody else may open the file at all."""
    from fedprompt_mpi.rundir.lock import DirectoryLock

    lock = DirectoryLock()
    lock.take(tmp_path)
    try:
        assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o600
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        lock.release()


def test_a_lock_of_an_older_version_is_closed_to_others(tmp_path: Path) -> None:
    from fedprompt_mpi.rundir.lock import DirectoryLock

    (tmp_path / ".lock").touch(0o666)
    lock = DirectoryLock()
    lock.take(tmp_path)
    assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o600
    lock.release()
