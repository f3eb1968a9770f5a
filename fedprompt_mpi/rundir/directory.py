"""Checks of a run directory before a run begins or continues in it."""

import collections
import itertools
import math
import time
import uuid
from pathlib import Path

from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.rundir.filtered import FilterRecord
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import federation_of, read_record, read_rounds
from fedprompt_mpi.rundir.timings import read_timings


def check_directory(paths: RunPaths, *, resume: bool) -> None:
    """Check that a run may write here, and leave nothing behind.

    Raises:
        SettingsError: if another run is there already, or the place cannot be written to.
    """
    directory = paths.directory
    check_content(paths, own_only=resume)
    if not resume and directory.is_dir() and not paths.is_empty():
        raise SettingsError(
            f"output.dir is {str(directory)!r}, which is not empty: name another, or resume the run in it"
        )
    check_writable(directory)


def check_writable(directory: Path) -> None:
    """Check that a directory can be made and written to, and leave nothing behind.

    Raises:
        SettingsError: if it cannot.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        probe = existing / f".fedprompt-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"output.dir is {str(directory)!r}, which cannot be written to ({error.strerror})"
        ) from error


def make_directory(directory: Path, *, is_new: bool) -> Path:
    """Make a directory, and return it.

    Args:
        directory: its parents are made too.
        is_new: True for a name that the program has chosen: if something has it already, a number is added.

    Raises:
        OSError: if it cannot be made.
    """
    made = directory
    for number in itertools.count(2):
        try:
            made.mkdir(parents=True, exist_ok=not is_new)
        except FileExistsError:
            if not is_new:
                raise
            made = directory.with_name(f"{directory.name}-{number}")
        else:
            break
    return made


def make_output_directory(named: str | None, command: str) -> Path:
    """Make the folder that `--dir` names, or runs/COMMAND-<time>, and return it.

    Raises:
        SettingsError: if it cannot be made.
    """
    directory = Path(named or f"runs/{command}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        return make_directory(directory, is_new=not named)
    except OSError as error:
        raise SettingsError(f"--dir is {str(directory)!r}, which cannot be made ({error.strerror})") from error


def check_content(paths: RunPaths, *, own_only: bool) -> None:
    """Check that nothing in a run directory leads out of it.

    Args:
        paths: of the directory, which need not exist.
        own_only: True if a run is to continue there, where it also writes and removes files: then there may be nothing
            that this program has not written.

    Raises:
        SettingsError: naming what is a link, a pipe or a device, or foreign.
    """
    try:
        links, foreign = paths.links(), paths.foreign() if own_only and not paths.is_empty() else []
    except OSError as error:
        raise SettingsError(f"{paths.directory} cannot be read ({error.strerror}): name a run directory") from error
    if links:
        raise SettingsError(
            f"{links[0]} is a link, a pipe or a device, and nothing in a run directory may lead out of it: remove it"
        )
    if foreign:
        raise SettingsError(
            f"{foreign[0]} is no file of a run, and a run continues only where there is nothing else: move it elsewhere"
        )


def check_records(paths: RunPaths, done: int, config: RunConfig) -> None:
    """Check that a run which continues after round `done`, with these settings, has the records of the rounds before.

    Raises:
        SettingsError: if they cannot be read, or one is missing.
    """
    try:
        if len(read_rounds(paths, federation_of(config, done))) < done:
            raise SettingsError(f"{paths.rounds} has not all of the rounds 0 to {done - 1}")
        collections.deque(read_timings(paths), maxlen=0)
        if done >= (config.federation.filter_round or math.inf):
            read_record(paths.filtered, FilterRecord)
    except SettingsError as error:
        raise SettingsError(
            f"output.resume: {error}; put it back, or start anew in another output.dir, with the last file in "
            f"{paths.checkpoint(done).path.parent} as prompt.init"
        ) from error
