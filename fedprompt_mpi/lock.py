"""One job at a time in a run directory: a second one that resumed the run meanwhile would write the same files.

The kernel lets go of the lock when the process that holds it ends, however it ends. File systems that know no locks are
written to without one.
"""

import fcntl
import os
import socket
from pathlib import Path

from fedprompt_mpi.files import CannotWriteError

LOCK_FILE = ".lock"


class DirectoryInUseError(CannotWriteError):
    """Another job is at work in a run directory."""

    remedy = "Wait for its end, or name another output.dir."


class DirectoryLock:
    """The lock on a run directory, of rank 0; it is taken once, however often that is asked for."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._handle: int | None = None

    def take(self, directory: Path) -> None:
        """Take the lock on a directory, which exists.

        Raises:
            DirectoryInUseError: if another job has it.
        """
        if self._handle is not None:
            return
        handle = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 256).decode(errors="replace").strip()
            os.close(handle)
            raise DirectoryInUseError(f"{str(directory)!r}, in which another job is at work ({holder})") from None
        except OSError:  # no locks here
            os.close(handle)
            return
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._handle = handle

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
