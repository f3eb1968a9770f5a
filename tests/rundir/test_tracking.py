"""A run in MLflow, W&B and TensorBoard: every scalar, the settings and the page; during the run, or afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi.commands.sync import sync
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.rundir import tracking
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import read_rounds, read_settings
from fedprompt_mpi.rundir.tracking import Tracking, parameters_of, scalars_of
from tests.jobs import SMALL, launch, run_here, run_program

pytestmark = pytest.mark.filterwarnings("ignore")  # of those libraries


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def _mlflow(directory: Path) -> tuple[Any, Any]:
    """Return a client of the MLflow beside a run, and the run in it."""
    pytest.importorskip("mlflow", reason="needs the extra: mlflow")
    from mlflow.tracking import MlflowClient

    folder = directory.parent / ".mlflow"
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db", registry_uri=folder.as_uri())
    return client, client.get_run(json.loads((directory / "tracking.json").read_text())["mlflow"])


def _check_mlflow(directory: Path) -> None:
    client, run = _mlflow(directory)
    paths = RunPaths(directory)
    rounds = read_rounds(paths)
    wanted = {(name, r.round, value) for r in rounds for name, value in scalars_of(r).items()}
    found = {
        (name, metric.step, metric.value)
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    }
    assert found == wanted
    assert {"accuracy", "macro_f1", "seconds/train", "update_norm/3", "bytes_up"} <= {name for name, _, _ in found}
    assert run.data.params == parameters_of(read_settings(paths))
    assert run.data.tags["task"] == "embedded"
    assert run.info.status == "FINISHED"


def test_every_scalar_comes_back_from_mlflow(tmp_path: Path) -> None:
    """Of a run that was resumed in between; no round is there twice."""
    flags = ['--output.track=["mlflow"]', "--output.report=true"]
    first = run_program(3, tmp_path / "run", *flags, "--federation.rounds=2")
    assert first.status == 0, first
    assert "warning" not in first.err
    run_here(tmp_path / "run", *flags[:1], "--federation.rounds=3", "--output.resume=true")
    client, run = _mlflow(tmp_path / "run")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "accuracy")]
    assert sorted(steps) == [0, 1, 2, 3]
    (page,) = client.list_artifacts(run.info.run_id)
    assert page.path == "report.html"


def test_sync_does_the_same_afterwards(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra: mlflow")
    run_here(tmp_path / "one", "--federation.rounds=1", "--poison.clients=[1]")
    run_here(tmp_path / "two", "--federation.rounds=2")
    finished = launch(1, "-m", "fedprompt_mpi", "sync", str(tmp_path), "--to=mlflow")
    assert finished.status == 0, finished
    assert finished.out.splitlines() == [
        f"{tmp_path / 'one'}: 2 rounds in mlflow",
        f"{tmp_path / 'two'}: 3 rounds in mlflow",
    ]
    for name in ("one", "two"):
        _check_mlflow(tmp_path / name)
    assert sync(tmp_path / "two", "mlflow") == 3  # once more changes nothing
    _check_mlflow(tmp_path / "two")


def test_runs_that_start_together_are_all_there(tmp_path: Path) -> None:
    """The first ones make the tables that all share."""
    pytest.importorskip("mlflow", reason="needs the extra: mlflow")
    flags = [
        *SMALL,
        f"--runs={tmp_path}",
        "--federation.rounds=1",
        '--output.track=["mlflow"]',
        "--seeds=[0, 1]",
        "--jobs=2",
    ]
    finished = launch(1, "-m", "fedprompt_mpi", "sweep", *flags)
    assert finished.status == 0, finished
    for seed in (0, 1):
        _check_mlflow(tmp_path / f"default-seed{seed}")


def test_a_run_that_stops_is_no_finished_one(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra: mlflow")
    run_here(tmp_path / "run", "--federation.rounds=1")
    (tmp_path / "run" / "summary.json").unlink()
    sync(tmp_path / "run", "mlflow")
    assert _mlflow(tmp_path / "run")[1].info.status == "RUNNING"
    tracking = Tracking(["mlflow"], RunPaths(tmp_path / "run"), read_settings(RunPaths(tmp_path / "run")), 1)
    tracking.close("KILLED")
    assert _mlflow(tmp_path / "run")[1].info.status == "KILLED"


def test_scalars_in_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_here(tmp_path / "run", '--output.track=["tensorboard"]')
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for record in read_rounds(RunPaths(tmp_path / "run")):
        for name, value in scalars_of(record).items():
            (found,) = [event.value for event in events.Scalars(name) if event.step == record.round]
            assert found == pytest.approx(value, rel=1e-6)


def test_a_run_in_wandb_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra: wandb")
    finished = run_program(2, tmp_path / "run", '--output.track=["wandb"]', "--output.report=true")
    assert finished.status == 0, finished
    assert "warning" not in finished.err
    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]
    files = list((tmp_path / ".wandb").rglob(f"run-{name}.wandb"))
    written = b"".join(file.read_bytes() for file in files)
    assert b"macro_f1" in written and b"federation.rounds" in written
    assert list((tmp_path / ".wandb").rglob("report.html"))


def test_what_a_tracker_complains_of_costs_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs the extra: mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    summary = run_here(tmp_path / "run", '--output.track=["mlflow"]')
    assert summary["rounds"] == 2
    assert "warning: no more goes to mlflow (" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="could not be handed to mlflow"):
        sync(tmp_path / "run", "mlflow")


def test_a_missing_package_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.PACKAGES, "wandb", (("no_such_module", "wandb"),))
    with pytest.raises(SettingsError, match=r"output.track is wandb, which needs packages .*: pip install wandb"):
        run_here(tmp_path / "run", '--output.track=["wandb"]')
    assert not (tmp_path / "run").exists()
