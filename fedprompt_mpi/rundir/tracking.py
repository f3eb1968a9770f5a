"""A run's scalars, settings and page in the libraries of people who track experiments: TensorBoard, MLflow, W&B.

Each by its own client, and without a network first, since compute nodes have none: MLflow goes into a folder beside the
run directory unless MLFLOW_TRACKING_URI names a server, W&B runs offline unless WANDB_MODE says otherwise. What they
complain of costs no run. `sync` does the same afterwards.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedprompt_mpi.files import read_json, write_json
from fedprompt_mpi.rules.setting import typed
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import RATES, RoundRecord

PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "tensorboard": (("tensorboard", "tensorboard"),),
    "mlflow": (("mlflow", "mlflow-skinny"), ("sqlalchemy", "sqlalchemy"), ("alembic", "alembic")),
    "wandb": (("wandb", "wandb"),),
}
"""Tracker -> what it imports, and the package that has it."""
PROJECT = "fedprompt_mpi"
MOST_PARAMETERS, MOST_TEXT = 100, 500
"""Of one call of MLflow, and characters of a value."""


def missing_packages(trackers: Sequence[str]) -> list[str]:
    """Return the packages that are to be installed for some trackers."""
    return [
        package for name in trackers for module, package in PACKAGES[name] if importlib.util.find_spec(module) is None
    ]


def scalars_of(record: RoundRecord) -> dict[str, float]:
    """Return the scalars of a round, by name."""
    values = {name: getattr(record, name) for name in (*RATES, "train_loss", "epsilon", "bytes_up", "bytes_down")}
    values |= {f"seconds/{phase}": seconds for phase, seconds in dataclasses.asdict(record.seconds).items()}
    values |= {f"update_norm/{k}": n for k, n in zip(record.cohort, record.update_norms, strict=True)}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def parameters_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings by dotted name, as texts."""
    found: dict[str, str] = {}
    for section, content in settings.items():
        for name, value in content.items() if isinstance(content, dict) else [("", content)]:
            found[f"{section}.{name}".rstrip(".")] = str(value)[:MOST_TEXT]
    return found


class Tracker(Protocol):
    """Takes the scalars of a run."""

    def add_round(self, record: RoundRecord) -> None:
        """Take those of a round."""

    def add_page(self) -> None:
        """Take the page of the run."""

    def close(self, status: str) -> None:
        """Write what is left, and how the run stands: FINISHED, KILLED or RUNNING."""


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let runs that start together make what they share one after the other."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TensorBoard:
    """Scalars in a folder of the run directory."""

    def __init__(self, paths: RunPaths, settings: Mapping[str, Any], first_round: int) -> None:
        """Open the file of events; scalars of `first_round` and later ones, from before a resume, are discarded."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(paths.tensorboard, purge_step=first_round)

    def add_round(self, record: RoundRecord) -> None:
        """Write the scalars of a round."""
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, record.round)
        self._writer.flush()

    def add_page(self) -> None:
        """Leave it where it is."""

    def close(self, status: str) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """Scalars, settings, tags and page in MLflow."""

    def __init__(self, paths: RunPaths, settings: Mapping[str, Any], first_round: int) -> None:
        """Begin a run, or go on with the one that the run directory knows."""
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # how it makes its tables
        folder = paths.directory.absolute().parent / ".mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
        if uri.startswith("sqlite"):
            folder.mkdir(exist_ok=True)
        self._paths, self._next = paths, 0
        with _one_at_a_time(folder) if uri.startswith("sqlite") else contextlib.nullcontext():
            self._client = MlflowClient(tracking_uri=uri, registry_uri=folder.as_uri())  # which makes its tables
            if known := _known(paths).get("mlflow"):
                self._go_on(known)
            else:
                self._begin(settings, folder.joinpath("files").as_uri() if uri.startswith("sqlite") else None)

    def _go_on(self, known: str) -> None:
        """Go on with a run, behind the last round that it has."""
        self._run = known
        self._client.update_run(known, status="RUNNING")
        history = self._client.get_metric_history(known, "seconds/total")
        self._next = max((metric.step for metric in history), default=-1) + 1

    def _begin(self, settings: Mapping[str, Any], place: str | None) -> None:
        """Begin a run with its settings; `place` is where the files of a new experiment go."""
        from mlflow.entities import Param

        name = settings["task"]["name"]
        tags = {"task": name, "method": settings["prompt"]["method"], "model": settings["model"]["name"][:MOST_TEXT]}
        called = self._paths.directory.absolute().name
        self._run = self._client.create_run(self._experiment(place), run_name=called, tags=tags).info.run_id
        _remember(self._paths, "mlflow", self._run)
        given = [Param(key, value) for key, value in parameters_of(settings).items()]
        for at in range(0, len(given), MOST_PARAMETERS):
            self._client.log_batch(self._run, params=given[at : at + MOST_PARAMETERS])

    def _experiment(self, place: str | None) -> str:
        """Return the id of the experiment that all runs belong to; make it if there is none."""
        experiment = self._client.get_experiment_by_name(PROJECT)
        return experiment.experiment_id if experiment else self._client.create_experiment(PROJECT, place)

    def add_round(self, record: RoundRecord) -> None:
        """Log the scalars of a round, unless it has them from before a resume."""
        from mlflow.entities import Metric

        if record.round < self._next:
            return
        now = int(1000 * time.time())
        scalars = [Metric(name, value, now, record.round) for name, value in scalars_of(record).items()]
        for at in range(0, len(scalars), MOST_PARAMETERS):
            self._client.log_batch(self._run, metrics=scalars[at : at + MOST_PARAMETERS])

    def add_page(self) -> None:
        """Log the page as an artefact."""
        if self._paths.report.exists():
            self._client.log_artifact(self._run, str(self._paths.report.path))

    def close(self, status: str) -> None:
        """Say how the run stands."""
        if status != "RUNNING":
            self._client.set_terminated(self._run, status=status)


class WandB:
    """Scalars, settings and page in Weights & Biases, offline unless WANDB_MODE says otherwise."""

    def __init__(self, paths: RunPaths, settings: Mapping[str, Any], first_round: int) -> None:
        """Begin a run, or go on with the one that the run directory knows."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        folder = paths.directory.absolute().parent / ".wandb"
        folder.mkdir(exist_ok=True)
        known = _known(paths).get("wandb") or secrets.token_hex(4)
        _remember(paths, "wandb", known)
        self._paths = paths
        self._run = wandb.init(
            project=PROJECT,
            name=paths.directory.absolute().name,
            id=known,
            resume="allow",
            dir=folder,
            config=parameters_of(settings),
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
        )

    def add_round(self, record: RoundRecord) -> None:
        """Log the scalars of a round."""
        self._run.log(scalars_of(record), step=record.round)

    def add_page(self) -> None:
        """Log the page as a file."""
        if self._paths.report.exists():
            self._run.save(str(self._paths.report.path), base_path=str(self._paths.directory), policy="now")

    def close(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if status != "KILLED" else 1)


