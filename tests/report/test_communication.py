"""The report of communication: from one run, and pooled over launches."""

import json
from pathlib import Path

import pytest

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.report.communication import format_communication, read_communication
from tests.jobs import launch, run_here


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two launches of one job, measured."""
    root = tmp_path_factory.mktemp("launches")
    for name in ("first", "second"):
        run_here(root / name, "--comm.mode=measure", "--federation.rounds=3")
    return [root / "first", root / "second"]


def test_one_run(runs: list[Path]) -> None:
    figures = read_communication(runs[:1], warmup=None)
    assert (figures["rounds"], figures["warmup_rounds"]) == (2, 1)
    written = json.loads((runs[0] / "communication.json").read_text())
    assert figures["seconds"]["train"]["median"] == pytest.approx(written["seconds"]["train"]["median"], abs=1e-8)
    table = format_communication(figures)
    assert "train" in table
    assert "wait + transfer" not in table
    down = next(line for line in table.splitlines() if line.startswith("down")).split()
    assert down[1:] == ["102,400", "10", "0", "0"]


def test_launches_are_pooled(runs: list[Path]) -> None:
    figures = read_communication(runs, warmup=0)
    assert (figures["launches"], figures["rounds"]) == (2, 6)
    table = format_communication(figures)
    assert "2 launches, 6 rounds after 0 of warm-up" in table
    assert "An interval needs 6 launches or more, there are 2." in table
    assert figures["seconds"]["train"]["low"] is None


def test_unmeasured_waiting_and_transfer_stay_together(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "--federation.rounds=2")
    table = format_communication(read_communication([tmp_path / "run"], warmup=0))
    assert "told apart by --comm.mode measure" in table
    assert not any(line.startswith(("wait ", "transfer", "overhead")) for line in table.splitlines())
    run_here(tmp_path / "other", "--federation.rounds=1", "--comm.mode=measure")
    with pytest.raises(SettingsError, match=r"differs from .* in comm\.mode, federation\.rounds: pool"):
        read_communication([tmp_path / "run", tmp_path / "other"], warmup=0)


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    out = f"--dir={tmp_path / 'out'}"
    finished = launch(1, "-m", "fedprompt_mpi", "report", *map(str, runs), "--warmup=0", out)
    assert finished.status == 0, finished
    assert "\n2 launches" in finished.out
    wrong = launch(1, "-m", "fedprompt_mpi", "report", str(tmp_path))
    assert wrong.status == 2
    assert "is no run directory, and none is in it: name runs" in wrong.err
