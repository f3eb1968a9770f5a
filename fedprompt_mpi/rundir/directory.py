"""Checks of a run directory before a run begins or continues in it."""

import collections
import csv
import uuid

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.rundir.paths import ROUNDS, TIMINGS, RunPaths
from fedprompt_mpi.rundir.records import read_rounds
from fedprompt_mpi.rundir.timings import read_timings


def check_directory(paths: RunPaths, *, resume: bool) -> None:
    """Check that a run may write here, and leave nothing behind.

    Raises:
        SettingsError: if another run is there already, or the place cannot be written to.
    """
    directory = paths.directory
    if not resume and directory.is_dir() and not paths.is_empty():
        raise SettingsError(
            f"output.dir is {str(directory)!r}, which is not empty: name another, or resume the run in it"
        )
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        probe = existing / f".fedprompt-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"output.dir is {str(directory)!r}, which cannot be written to ({error.strerror})"
        ) from error


def check_records(paths: RunPaths, done: int) -> None:
    """Check that a run which continues after round `done` has the lines of the rounds before.

    Raises:
        SettingsError: if they cannot be read, or one is missing.
    """
    file = ROUNDS
    try:
        if [record.round for record in read_rounds(paths)][:done] != list(range(done)):
            raise ValueError(f"it has not all of the rounds 0 to {done - 1}")
        file = TIMINGS
        collections.deque(read_timings(paths), maxlen=0)
    except (OSError, ValueError, csv.Error) as error:
        raise SettingsError(
            f"output.resume: {paths.directory / file} cannot be read ({error}): put it back, or start anew in another "
            f"output.dir, with the last file in {paths.checkpoint_folder} as prompt.init"
        ) from error
