"""timings.csv: what is written is read back, and a file from somebody else is limited."""

from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi.comm.timing import PHASES, RECORD
from fedprompt_mpi.rundir import timings
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.timings import append_timings, keep_timings, read_timings


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    keep_timings(paths, None)
    records = np.array([(r, PHASES.index(p), 0.25, 8) for r in (1, 2) for p in ("train", "evaluate")], dtype=RECORD)
    append_timings(paths, {0: records, 4: records})
    return paths


def test_what_is_written_is_read_back(paths: RunPaths) -> None:
    rows = list(read_timings(paths))
    assert rows[0] == (1, 0, "train", 0.25, 8)
    expected = [(r, k, phase) for r in (1, 2) for k in (0, 4) for phase in ("train", "evaluate")]
    assert [row[:3] for row in rows] == expected


def test_a_run_that_goes_on_repeats_what_comes_after_its_checkpoint(paths: RunPaths) -> None:
    keep_timings(paths, 1)
    assert [row[:3] for row in read_timings(paths)] == [(1, 0, "train"), (1, 4, "train")]


def test_a_line_without_end_is_left_out(paths: RunPaths) -> None:
    before = list(read_timings(paths))
    with paths.timings.path.open("a") as file:
        file.write("3,0,train,0.5")
    assert list(read_timings(paths)) == before


def test_a_file_without_end_is_not_read_to_its_end(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "MOST_TIMINGS_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        list(read_timings(paths))


def test_what_is_no_record_is_named(paths: RunPaths) -> None:
    paths.timings.path.write_text("round,rank,phase\n1,2,train\n")
    with pytest.raises(ValueError, match=r"timings\.csv cannot be read \(line"):
        list(read_timings(paths))