TRACKERS: dict[str, Callable[[RunPaths, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


class Tracking:
    """All trackers of a run. One that fails is named once and left out: the run goes on."""

    def __init__(self, names: Sequence[str], paths: RunPaths, settings: Mapping[str, Any], first_round: int) -> None:
        """Open the trackers.

        Args:
            names: of `TRACKERS`.
            paths: of the run.
            settings: nested, as in config.toml.
            first_round: the first round that will be given.
        """
        self._open: dict[str, Tracker] = {}
        self.failed: list[str] = []
        """Names of those that failed."""
        for name in names:
            with self._told(name):
                self._open[name] = TRACKERS[name](paths, settings, first_round)

    def add_round(self, record: RoundRecord) -> None:
        """Give them the scalars of a round."""
        for name, tracker in list(self._open.items()):
            with self._told(name):
                tracker.add_round(record)

    def add_page(self) -> None:
        """Give them the page."""
        for name, tracker in list(self._open.items()):
            with self._told(name):
                tracker.add_page()

    def close(self, status: str = "FINISHED") -> None:
        """Close those that are open, and tell them how the run stands: FINISHED, KILLED or RUNNING."""
        for name, tracker in list(self._open.items()):
            with self._told(name):
                tracker.close(status)
        self._open.clear()

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Say of a tracker that fails in the block that it is left out."""
        try:
            yield
        except Exception as error:  # whatever a library, a server or a network does
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            print(f"fedprompt_mpi: warning: no more goes to {name} ({reason})", file=sys.stderr, flush=True)
            self._open.pop(name, None)
            self.failed.append(name)


def trackers_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the trackers that settings ask for."""
    asked = settings["output"]["track"]
    return [*asked, *(["tensorboard"] if settings["output"]["tensorboard"] and "tensorboard" not in asked else [])]


def track_page(settings: Mapping[str, Any], paths: RunPaths) -> None:
    """Give the page of a run that has ended to those who keep files."""
    names = [name for name in trackers_of(settings) if name in _known(paths)]
    tracking = Tracking(names, paths, settings, first_round=0)
    tracking.add_page()
    tracking.close()


def _known(paths: RunPaths) -> dict[str, str]:
    """Return tracker -> how it calls the run, as far as it has begun there."""
    if not paths.tracking.exists():
        return {}
    content = read_json(paths.tracking)
    return typed(dict[str, str], content, paths.tracking.path.name)


def _remember(paths: RunPaths, name: str, called: str) -> None:
    write_json(paths.tracking, {**_known(paths), name: called})
