"""The scripts of launch/ whose batch system is not here: a real mpirun, and stand-ins for the system's commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, SMALL, Finished, communicate, find_mpirun, is_open_mpi, read_rounds

LAUNCH = REPOSITORY / "launch"
QSTAT = "echo '    Resource_List.walltime = 00:00:{seconds}'\n"
QSUB = 'echo "$@" >> {told}\n'
FLUX = """
[ "$1" = run ] || exit 9
shift
while [ "$#" -gt 0 ]; do
    case "$1" in --ntasks=*) ranks=${1#*=} ;; --*) ;; *) break ;; esac
    shift
done
exec mpirun -n "$ranks" "$@"
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of commands, first on the path; mpirun there takes more ranks than cores, also of Open MPI, as root."""
    folder = tmp_path / "commands"
    folder.mkdir()
    mpirun = find_mpirun()
    assert mpirun is not None
    options = "--allow-run-as-root --oversubscribe " if is_open_mpi(mpirun) else ""
    add(folder, "mpirun", f'[ "$1" != --version ] || options=\nexec {mpirun} ${{options-{options}}}"$@"\n')
    return folder


def add(folder: Path, name: str, code: str) -> None:
    """Make a command."""
    (folder / name).write_text(f"#!/bin/bash\n{code}")
    (folder / name).chmod(0o755)


def run(script: str, commands: Path, *arguments: str, **variables: str) -> Finished:
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    return communicate(["bash", str(LAUNCH / script), *arguments], environment, deadline_s=120)


def pbs(commands: Path, directory: Path, seconds: int, *flags: str) -> Finished:
    nodes = commands / "nodes"
    nodes.write_text("localhost\n" * 3)
    add(commands, "qstat", QSTAT.format(seconds=seconds))
    add(commands, "qsub", QSUB.format(told=commands / "told"))
    given = " ".join([*SMALL, f"--output.dir={directory}", *flags])
    return run("pbs.sh", commands, PBS_O_WORKDIR=str(REPOSITORY), PBS_NODEFILE=str(nodes), PBS_JOBID="7", FLAGS=given)


def test_pbs(commands: Path, tmp_path: Path) -> None:
    finished = pbs(commands, tmp_path / "run", 59)
    assert finished.status == 0, finished
    assert len(read_rounds(tmp_path / "run")) == 3
    assert not (commands / "told").exists()


def test_pbs_saves_before_the_limit_and_queues_again(commands: Path, tmp_path: Path) -> None:
    long = ("--federation.rounds=1000", "--client.steps=20")
    finished = pbs(commands, tmp_path / "run", 30, *long)
    assert finished.status == 75, finished
    assert "stopped on request after round" in finished.out
    assert "FLAGS=" in (commands / "told").read_text()
    assert "launch/pbs.sh" in (commands / "told").read_text()


def test_flux(commands: Path, tmp_path: Path) -> None:
    add(commands, "flux", FLUX)
    finished = run("flux.sh", commands, *SMALL, f"--output.dir={tmp_path / 'run'}", RANKS="3")
    assert finished.status == 0, finished
    assert len(read_rounds(tmp_path / "run")) == 3


def test_hostfile(commands: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    mpirun = find_mpirun()
    assert mpirun is not None
    hosts.write_text("localhost slots=3\n" if is_open_mpi(mpirun) else "localhost:3\n")
    finished = run("hostfile.sh", commands, str(hosts), "3", *SMALL, f"--output.dir={tmp_path / 'run'}")
    assert finished.status == 0, finished
    assert run("hostfile.sh", commands).status == 2


def test_what_the_image_installs_can_be_installed() -> None:
    """Nothing is built here; but the lines of %post are a shell's, and name what is in the repository."""
    (post,) = (part for part in (LAUNCH / "apptainer.def").read_text().split("\n%") if part.startswith("post"))
    lines = post.partition("\n")[2].replace("/opt/fedprompt_mpi", str(REPOSITORY))
    assert subprocess.run(["bash", "-n"], input=lines, text=True, check=False).returncode == 0
    assert f"-c {LAUNCH}/constraints.txt" in lines
