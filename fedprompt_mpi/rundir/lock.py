"""The lock of a run directory: two jobs that resume one run at the same time would write the same files.

The kernel releases the lock when the process that holds it ends, in whatever way; a job that ends by itself removes the
file too. If its whole node is gone, NFS
releases it after a lease, so a lock held on another host is waited for. A file system without locks is used without
one; some know only the locks of their own host.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from fedprompt_mpi.files import CannotWriteError, RunFile, parent_of
from fedprompt_mpi.rundir.paths import RunPaths

WAIT_S, LOOK_EVERY_S = 100.0, 2.0
"""Time to wait for a lock that is held on another host: NFS version 4 has leases of 90 s."""


class DirectoryInUseError(Exception):
    """Another job uses the run directory; the message names the process that holds the lock."""


class DirectoryLock:
    """The lock on a run directory; rank 0 takes it."""

    def __init__(self) -> None:
        """Start without a lock."""
        self._handle: int | None = None
        self._file: RunFile | None = None

    def take(self, directory: Path) -> None:
        """Take the lock on a directory, which exists.

        Raises:
            CannotWriteError: if nothing can be written there.
            DirectoryInUseError: if another job has it.
        """
        file = RunPaths(directory).lock
        until = time.monotonic() + WAIT_S
        handle = _open(file)
        while not (is_locked := _lock(handle)) or not _is_there(file, handle):
            if is_locked:  # the job that held it has ended meanwhile, and removed the file
                os.close(handle)
                handle = _open(file)
                continue
            holder = os.pread(handle, 256, 0).decode(errors="replace").strip()
            if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > until:
                os.close(handle)
                raise DirectoryInUseError(holder)
            time.sleep(LOOK_EVERY_S)
        self._file, self._handle = file, handle
        try:
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # the content only names the holder
            return

    def release(self) -> None:
        """Remove the file and release the lock, if it is held."""
        if self._handle is None or self._file is None:
            return
        with contextlib.suppress(OSError):
            if _is_there(self._file, self._handle):
                self._file.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None


def _open(file: RunFile) -> int:
    """Open a lock's file, and make it if there is none; raises as `DirectoryLock.take` does."""
    try:
        with parent_of(file) as (folder, name):
            # nobody else can open it, and with that lock it
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        raise CannotWriteError(file, error) from error
    if os.fstat(handle).st_nlink > 1:
        os.close(handle)
        raise CannotWriteError(file, OSError(errno.EEXIST, "it is a link to another file"))
    with contextlib.suppress(OSError):  # somebody else's, of an older version
        os.fchmod(handle, 0o600)
    return handle


def _is_there(file: RunFile, handle: int) -> bool:
    """Return True if a name is still that of an open file: a removed one locks nobody out."""
    try:
        with parent_of(file) as (folder, name):
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    here = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _lock(handle: int) -> bool:
    """Lock a file; return False if another process holds the lock. Without support for locks, return True."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
