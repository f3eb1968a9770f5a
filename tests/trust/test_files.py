"""Real attacks by files: refused by one message, or read without harm; no code runs, and what is the user's stays."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedprompt_mpi import run
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import SettingsError
from tests.jobs import SMALL, launch
from tests.trust.attacks import HARMLESS, KEPT, MODULE, REFUSED, WAS_HERE

MOST_S, MOST_BYTES = 20.0, 2**30
"""What one refusal may take."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose modules can be imported, for what would import them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return tmp_path


def _unchanged(place: Path) -> bool:
    """Return True if no code has run and no link was followed."""
    profile, kept = place / "home" / ".profile", place / KEPT
    is_kept = all(
        not file.parent.exists() or file.read_text() == "mine" for file in (profile,) if profile.parent.exists()
    )
    return is_kept and (not kept.exists() or kept.read_text() == "mine") and not (place / WAS_HERE).exists()


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_one_message(case: str, place: Path) -> None:
    attack, before, memory = REFUSED[case], time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flags = [*SMALL, f"--output.dir={place / 'run'}", *attack.make(place)]
    memory = max(memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    with pytest.raises(SettingsError) as caught:
        run(parse_settings(flags))
    message = str(caught.value)
    assert attack.says in message
    assert "\n" not in message and len(message) < 1500
    assert time.monotonic() - before < MOST_S
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) < MOST_BYTES
    assert _unchanged(place)
    assert not (place / "run").exists()


@pytest.mark.parametrize("case", HARMLESS)
def test_it_is_read_without_harm(case: str, place: Path) -> None:
    flags = [*SMALL, f"--output.dir={place / 'run'}", "--federation.rounds=1", *HARMLESS[case].make(place)]
    summary = run(parse_settings(flags))
    assert summary["rounds"] == 1
    assert _unchanged(place)


@pytest.mark.parametrize(
    "case", ["a class path in a recipe", "checkpoints in the home folder", "a tokenizer that panics"]
)
def test_under_mpirun_too(case: str, tmp_path: Path) -> None:
    """One rank finds it, or all of them: one message all the same."""
    flags = REFUSED[case].make(tmp_path)
    here = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    finished = launch(3, "-m", "fedprompt_mpi", *SMALL, f"--output.dir={tmp_path / 'run'}", *flags, environment=here)
    assert finished.status == 2, finished
    assert finished.err.count("fedprompt_mpi: error:") == 1
    assert REFUSED[case].says in finished.err
    assert _unchanged(tmp_path)


def test_variables_are_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("FEDPROMPT_MPI_RUN_FEDERATION__ROUNDS", "FEDPROMPT_MPI_FEDERATION__ROUNDS", "FEDERATION__ROUNDS"):
        monkeypatch.setenv(name, "7")
    assert parse_settings(["--seed=1"]).federation.rounds == 20


def test_a_foreign_file_is_refused_only_where_a_run_continues(tmp_path: Path, runs_once: Callable[[], Path]) -> None:
    directory = runs_once()
    (directory / "notes.txt").write_text("mine")
    again = [*SMALL, "--federation.rounds=1", f"--output.dir={directory}", "--output.resume=true"]
    with pytest.raises(SettingsError, match=r"notes\.txt is no file of a run"):
        run(parse_settings(again))
    from fedprompt_mpi.report.page import write_report

    assert write_report(directory).exists()
    (directory / "notes.txt").rename(tmp_path / "notes.txt")
    assert run(parse_settings(again))["rounds"] == 1


def test_only_own_files_are_removed(runs_once: Callable[[], Path]) -> None:
    """What a killed run left half written goes; a file that is only named like it stays, and is named."""
    directory = runs_once()
    half = directory / "checkpoint" / ".round-00000009.safetensors.0123abcd"
    half.write_text("half")
    again = [*SMALL, "--federation.rounds=1", f"--output.dir={directory}", "--output.resume=true"]
    run(parse_settings(again))
    assert not half.exists()
    (directory / "checkpoint" / ".profile").write_text("mine")
    with pytest.raises(SettingsError, match=r"\.profile is no file of a run"):
        run(parse_settings(again))
    assert (directory / "checkpoint" / ".profile").read_text() == "mine"


@pytest.fixture
def runs_once(tmp_path: Path) -> Callable[[], Path]:
    """Return a function that makes the directory of a run of one round."""

    def make() -> Path:
        directory = tmp_path / "run"
        run(parse_settings([*SMALL, "--federation.rounds=1", f"--output.dir={directory}"]))
        return directory

    return make


def test_a_link_that_comes_later_is_not_followed(runs_once: Callable[[], Path], tmp_path: Path) -> None:
    """Every file is opened below the directory's handle: a check at the start alone would be too early."""
    from fedprompt_mpi.files import CannotWriteError, append_text, read_text
    from fedprompt_mpi.rundir.paths import RunPaths

    paths = RunPaths(runs_once())
    (tmp_path / KEPT).write_text("mine")
    paths.rounds.unlink()
    paths.rounds.path.symlink_to(tmp_path / KEPT)
    with pytest.raises(OSError, match="symbolic"):
        read_text(paths.rounds)
    with pytest.raises(CannotWriteError, match="symbolic"):
        append_text(paths.rounds, "theirs")
    assert (tmp_path / KEPT).read_text() == "mine"
