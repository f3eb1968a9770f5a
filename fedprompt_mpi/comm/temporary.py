"""A temporary folder of this job: only its user can read it, and the next run removes it if this one is killed.

Its owner holds a lock on it, which the kernel releases when the process ends, in whatever way.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fedprompt_mpi.files import CannotWriteError

PREFIX = f"fedprompt-{os.getuid()}-"
YOUNG_S = 60.0
"""A folder that is younger may have been made just now, and not be locked yet."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM_IN_WORDS = ("No space left", "requested and")
"""As safetensors and numpy say it, without a number."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def make_folder() -> tuple[Path, int]:
    """Make a folder, after removing those of this user's killed jobs; returns it, and the handle of its lock.

    Raises:
        CannotWriteError: if that cannot be; it names the place and TMPDIR.
    """
    with explained(None):
        remove_left_behind()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        handle = os.open(folder, _FOLDER)
        fcntl.flock(handle, fcntl.LOCK_EX)
        return folder, handle


def remove_folder(folder: Path, handle: int) -> None:
    """Remove a folder that `make_folder` has made."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)


def remove_left_behind() -> None:
    """Remove this user's folders that no process owns any more; those of other users and of other names stay."""
    with os.scandir(tempfile.gettempdir()) as found:
        left = [Path(entry.path) for entry in found if entry.name.startswith(PREFIX)]
    for folder in left:
        with contextlib.suppress(OSError):
            seen = folder.lstat()
            is_old = time.time() - seen.st_mtime > YOUNG_S
            if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and is_old and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    handle = os.open(folder, _FOLDER)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its owner lives
        return False
    finally:
        os.close(handle)
    return True


@contextlib.contextmanager
def explained(folder: Path | None) -> Iterator[None]:
    """Say of an error that means a full or closed temporary folder which folder that is, and how to name another.

    Args:
        folder: in which the block writes; None for the place of such folders.

    Raises:
        CannotWriteError: instead of that error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError) and folder is None:  # tempfile has found no place at all
            raise CannotWriteError(os.environ.get("TMPDIR", "/tmp"), error, remedy=REMEDY) from error
        number = error.errno if isinstance(error, OSError) else None
        if number not in _NO_ROOM and not any(words in str(error) for words in _NO_ROOM_IN_WORDS):
            raise
        raise CannotWriteError(folder or tempfile.gettempdir(), error, remedy=REMEDY) from error


REMEDY = "Make room there, or name another folder for temporary files with the variable TMPDIR; then start again."
