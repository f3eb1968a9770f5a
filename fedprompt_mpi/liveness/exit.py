"""How a process of a job ends, so that no rank waits for another one and every message is printed.

Where all ranks know that the job ends, they finalize MPI and rank 0 ends with the status. A rank that must stop alone
ends all others through MPI: launchers disagree about the exit status of a single rank that has not finalized (MPICH's
Hydra returned 0, 2 or 9 for the same program), but agree about an abort. Slurm's srun is the exception: it returns the
status with which all ranks end, and 137 after an abort.
"""

import ctypes
import fcntl
import os
import signal
import struct
import sys
import termios
import time
from typing import Any, NoReturn

FAILED = 3
"""Exit status: a rank failed."""
FINALIZED_WITHIN_S = 10.0
"""Time that ranks which all know of the end have to finalize MPI."""
LAST_WORDS_S = 2.0
"""Time that a launcher gets to read the last message of a rank before the abort."""


def end_process(status: int, *, others_left: bool = False) -> NoReturn:
    """Finalize MPI, if it runs, and end this process.

    The process ends through the C library's exit, not Python's: destroying the interpreter takes a second. The exit
    handlers of the C library must run, since only there MPICH tells its launcher that this rank is done; Hydra kills
    the other ranks of a job if one leaves without that.

    Args:
        status: the exit status.
        others_left: skip Finalize: other ranks are gone, and Open MPI with ULFM would wait for them.
    """
    _flush()
    mpi = running_mpi()
    if mpi is not None and not others_left:
        mpi.Finalize()
        ctypes.PyDLL(None).exit(status)  # PyDLL keeps the GIL: no other Python thread runs meanwhile
    os._exit(status)


def end_job(status: int) -> NoReturn:
    """End every rank of the job now, so that its launcher returns `status`; without MPI, end this process."""
    _flush()
    mpi = running_mpi()
    if mpi is not None:
        wait_until_read(sys.stderr.fileno())
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)


def die_after(seconds: float) -> None:
    """Let the system end this process by a signal if it has not ended by then: a rank does not come to finalize.

    No Python could do so, since MPI_Finalize keeps the interpreter; launchers end a job whose rank dies.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def running_mpi() -> Any:
    """Return mpi4py's MPI module if this process has imported and started it, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def wait_until_read(pipe: int) -> None:
    """Wait until the launcher has read a pipe, for `LAST_WORDS_S` at most: an abort discards unread output.

    Args:
        pipe: file descriptor; one that is no pipe is not waited for.
    """
    deadline = time.monotonic() + LAST_WORDS_S
    try:
        while time.monotonic() < deadline:
            (unread,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0)))
            time.sleep(0.02)  # after the last byte too: the launcher's proxy still has to pass it on
            if unread == 0:
                return
    except OSError:  # not a pipe: a terminal or a file
        return
