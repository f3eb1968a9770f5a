"""timings.csv: the records of all ranks, a line per phase."""

import csv
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fedprompt_mpi.comm.statistics import TimingRow
from fedprompt_mpi.comm.timing import PHASES, is_done
from fedprompt_mpi.files import append_text, bounded_lines, write_text
from fedprompt_mpi.rundir.paths import RunPaths

HEAD = "round,rank,phase,seconds,bytes\n"
MOST_TIMINGS_BYTES = 2**34
"""Largest file of timings: 1,000 rounds of 4,096 ranks take 10 GB."""


def read_timings(paths: RunPaths) -> Iterator[TimingRow]:
    """Yield the records; a last line that was not written to its end is left out.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is larger than `MOST_TIMINGS_BYTES`, or a line is no record.
    """
    lines = (line for line in bounded_lines(paths.timings, MOST_TIMINGS_BYTES) if line.endswith("\n"))
    for row in csv.DictReader(lines):
        try:
            yield int(row["round"]), int(row["rank"]), row["phase"], float(row["seconds"]), int(row["bytes"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"a line of it is {row}") from error


def append_timings(paths: RunPaths, by_rank: Mapping[int, np.ndarray]) -> None:
    """Append the records `[n]` of each rank, as numbered at the start of the job."""
    rows = (
        (round_, rank, PHASES[phase], seconds, payload)
        for rank, records in by_rank.items()
        for round_, phase, seconds, payload in records.tolist()
    )
    append_text(paths.timings, _as_csv(rows))


def keep_timings(paths: RunPaths, done: int | None) -> None:
    """Keep the records up to round `done`, after which a run continues; None begins an empty file."""
    rows = [] if done is None else [row for row in read_timings(paths) if is_done(row[0], row[2], done)]
    write_text(paths.timings, HEAD + _as_csv(rows))


def _as_csv(rows: Iterable[TimingRow]) -> str:
    return "".join(f"{round_},{rank},{phase},{seconds:.9f},{size}\n" for round_, rank, phase, seconds, size in rows)
