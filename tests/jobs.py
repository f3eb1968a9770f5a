"""Start the program as a user does: under this environment's mpirun, or alone, always with a deadline."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedprompt_mpi.start.front import kept_importer

REPOSITORY = Path(__file__).parent.parent
SMALL = (
    "--task.max_train=120 --task.max_test=24 --federation.rounds=2 --client.steps=3 --federation.clients=10 "
    "--output.report=false"
).split()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a job ended."""

    status: int
    out: str
    err: str

    def __str__(self) -> str:
        """Return all there is to know, for a test that failed."""
        return f"exit status {self.status}\n{self.out}\n{self.err}"


def find_mpirun() -> str | None:
    """Return this environment's mpirun, or the one on the path."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


def is_open_mpi(mpirun: str) -> bool:
    """Tell Open MPI's mpirun, which needs to be told what a test machine is."""
    return "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout


def launch(
    ranks: int,
    *arguments: str,
    deadline_s: float = 120,
    environment: Mapping[str, str | None] | None = None,
    launcher_flags: Sequence[str] = (),
) -> Finished:
    """Run `python ARGUMENTS` on so many ranks (1: without mpirun); kill it all at the deadline and fail.

    All jobs of a test session share one import of the program, as those of a sweep do.

    Args:
        ranks: number of processes.
        arguments: of the Python interpreter.
        deadline_s: seconds.
        environment: variables beside this process's own; None takes one away.
        launcher_flags: for mpirun.
    """
    command = command_of(ranks, *arguments, launcher_flags=launcher_flags)
    return communicate(command, variables_of(environment or {}), deadline_s)


def command_of(ranks: int, *arguments: str, launcher_flags: Sequence[str] = ()) -> list[str]:
    """Return the command that runs `python ARGUMENTS` on so many ranks; 1: without mpirun."""
    command = [sys.executable, *arguments]
    if ranks == 1:
        return command
    mpirun = find_mpirun()
    assert mpirun is not None, "no mpirun: pip install '.[mpich]'"
    options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
    return [mpirun, *options, *launcher_flags, "-n", str(ranks), *command]


def variables_of(environment: Mapping[str, str | None] = MappingProxyType({})) -> dict[str, str]:
    """Return this process's environment as a job of a test has it, with other variables; None takes one away."""
    own = {
        **os.environ,
        **kept_importer(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTEST_CURRENT_TEST": None,
    }
    return {name: value for name, value in {**own, **environment}.items() if value is not None}


def communicate(command: Sequence[str], variables: Mapping[str, str], deadline_s: float) -> Finished:
    """Run a command with an environment; kill it and its children at the deadline, in seconds, and fail."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=variables,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{' '.join(command)} did not end within {deadline_s} s\n{out}\n{err}") from None
    return Finished(status=process.returncode, out=out, err=err)


def run_program(ranks: int, directory: Path, *flags: str, **options: Any) -> Finished:
    """Run a small federation on the embedded task into `directory`; options are those of `launch`."""
    return launch(ranks, "-m", "fedprompt_mpi", *SMALL, f"--output.dir={directory}", *flags, **options)


def run_here(directory: Path, *flags: str) -> dict[str, Any]:
    """Run the same in this process, which spares the start; returns the summary."""
    from fedprompt_mpi import run
    from fedprompt_mpi.commands.settings import parse_settings

    return run(parse_settings([*SMALL, f"--output.dir={directory}", *flags]))


def read_rounds(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's rounds.jsonl."""
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
