"""A run directory as the report reads it: finished, under way, or broken off."""

import dataclasses
from pathlib import Path
from typing import Any

from fedprompt_mpi.comm.statistics import Row
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import read_json, read_toml
from fedprompt_mpi.records import ROUNDS, TIMINGS, read_rounds, read_timings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What is in one run directory."""

    directory: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    partition: dict[str, Any]
    rounds: list[dict[str, Any]]
    """A dictionary a round, from 0."""
    timings: list[Row]
    """Of all ranks, each in the order in which things happened; up to the last checkpoint."""
    summary: dict[str, Any] | None
    """None of a run that has not come to its end."""
    communication: dict[str, Any] | None

    @property
    def clients(self) -> int:
        """How many clients the federation has."""
        return len(self.partition["clients"])

    @property
    def malicious(self) -> list[int]:
        """The clients that are malicious."""
        return [client["client"] for client in self.partition["clients"] if client["malicious"]]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The rounds whose vector was evaluated."""
        return [line for line in self.rounds if line.get("accuracy") is not None]


def read_run(directory: Path) -> RunData:
    """Read a run directory.

    Raises:
        SettingsError: if it is none.
    """
    try:
        return RunData(
            directory=directory,
            settings=read_toml(directory / "config.toml"),
            environment=read_json(directory / "environment.json"),
            partition=read_json(directory / "partition.json"),
            rounds=read_rounds(directory) if (directory / ROUNDS).exists() else [],
            timings=list(read_timings(directory)) if (directory / TIMINGS).exists() else [],
            summary=_if_there(directory / "summary.json"),
            communication=_if_there(directory / "communication.json"),
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SettingsError(f"{directory} cannot be read as a run ({error!r}): name a run directory") from error


def _if_there(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.exists() else None
