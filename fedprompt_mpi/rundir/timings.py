"""timings.csv: the records of all ranks, a line per phase."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fedprompt_mpi.comm.statistics import TimingRow
from fedprompt_mpi.comm.timing import PHASES, is_done
from fedprompt_mpi.files import append_text, bounded_lines, write_lines
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import reading

HEAD = "round,rank,phase,seconds,bytes\n"
MOST_SECONDS = 1e9
"""A phase of thirty years."""
MOST_TIMINGS_BYTES = 2**34
"""Largest file of timings: 1,000 rounds of 4,096 ranks take 10 GB."""


def read_timings(paths: RunPaths) -> Iterator[TimingRow]:
    """Yield the records; a last line that was not written to its end is left out.

    Raises:
        SettingsError: if there is no such file, it is larger than `MOST_TIMINGS_BYTES`, or a line is no record; it
            names the file and the line.
    """
    with reading(paths.timings):
        lines = bounded_lines(paths.timings, MOST_TIMINGS_BYTES)
        if (head := next(lines, HEAD)) != HEAD:
            raise ValueError(f"line 1 is {head[:60]!r}: expecting {HEAD.strip()!r}")
        for number, line in enumerate(lines, 2):
            if line.endswith("\n"):
                yield _parse(line, number)


def _parse(line: str, number: int) -> TimingRow:
    try:
        round_, rank, phase, seconds, size = line.split(",")
        row = int(round_), int(rank), phase, float(seconds), int(size)
    except ValueError:
        row = -1, -1, "", math.nan, -1
    if min(row[0], row[1], row[4]) < 0 or row[2] not in PHASES or not 0 <= row[3] < MOST_SECONDS:
        raise ValueError(f"line {number} is {line[:60]!r}: expecting {HEAD.strip()!r}, of numbers from 0")
    return row


def append_timings(paths: RunPaths, by_rank: Mapping[int, np.ndarray]) -> None:
    """Append the records `[n]` of each rank, as numbered at the start of the job: in order of rounds, then of ranks."""
    rows = [
        (round_, rank, PHASES[phase], seconds, payload)
        for rank, records in sorted(by_rank.items())
        for round_, phase, seconds, payload in records.tolist()
    ]
    rows.sort(key=lambda row: row[0])  # what one rank recorded in a round stays in order
    append_text(paths.timings, "".join(_as_csv(rows)))


def keep_timings(paths: RunPaths, done: int | None) -> None:
    """Keep the records up to round `done`, after which a run continues; None begins an empty file."""
    kept = () if done is None else (row for row in read_timings(paths) if is_done(row[0], row[2], done))
    write_lines(paths.timings, itertools.chain([HEAD], _as_csv(kept)))


def _as_csv(rows: Iterable[TimingRow]) -> Iterator[str]:
    return (f"{round_},{rank},{phase},{seconds:.9f},{size}\n" for round_, rank, phase, seconds, size in rows)
