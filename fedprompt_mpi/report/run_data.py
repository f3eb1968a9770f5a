"""A run directory as the report reads it: finished, under way, or interrupted."""

import dataclasses
from pathlib import Path
from typing import Any

from fedprompt_mpi.audit.record import AuditRecord
from fedprompt_mpi.comm.codec import make_codec
from fedprompt_mpi.comm.statistics import TimingRow
from fedprompt_mpi.config import from_record
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rundir.directory import check_content
from fedprompt_mpi.rundir.filtered import FilterRecord
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import (
    Communication,
    Environment,
    PartitionRecord,
    RoundRecord,
    Summary,
    read_partition,
    read_record,
    read_rounds,
    read_settings,
    reading,
)
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
    communication: Communication | None
    filtered: FilterRecord | None
    """What the example filter did, if it has."""
    audit: AuditRecord | None
    """What attacks found, if it was audited."""

    @property
    def clients(self) -> int:
        """Number of clients of the federation."""
        return len(self.partition.clients)

    @property
    def malicious(self) -> list[int]:
        """The malicious clients."""
        return [client.client for client in self.partition.clients if client.malicious]

    def bytes_of(self, numbers: int) -> str:
        """Return in words how many bytes a vector of so many numbers takes, in the format in which vectors travel."""
        wire = self.settings["comm"]["wire"]
        if wire not in registry.wire_formats:
            return "an unknown number of"
        return f"{make_codec(from_record(self.settings).comm).bytes_of(numbers):,}"

    @property
    def evaluated(self) -> list[RoundRecord]:
        """The rounds whose vector was evaluated."""
        return [record for record in self.rounds if record.is_evaluated]


def read_run(directory: Path) -> RunData:
    """Read a run directory.

    Raises:
        SettingsError: if it is none, or its files do not fit together; the message names the file and the field.
    """
    paths = RunPaths(directory)
    check_content(paths, own_only=False)
    run = RunData(
        directory=directory.absolute(),
        settings=read_settings(paths),
        environment=read_record(paths.environment, Environment),
        partition=read_partition(paths),
        rounds=read_rounds(paths) if paths.rounds.exists() else [],
        timings=list(read_timings(paths)) if paths.timings.exists() else [],
        summary=read_record(paths.summary, Summary) if paths.summary.exists() else None,
        communication=read_record(paths.communication, Communication) if paths.communication.exists() else None,
        filtered=read_record(paths.filtered, FilterRecord) if paths.filtered.exists() else None,
        audit=read_record(paths.audit, AuditRecord) if paths.audit.exists() else None,
    )
    with reading(paths.timings):
        _check_timings(run)
    return run


def _check_timings(run: RunData) -> None:
    """Raise ValueError if a rank or a round of the timings is none of the run's."""
    jobs, rounds = (*run.environment.earlier, run.environment), run.settings["federation"]["rounds"] + 1
    ranks = max(len(job.ranks) for job in jobs)
    for round_, rank, *_ in run.timings:
        if rank >= ranks or round_ > max(rounds, len(run.rounds)):
            raise ValueError(f"it has rank {rank} in round {round_} of a run of {ranks} ranks and {rounds - 1} rounds")
