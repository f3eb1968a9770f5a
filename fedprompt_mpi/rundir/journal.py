"""The journal of a run: it writes the files of the run directory and prints the progress. Rank 0 alone has one."""

import dataclasses
import functools
import importlib.metadata
import math
import platform
from collections.abc import Mapping

import numpy as np
import tomli_w

from fedprompt_mpi.comm.progress import Screen
from fedprompt_mpi.comm.statistics import communication, rounds_after, slowest_by_round
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import write_json, write_text
from fedprompt_mpi.rundir.console import Console
from fedprompt_mpi.rundir.filtered import FilterRecord
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.prompt import write_prompt
from fedprompt_mpi.rundir.records import (
    Closing,
    EarlierJob,
    Environment,
    PartitionRecord,
    RoundRecord,
    Seconds,
    Summary,
    append_round,
    federation_of,
    read_record,
    read_rounds,
    summarise,
    write_record,
    write_rounds,
)
from fedprompt_mpi.rundir.screen import Lines
from fedprompt_mpi.rundir.timings import append_timings, keep_timings, read_timings
from fedprompt_mpi.rundir.tracking import Tracking, trackers_of

NUMERIC = ("fedprompt_mpi", "torch", "transformers", "tokenizers", "numpy")
"""The packages whose version may change a bit of the result."""
PACKAGES = (*NUMERIC, "safetensors", "datasets", "pyarrow", "mpi4py")


class Journal:
    """Writes and prints the course of one run."""

    def __init__(self, paths: RunPaths, config: RunConfig, screen: Screen | None, *, done: int) -> None:
        """Begin the files, or keep what they hold of a run that continues.

        Args:
            paths: of the run directory, which exists.
            config: the resolved settings.
            screen: to print on; None for lines alone.
            done: rounds done; the line of round `done` is written again once its vector has been evaluated.
        """
        self.paths, self.config, self._done = paths, config, done
        self.console = Console(screen or Lines(), config)
        # files that only a finished run has, and files that a killed run left half written
        for old in (paths.summary, paths.communication, *paths.unfinished_checkpoints()):
            old.unlink(missing_ok=True)
        if done < (config.federation.filter_round or math.inf):
            paths.filtered.unlink(missing_ok=True)
        write_rounds(paths, self._rounds()[:done] if done else [])
        keep_timings(paths, done if done else None)
        settings = to_dict(config)
        settings["output"]["resume"] = False
        settings["federation"]["rounds"] = max(config.federation.rounds, done)
        write_text(paths.config, tomli_w.dumps(settings))
        self._tracking = Tracking(trackers_of(settings), paths, settings, first_round=done)

    def begin(self, environment: Environment, partition: PartitionRecord, *, is_new_job: bool) -> None:
        """Write the environment, behind those of the jobs before, and the examples of each client.

        Args:
            environment: of this job.
            partition: the examples.
            is_new_job: False if this job continues without ranks that it has lost.
        """
        earlier = self._earlier(is_new_job=is_new_job)
        self.environment = dataclasses.replace(environment, earlier=earlier)
        write_record(self.paths.environment, self.environment)
        write_record(self.paths.partition, partition)
        self.partition = partition

    def _earlier(self, *, is_new_job: bool) -> list[EarlierJob]:
        """Return the environments of the jobs that have done the rounds before."""
        if not self._done or not self.paths.environment.exists():
            return []
        try:
            last = read_record(self.paths.environment, Environment)
        except SettingsError:  # the run does not depend on it
            return []
        job = EarlierJob(
            versions=last.versions,
            mpi=last.mpi,
            compute_dtype=last.compute_dtype,
            dropout=last.dropout,
            plugins=last.plugins,
            ranks=last.ranks,
            until=self._done,
        )
        return [*last.earlier, job] if is_new_job else last.earlier

    def finish_round(self, record: RoundRecord) -> None:
        """Write and print the line of a round."""
        append_round(self.paths, record)
        self._tracking.add_round(record)
        self.console.say_round(record)

    def add_filter(self, record: FilterRecord) -> None:
        """Write and print what the example filter did."""
        write_record(self.paths.filtered, record)
        self.console.say_filter(record)

    def add_timings(self, by_rank: Mapping[int, np.ndarray]) -> None:
        """Append the records of each rank, as numbered at the start of the job."""
        append_timings(self.paths, by_rank)

    def finish(self, vector: np.ndarray, named: dict[str, np.ndarray], closing: Closing) -> Summary:
        """Write the prompt, the statistics, the summary and the page, and print the closing table.

        Args:
            vector: `[P]` float32, the global vector.
            named: the parameters by name, and the effective prompt.
            closing: the figures of the whole run.
        """
        slowest = dict(slowest_by_round(read_timings(self.paths)))
        before = self.environment.resumed_after  # perhaps on other ranks: medians do not mix the two
        statistics = communication([rounds_after(slowest.items(), before)], warmup=self.config.comm.warmup)
        figures = {"mode": self.config.comm.mode, "after": before, **statistics}
        write_json(self.paths.communication, figures)
        summary = summarise([settled(record, slowest.get(record.round)) for record in self._rounds()], closing)
        write_prompt(self.paths, self.config, vector, named, summary.rounds)
        write_record(self.paths.summary, summary)
        self.console.say_summary(summary, self.partition, figures)
        self._tracking.close()
        return summary

    def close(self) -> None:
        """Tell the trackers of a run that has not finished."""
        self._tracking.close("KILLED")

    def _rounds(self) -> list[RoundRecord]:
        return read_rounds(self.paths, federation_of(self.config, self._done))


def settled(record: RoundRecord, slowest: Mapping[str, float] | None) -> RoundRecord:
    """Return a record whose seconds are those of the slowest rank; none of them exceeds `total`.

    Args:
        record: with the seconds of rank 0.
        slowest: figures of `slowest_by_round`; None if the round has no timings.
    """
    if slowest is None:
        return record
    parts = {name: slowest[name] for name in ("train", "wait", "transfer", "aggregate", "evaluate")}
    return dataclasses.replace(
        record, seconds=Seconds(**parts, total=max(record.seconds.total, slowest["total"], *parts.values()))
    )


def numeric_versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    found = versions()
    return {name: found[name] for name in NUMERIC if name in found}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run uses, as far as they are installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES if _version(name)}}


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an optional one, such as mpi4py without MPI
        return ""
