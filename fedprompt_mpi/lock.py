"""One job at a time in a run directory: a second one that resumed the run meanwhile would write the same files.

The kernel lets go of the lock when the process that holds it ends, however it ends; if its whole node is gone, NFS does
after its lease, so a lock that is held on another host is waited for a little. File systems without locks are written
to without one, and some know only those of their own host.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from fedprompt_mpi.files import CannotWriteError

LOCK_FILE = ".lock"
WAIT_S, LOOK_EVERY_S = 100.0, 2.0
"""For a lock that is held on another host: NFS version 4 has leases of 90 s."""


class DirectoryInUseError(Exception):
    """Another job is at work in a run directory; the message says which process of it has the lock."""


class DirectoryLock:
    """The lock on a run directory, of rank 0."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._handle: int | None = None

    def take(self, directory: Path) -> None:
        """Take the lock on a directory, which exists.

        Raises:
            CannotWriteError: if nothing can be written there.
            DirectoryInUseError: if another job has it.
        """
        file = directory / LOCK_FILE
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CannotWriteError(f"{file} ({error.strerror})") from error
        until = time.monotonic() + WAIT_S
        while not _lock(handle):
            holder = os.pread(handle, 256, 0).decode(errors="replace").strip()
            if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > until:
                os.close(handle)
                raise DirectoryInUseError(holder)
            time.sleep(LOOK_EVERY_S)
        self._handle = handle
        try:
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # it only says who it is
            return

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _lock(handle: int) -> bool:
    """Lock a file, unless somebody has; tell whether nobody has. Where there are no locks, nobody can."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_empty(directory: Path) -> bool:
    """Tell whether a directory, which exists, has nothing but perhaps a lock."""
    return all(path.name == LOCK_FILE for path in directory.iterdir())
