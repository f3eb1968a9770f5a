"""A run directory as the report reads it: finished, under way, or interrupted."""

import dataclasses
from pathlib import Path
from typing import Any

from fedprompt_mpi.comm.statistics import TimingRow
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import read_json, read_toml
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import Environment, PartitionRecord, RoundRecord, Summary, read_record, read_rounds
from fedprompt_mpi.rundir.timings import read_timings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The content of one run directory."""

    directory: Path
    settings: dict[str, Any]
    environment: Environment
    partition: PartitionRecord
    rounds: list[RoundRecord]
    """The rounds, from 0."""
    timings: list[TimingRow]
    """Of all ranks, each in order of time; up to the last checkpoint."""
    summary: Summary | None
    """None if the run is not finished."""
    communication: dict[str, Any] | None

    @property
    def clients(self) -> int:
        """Number of clients of the federation."""
        return len(self.partition.clients)

    @property
    def malicious(self) -> list[int]:
        """The malicious clients."""
        return [client.client for client in self.partition.clients if client.malicious]

    @property
    def evaluated(self) -> list[RoundRecord]:
        """The rounds whose vector was evaluated."""
        return [record for record in self.rounds if record.is_evaluated]


def read_run(directory: Path) -> RunData:
    """Read a run directory.

    Raises:
        SettingsError: if it is none.
    """
    paths = RunPaths(directory)
    try:
        return RunData(
            directory=directory,
            settings=read_toml(paths.config),
            environment=read_record(paths.environment, Environment),
            partition=read_record(paths.partition, PartitionRecord),
            rounds=read_rounds(paths) if paths.rounds.exists() else [],
            timings=list(read_timings(paths)) if paths.timings.exists() else [],
            summary=read_record(paths.summary, Summary) if paths.summary.exists() else None,
            communication=read_json(paths.communication) if paths.communication.exists() else None,
        )
    except (OSError, ValueError) as error:
        raise SettingsError(f"{directory} cannot be read as a run ({error!r}): name a run directory") from error
